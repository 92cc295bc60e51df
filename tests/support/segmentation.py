"""A small segmentation pipeline and its inputs."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import nn

from unet_diffusion import UNet
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import SegmentationPipeline

SMALL = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "channels": (4, 8), "head_channels": 8}


def network(num_classes: int = 3, **overrides) -> UNet:
    unet = UNet(**{**SMALL, "num_classes": num_classes, **overrides})
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:
                nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(unet.segmentation_head.weight, std=1.0)
    return unet.eval()


def pipeline(unet: UNet | None = None, **arguments) -> SegmentationPipeline:
    pipe = SegmentationPipeline(unet or network(), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(folder: Path) -> SegmentationPipeline:
    pipe = pipeline(
        scheduler=DDPMScheduler(),
        pixel_range=PixelRange((0.0,), (200.0,), "uint8").to_dict(),
        class_names=["ground", "cell", "border"],
        palette=[[0, 0, 0], [1, 2, 3], [4, 5, 6]],
    )
    pipe.save_pretrained(folder)
    return pipe
