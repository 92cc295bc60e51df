"""A DDPM run from options to a folder that diffusers loads."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.accelerator import make_accelerator
from unet_diffusion.data import DataConfig, load_images
from unet_diffusion.diffusion_task import DiffusionConfig, DiffusionTask
from unet_diffusion.networks import load_unet
from unet_diffusion.output_folder import check_output
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.training import Trainer
from unet_diffusion.training_config import TrainingConfig
from unet_diffusion.unet import UNet


@dataclass
class TrainDDPM:
    """Train a U-Net to generate pictures (DDPM). The same command again goes on with a run that was stopped."""

    output: Path = Path("runs/ddpm")
    """Folder of the run; it becomes a diffusers pipeline."""
    model: str = "small-32"
    """Network to train: a preset, a JSON file of config values, or a folder of an earlier run to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def train_ddpm(config: TrainDDPM) -> Path:
    """Trains, or goes on training, and returns the run's folder.

    The folder holds the pipeline (`model_index.json`, `unet/`, `scheduler/`), a model card, `samples.png`,
    `curves.png`, `metrics.jsonl`, `config.json`, previews and checkpoints. The network's size, channels and classes
    follow from the data.

    Raises:
        ValueError: an option, a picture source or a network that cannot be used, before training starts.
        RuntimeError: another process is training in the folder.
    """
    accelerator = make_accelerator(config.training, config.output)
    check_output(config.output)
    data = load_images(config.data, config.training.seed, accelerator.process_index, accelerator.num_processes)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    unet = make_unet(config, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    task = DiffusionTask(unet, data, config.diffusion, config.data.num_workers)
    return Trainer(task, config.training, config.output, asdict(config), accelerator).run()


def make_unet(config: TrainDDPM, height: int, width: int, channels: int, class_names: tuple[str, ...] | None) -> UNet:
    """The network of a run, made for pictures of a size, a number of channels and classes.

    Raises:
        ValueError: an unknown preset, weights for another number of channels, or class labels that the data lack.
    """
    size = height if height == width else (height, width)
    wanted: dict[str, Any] = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    if config.diffusion.class_conditional:
        if class_names is None:
            raise ValueError("class_conditional is set, but the data have no class labels; name them by label_column.")
        wanted |= {"num_class_embeds": len(class_names), "label_dropout": config.diffusion.label_dropout}
    return load_unet(config.model, wanted)
