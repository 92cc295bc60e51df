"""The options of `unet-diffusion train-classifier`."""

from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_outside, check_sources
from unet_diffusion.files import check_output
from unet_diffusion.training.config import TrainingConfig


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
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, learning_rate=1e-2, warmup_steps=100, validate_every=250)
    )

    def check_paths(self) -> None:
        """Raises a ValueError for data that do not exist, or an output that cannot be written."""
        check_output(self.output)
        check_outside(self.output, self.data.data, self.data.validation_data)
        check_sources(self.data)
