"""A DDPM run from options to a folder that diffusers loads: one that generates images, or one that enlarges them."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.config import check_sides
from unet_diffusion.files import check_output
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.config import DiffusionConfig, SuperResolutionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unet import UNet


@dataclass
class TrainDDPM:
    """Train a U-Net to generate or enlarge images (DDPM). The same command again goes on with a stopped run."""

    output: Path = Path("runs/ddpm")
    """Folder of the run; it becomes a diffusers pipeline."""
    model: str = "small-32"
    """Network to train: a preset, a JSON file of config values, or a folder of an earlier run to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    task: Literal["generation", "super-resolution"] = "generation"
    """"generation" makes images from noise; "super-resolution" makes small images `scale` times larger a side."""
    super_resolution: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)

    def __post_init__(self) -> None:
        """Checks the task and its options, before any image is read."""
        if self.task not in ("generation", "super-resolution"):
            raise ValueError(f"task is {self.task!r}, but must be 'generation' or 'super-resolution'.")
        scale = self.super_resolution.scale
        if self.task == "generation" and self.super_resolution != SuperResolutionConfig():
            raise ValueError(
                f"scale is {scale} and condition_noise {self.super_resolution.condition_noise}, but task is "
                "'generation', which starts from noise alone; set task to super-resolution, or leave them out."
            )
        if self.task == "super-resolution":
            if scale is None:
                raise ValueError("task is 'super-resolution', but there is no scale; set it to 2 or 4.")
            if self.data.side is not None:
                check_sides(self.data.side, self.data.side, scale)


def train_ddpm(config: TrainDDPM) -> Path:
    """Trains, or goes on training, and returns the run's folder.

    The folder holds the pipeline (`model_index.json`, `unet/`, `scheduler/`), a model card, `samples.png`,
    `curves.png`, `metrics.jsonl`, `config.json`, previews and checkpoints. The network's size, channels and classes
    follow from the data.

    Raises:
        ValueError: an option, an image source or a network that cannot be used, before training starts.
        RuntimeError: another process is training in the folder.
    """
    accelerator = make_accelerator(config.training, config.output)
    check_output(config.output)
    data = load_images(config.data, config.training.seed, accelerator.process_index, accelerator.num_processes)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    unet = make_unet(config, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    resolved = asdict(config)
    task: DiffusionTask
    if config.task == "super-resolution":
        task = SuperResolutionTask(unet, data, config.diffusion, config.super_resolution, config.data.num_workers)
    else:
        task = DiffusionTask(unet, data, config.diffusion, config.data.num_workers)
        resolved.pop("super_resolution")
    return Trainer(task, config.training, config.output, resolved, accelerator).run()


def make_unet(config: TrainDDPM, height: int, width: int, channels: int, class_names: tuple[str, ...] | None) -> UNet:
    """The network of a run, made for images of a size, a number of channels and classes.

    Raises:
        ValueError: an unknown preset, weights for another number of channels, or class labels that the data lack.
    """
    size = height if height == width else (height, width)
    seen = 2 * channels if config.task == "super-resolution" else channels  # the small image beside the noisy one
    wanted: dict[str, Any] = {"sample_size": size, "in_channels": seen, "out_channels": channels}
    if config.diffusion.class_conditional:
        if class_names is None:
            raise ValueError("class_conditional is set, but the data have no class labels; name them by label_column.")
        wanted |= {"num_class_embeds": len(class_names), "label_dropout": config.diffusion.label_dropout}
    return load_unet(config.model, wanted)
