"""The options of `unet-diffusion train-classifier`."""

from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.checks import set_plain
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_outside, check_sources
from unet_diffusion.files import check_output
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unused_options import check_used


@dataclass
class ClassifierTraining(TrainingConfig):
    """The options of the training loop, with defaults for classes of whole images."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-2
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    validate_every: int = 250
    """Steps between validations."""


@dataclass
class TrainClassifier:
    """Train a small classifier of whole images. To resume a stopped run, give the same command again."""

    output: Path = Path("runs/classifier")
    """Folder of the run; `evaluate-generation --features` takes it."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels at each resolution, full resolution first; the last is the number of features."""
    dropout: float = 0.1
    """Share of the features dropped in training before the last layer."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=ClassifierTraining)

    def __post_init__(self) -> None:
        set_plain(self)
        check_used(self, held_out=self.data.holds_out)

    def check_paths(self) -> None:
        """Raises a ValueError for data that do not exist, or an output that cannot be written."""
        check_output(self.output)
        check_outside(self.output, self.data.data, self.data.validation_data)
        check_sources(self.data)
