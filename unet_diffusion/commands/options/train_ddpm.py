"""The options of `unet-diffusion train-ddpm`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from unet_diffusion.checks import require_choice
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_outside, check_sources
from unet_diffusion.diffusion.config import check_sides
from unet_diffusion.files import check_output
from unet_diffusion.network.config import check_model
from unet_diffusion.tasks.config import DiffusionConfig, SuperResolutionConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unused_options import check_used

TaskName = Literal["generation", "super-resolution"]


@dataclass
class TrainDDPM:
    """Train a U-Net to generate or enlarge images (DDPM). To resume a stopped run, give the same command again."""

    output: Path = Path("runs/ddpm")
    """Folder of the run. It becomes a diffusers pipeline."""
    model: str = "small-32"
    """Network to train: a preset, a JSON file of config values, or the folder of an earlier run to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    task: TaskName = "generation"
    """"generation" makes images from noise; "super-resolution" enlarges each side of small images `scale` times."""
    super_resolution: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)

    def __post_init__(self) -> None:
        require_choice("task", self.task, get_args(TaskName))
        check_used(self, held_out=self.data.holds_out)
        scale = self.super_resolution.scale
        if self.task == "super-resolution":
            if scale is None:
                raise ValueError("task is 'super-resolution', but there is no scale; set it to 2 or 4.")
            if self.data.image_percentiles is not None:
                raise ValueError(
                    "percentiles_of is 'image', but a small image and a large one would each get a range of its own; "
                    "leave it out for task='super-resolution'."
                )
            if self.data.side is not None:
                check_sides(self.data.side, self.data.side, scale)

    def check_paths(self) -> None:
        """Raises a ValueError for data or a model that does not exist, or an output that cannot be written."""
        check_output(self.output)
        check_outside(self.output, self.data.data, self.data.validation_data)
        check_model(self.model)
        check_sources(self.data)
