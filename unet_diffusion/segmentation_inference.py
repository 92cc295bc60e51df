"""Class probabilities of pictures of any size, averaged over turns and noisy versions of the picture."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.pixels import PixelRange
from unet_diffusion.tiling import Read, Tiling, noise_window, tiled

Turn = tuple[int, bool]  # quarter turns, and whether the picture is mirrored after them
TURNS: list[Turn] = [(quarters, mirror) for quarters in range(4) for mirror in (False, True)]


@dataclass(frozen=True)
class Segmenter:
    """A network with all that is averaged for one mask.

    Args:
        unet: called as `unet(images, timestep, head="segmentation").logits`, which leaves it as it is.
        pixel_range: how stored values map to [-1, 1].
        tiling: where the windows lie.
        device: where the network runs.
        turns: rotations and mirror images of the picture that are averaged.
        scheduler: whose `add_noise` makes the noisy versions; None without levels.
        levels: the timestep of each noisy version; none: the clean picture at the network's own timestep.
    """

    unet: Any
    pixel_range: PixelRange
    tiling: Tiling
    device: torch.device
    turns: tuple[Turn, ...] = ((0, False),)
    scheduler: Any = None
    levels: tuple[int, ...] = ()

    def regions(
        self, read_stored: Read, size: tuple[int, int], seeds: list[int], window_done: Callable[[], Any]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Segments pictures of one size part by part.

        Args:
            read_stored: rows and columns to stored values (B, C, rows, columns).
            size: height and width.
            seeds: where the noise of each picture comes from.
            window_done: called after each window.

        Yields:
            Rows, columns and float32 probabilities (B, K, rows, columns).
        """
        channels = self.unet.config.in_channels

        def read(rows: slice, columns: slice) -> Tensor:
            """The clean pictures and, after them in the channels, the noise of each version."""
            clean = self.pixel_range.to_model(read_stored(rows, columns).to(self.device))
            noises = [
                torch.stack([noise_window(seed, draw, channels, rows, columns) for seed in seeds]).to(self.device)
                for draw in range(len(self.levels))
            ]
            return torch.cat([clean, *noises], dim=1)

        def predict(window: Tensor) -> Tensor:
            clean, *noises = window.split(channels, dim=1)
            probabilities = self._averaged(clean, noises)
            window_done()
            return probabilities

        yield from tiled(predict, read, size, self.tiling)

    def _averaged(self, clean: Tensor, noises: list[Tensor]) -> Tensor:
        """Probabilities (B, K, h, w) of a window (B, C, h, w) in [-1, 1] and the noise of its noisy versions."""
        versions: list[tuple[int | None, Tensor]] = [(None, clean)]
        if self.levels:
            steps = [torch.full((len(clean),), level, device=clean.device) for level in self.levels]
            noisy = [self.scheduler.add_noise(clean, noise, step) for noise, step in zip(noises, steps)]
            versions = list(zip(self.levels, noisy))
        total = torch.zeros((), device=clean.device)
        for (timestep, images), turn in product(versions, self.turns):
            images = turned(images, turn).to(self.unet.dtype).contiguous(memory_format=torch.channels_last)  # faster
            logits = self.unet(images, timestep, head="segmentation").logits
            total = total + turned_back(logits.float().softmax(dim=1), turn)
        return total / (len(versions) * len(self.turns))


def turned(images: Tensor, turn: Turn) -> Tensor:
    """Rotates (..., H, W) by quarter turns, then mirrors it if asked."""
    quarters, mirror = turn
    images = images.rot90(quarters, dims=(-2, -1))
    return images.flip(-1) if mirror else images


def turned_back(images: Tensor, turn: Turn) -> Tensor:
    """Undoes `turned`."""
    quarters, mirror = turn
    return (images.flip(-1) if mirror else images).rot90(-quarters, dims=(-2, -1))


def random_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """Seeds from a generator, or from PyTorch's global one."""
    device = None if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
