"""Small helpers for many tests: a network, its prediction, images with masks, a run that is interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from unet_diffusion import UNet


def network(**config) -> UNet:
    """A network without zero weights, which would hide what they multiply; the same at every call."""
    torch.manual_seed(0)
    values = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "head_channels": 8}
    unet = UNet(**{**values, **config})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return unet.eval()


@torch.no_grad()
def prediction(unet: UNet) -> Tensor:
    """The predicted noise for two images of 9 x 7 pixels."""
    channels = unet.config.in_channels
    return unet(torch.linspace(-1, 1, 126 * channels).reshape(2, channels, 9, 7), 5).sample


def squares(folder: Path, count: int = 12, side: int = 16, kinds: tuple[str, ...] = ("",)) -> None:
    """Images of one bright square on dark noise, in a subfolder for each kind, and masks that say where it is."""
    random = np.random.default_rng(0)
    for i in range(count):
        top, left = random.integers(0, side - 6, 2)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[top : top + 6, left : left + 6] = 1
        image = (random.integers(0, 60, (side, side)) + 150 * mask).astype(np.uint8)
        for name, pixels in (("images", image), ("masks", mask)):
            path = folder / name / kinds[i % len(kinds)] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


@contextmanager
def power_cut(task: type, call: int) -> Iterator[None]:
    """Makes the loss of a task raise at its `call`-th call within the block, and checks that this ends the run."""
    compute, calls = task.loss, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("power cut")
        return compute(self, *arguments)

    with patch.object(task, "loss", failing), pytest.raises(RuntimeError, match="power cut"):
        yield
