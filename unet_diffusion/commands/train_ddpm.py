"""Trains a network that generates or enlarges images, from options to a folder that diffusers loads."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.training_images import load_examined
from unet_diffusion.data.record import make_record
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unet import UNet


def train_ddpm(options: TrainDDPM) -> Path:
    """Trains, or resumes a stopped run, and returns the run's folder.

    The folder holds the pipeline (`model_index.json`, `unet/`, `scheduler/`), a model card, `samples.png`,
    `curves.png`, `metrics.jsonl`, `config.json`, `data.json`, previews and checkpoints. The network's size, channels
    and classes follow from the data.

    Raises:
        ValueError: an option, images or a network cannot be used, or a question has to be answered; raised before
            training starts.
        RuntimeError: another process is training in the folder.
    """
    options.check_paths()
    accelerator = make_accelerator(options.training, options.output)
    data, summary = load_examined(options.data, options.training.seed, options.output, accelerator)
    torch.manual_seed(keyed_seed(options.training.seed, "initialisation"))
    unet = make_unet(options, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    resolved = asdict(options)
    task: DiffusionTask
    if options.task == "super-resolution":
        task = SuperResolutionTask(unet, data, options.diffusion, options.super_resolution, options.data.num_workers)
    else:
        task = DiffusionTask(unet, data, options.diffusion, options.data.num_workers)
        resolved.pop("super_resolution")
    names = data.train.class_names if options.diffusion.class_conditional else None
    record = make_record(data, options.data.preparation, summary=summary.lines(), class_names=names)
    return Trainer(task, options.training, options.output, resolved, accelerator, record).run()


def make_unet(options: TrainDDPM, height: int, width: int, channels: int, class_names: tuple[str, ...] | None) -> UNet:
    """Returns the network of a run, for images of one size, with their channels and classes."""
    size = height if height == width else (height, width)
    seen = 2 * channels if options.task == "super-resolution" else channels  # the small image beside the noisy one
    wanted: dict[str, Any] = {"sample_size": size, "in_channels": seen, "out_channels": channels}
    if options.diffusion.class_conditional:
        if class_names is None and options.data.streaming:
            raise ValueError(
                "class_conditional is set, but while streaming only a label column of type ClassLabel says which "
                "classes there are, and the data have none; leave out streaming to take integers and strings."
            )
        if class_names is None:
            raise ValueError(
                "class_conditional is set, but the data have no class labels; name their column by label_column, or "
                "sort the images into one folder for each class."
            )
        wanted |= {"num_class_embeds": len(class_names), "label_dropout": options.diffusion.label_dropout}
    return load_unet(options.model, wanted)
