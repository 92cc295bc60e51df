"""A small super-resolution network and its inputs."""

import numpy as np
import torch

from tests.support import tiny
from unet_diffusion import UNet
from unet_diffusion.images.pixel_range import PixelRange

BYTES = PixelRange.full("uint8")


def network(channels: int = 1, **config) -> UNet:
    """A tiny network for super-resolution: its input is the noisy image and the condition."""
    return tiny.network(**{"in_channels": 2 * channels, "out_channels": channels, **config})


def image(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
