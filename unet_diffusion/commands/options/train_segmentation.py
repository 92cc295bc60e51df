"""The options of `unet-diffusion train-segmentation`."""

from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.data.config import SourceOptions
from unet_diffusion.data.folders import check_outside, check_sources
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.files import check_output
from unet_diffusion.network.config import check_model
from unet_diffusion.tasks.config import FrozenFeaturesConfig, JointConfig, SegmentationConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unused_options import check_used


@dataclass
class SegmentationTraining(TrainingConfig):
    """The options of the training loop, with defaults for masks."""

    steps: int = 2000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Images per process and forward pass."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    validate_every: int = 100
    """Steps between validations."""


@dataclass
class TrainSegmentation:
    """Train a U-Net to predict masks, from a DDPM run or from scratch. To resume, give the same command again."""

    data: MaskedDataConfig
    output: Path = Path("runs/segmentation")
    """Folder of the run. It becomes a SegmentationPipeline."""
    model: str = "small-32"
    """Where to start: the folder of a DDPM or segmentation run, or, for untrained weights, a preset or a JSON file of
    config values."""
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    frozen_features: FrozenFeaturesConfig = field(default_factory=FrozenFeaturesConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    augment: bool = True
    """Vary images and masks in training, as set by the next options."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=SegmentationTraining)

    def __post_init__(self) -> None:
        check_used(self, held_out=self.data.holds_out, image_channels=self.data.channels)

    def check_paths(self) -> None:
        """Raises a ValueError for data or a model that does not exist, or an output that cannot be written."""
        check_output(self.output)
        check_outside(self.output, self.data.data, self.data.validation_data, self.joint.unlabelled)
        check_model(self.model)
        if not Path(self.model).is_dir():
            self._check_untrained()
        check_sources(self.data)
        if self.joint.unlabelled is not None:
            check_sources(SourceOptions(self.joint.unlabelled))

    def _check_untrained(self) -> None:
        """Raises a ValueError for options that spare weights, if the model has untrained ones."""
        for name, all_learn in (("learn", "everything"), ("trunk_rate", 1.0)):
            value = getattr(self.segmentation, name)
            if value != all_learn:
                raise ValueError(
                    f"{name} is {value!r}, which spares trained weights, but those of the model {self.model} are "
                    f"untrained; give the folder of a run as model, or leave {name} out."
                )
