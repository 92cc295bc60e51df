"""Runs for the page of the demo."""

from pathlib import Path

import numpy as np
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.tiny import network
from unet_diffusion.pipelines import SegmentationPipeline, SuperResolutionPipeline

NAMES = ["background", "cell", "<b>other</b>"]


def save_joint_run(folder: Path) -> Path:
    """A run that segments, and generates by class, as training with a denoising weight leaves it."""
    unet = network(num_classes=3, num_class_embeds=2, label_dropout=0.1)
    pipe = SegmentationPipeline(unet, DDPMScheduler(), class_names=NAMES)
    pipe.register_to_config(_label_names=["left", "right"])
    pipe.save_pretrained(folder)
    return folder


def save_enlarging_run(folder: Path, channels: int = 3, **arguments) -> Path:
    unet = network(in_channels=2 * channels, out_channels=channels)
    SuperResolutionPipeline(unet, DDPMScheduler(), 2, **arguments).save_pretrained(folder)
    return folder


def save_image(path: Path, height: int = 12, width: int = 10, channels: int = 1) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(path)
    return path


class Reports(list):
    """The reports of a job."""

    def __call__(self, done: int, total: int) -> None:
        self.append((done, total))
