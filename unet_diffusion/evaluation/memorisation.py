"""Scores that show whether generated images are copies of training images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.evaluation.generation_metrics import (
    LARGEST_MATRIX,
    SMALLEST_SAMPLE,
    nearest_neighbours,
    standard_error,
)
from unet_diffusion.evaluation.rows import Rows
from unet_diffusion.images.axes import counted
from unet_diffusion.images.figures import array_images, grid

LEVEL = 0.05  # share of the held-out images whose distances count as near
FEWEST_HELD_OUT = round(1 / LEVEL)  # with fewer, this share is less than one image


@dataclass(frozen=True)
class Memorisation:
    """How near generated images are to training images, pixel by pixel.

    Distances are root mean square differences of pixels; images in [-1, 1] are at most 2 apart. Held-out images set the
    scale: of new images drawn from the data, 5 % would be nearer than all but the nearest 5 % of the held-out ones. A
    generator that memorised has far more near images, but so has one whose images are too smooth. The pairs show which
    of the two it is (as in figure 10 of Ho et al. 2020).

    Attributes:
        generated: the median over generated images of the distance to the nearest training image.
        held_out: the same for held-out images; None if there are none.
        near: share of generated images that are nearer to a training image than 95 % of the held-out images are; None
            for fewer than 20 held-out images.
        generated_count: number of generated images.
        held_out_count: number of held-out images.
        training_count: number of training images that were compared.
        generated_error: standard error of `generated`; None for fewer than 64 images, as for the other errors.
        held_out_error: standard error of `held_out`.
        near_error: standard error of `near`.
        flag: a sentence on why the scores should be read with care, or "".
    """

    generated: float
    held_out: float | None
    near: float | None
    generated_count: int
    held_out_count: int
    training_count: int
    generated_error: float | None = None
    held_out_error: float | None = None
    near_error: float | None = None
    flag: str = ""

    def __str__(self) -> str:
        """Returns one sentence, and the flag."""
        ours = with_error(self.generated, self.generated_error)
        text = f"nearest of {counted(self.training_count, 'training image')}: root mean square difference {ours}"
        if self.held_out is None:
            generated = counted(self.generated_count, "generated image")
            text += f" (median of {generated}; none were held out to compare with)"
        else:
            text += (
                f" for {self.generated_count} generated and {with_error(self.held_out, self.held_out_error)} for "
                f"{counted(self.held_out_count, 'held-out image')} (medians)"
            )
        if self.near is not None:
            error = "" if self.near_error is None else f" +- {self.near_error:.1%}"
            text += f"; {self.near:.1%}{error} of the generated ones are nearer than 95 % of the held-out ones"
        return f"{text}\n{self.flag}" if self.flag else text


def with_error(value: float, error: float | None) -> str:
    """Returns a score with three digits and its standard error with two, as text."""
    return f"{value:.3g}" if error is None else f"{value:.3g} +- {error:.2g}"


def memorisation(
    generated: Tensor, training: Rows, held_out: Rows | None = None, pairs: int = 16, mirrored: bool = False
) -> tuple[Memorisation, Image.Image]:
    """Returns the scores, and a grid of the generated images nearest to a training image, each beside that image.

    Args:
        generated: images in [-1, 1], (M, C, H, W).
        training: images trained on, of the same kind, (N, C, H, W).
        held_out: images not trained on, of the same kind, (K, C, H, W).
        pairs: number of pairs in the grid.
        mirrored: whether the training also showed the images mirrored left to right, so that these are searched too.

    Raises:
        ValueError: the images have different sizes or channels.
    """
    search = CopySearch(training, pairs, mirrored)
    search.add(generated)
    return search.scores(held_out)


@dataclass(frozen=True, eq=False)
class Mirrored:
    """Images (N, C, H, W), mirrored left to right."""

    images: Rows

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: Any, /) -> Tensor:
        return self.images[part].flip(-1)

    @property
    def shape(self) -> Sequence[int]:
        """Returns the number of images, their channels, height and width."""
        return self.images.shape


class CopySearch:
    """`memorisation` for generated images that come in batches; only the nearest images are kept.

    Args:
        training: as in `memorisation`.
        pairs: as in `memorisation`.
        mirrored: as in `memorisation`.
    """

    def __init__(self, training: Rows, pairs: int = 16, mirrored: bool = False) -> None:
        self.training = training
        self.pairs = pairs
        self.mirrored = mirrored
        self.distances = torch.empty(0, dtype=torch.float64)  # (M,)
        self.nearest = torch.empty(0, dtype=torch.int64)  # (M,): training images
        self.turned = torch.empty(0, dtype=torch.bool)  # (M,): whether these are mirrored
        self.shown: dict[int, Tensor] = {}  # the images with the smallest distances, by place
        self._waiting: list[Tensor] = []  # since the training images are read once for all waiting images
        self._values = math.prod(training.shape[1:])  # of an image

    def add(self, generated: Tensor) -> None:
        """Compares further images (B, C, H, W) in [-1, 1] with the training images."""
        self._waiting.append(generated)
        if sum(map(len, self._waiting)) * self._values >= LARGEST_MATRIX:
            self._search()

    def _search(self) -> None:
        generated, first = torch.cat(self._waiting), len(self.distances)
        self._waiting.clear()
        found = (self.distances, self.nearest, self.turned), self._nearest(generated)
        self.distances, self.nearest, self.turned = map(torch.cat, zip(*found))
        nearest = self.distances.argsort(stable=True)[: self.pairs].tolist()
        self.shown = {n: generated[n - first].clone() if n >= first else self.shown[n] for n in nearest}

    def _nearest(self, images: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Returns distance, index and whether it is mirrored, of the training image nearest to each image, (B,) each.

        An image is as far from a mirrored one as the mirrored image from the other.
        """
        found = nearest_neighbours(images, self.training)
        distances, indices = found.distances[:, 0], found.indices[:, 0]
        turned = torch.zeros(len(indices), dtype=torch.bool)
        if self.mirrored:
            others = nearest_neighbours(Mirrored(images), self.training)
            turned = others.distances[:, 0] < distances
            distances = distances.minimum(others.distances[:, 0])
            indices = indices.where(~turned, others.indices[:, 0])
        return distances / self._values**0.5, indices, turned

    def scores(self, held_out: Rows | None = None) -> tuple[Memorisation, Image.Image]:
        """Returns the same as `memorisation` for the images so far; there must be at least one."""
        if self._waiting:
            self._search()
        distances, training = self.distances, self.training
        counts = (len(distances), 0 if held_out is None else len(held_out), len(training))
        if held_out is None or not len(held_out):
            return Memorisation(_median(distances), None, None, *counts, _error(_median, distances)), self._grid()
        controls, _, _ = self._nearest(held_out)
        near = None if len(controls) < FEWEST_HELD_OUT else _share_below(distances, controls)
        flag = ""
        if len(controls) < SMALLEST_SAMPLE:
            few = "1 held-out image is" if len(controls) == 1 else f"{len(controls)} held-out images are"
            flag = f"{few} too few to measure how near the nearest 5 % of them are; hold out {SMALLEST_SAMPLE} or more."
        errors = (_error(_median, distances), _error(_median, controls), _error(_share_below, distances, controls))
        return Memorisation(_median(distances), _median(controls), near, *counts, *errors, flag=flag), self._grid()

    def _grid(self) -> Image.Image:
        shown = list(self.shown)
        nearest = self.training[self.nearest[shown]]
        nearest = torch.where(self.turned[shown][:, None, None, None], nearest.flip(-1), nearest)
        both = torch.stack([torch.stack([*self.shown.values()]), nearest], dim=1).flatten(0, 1)
        images = array_images((both / 2 + 0.5).permute(0, 2, 3, 1).numpy())
        return grid(images, columns=min(8, len(images)))


def _median(distances: Tensor) -> float:
    return distances.median().item()


def _share_below(distances: Tensor, controls: Tensor) -> float:
    """Returns the share of distances that are below the 5 % quantile of the controls."""
    return (distances < controls.quantile(LEVEL)).double().mean().item()


def _error(statistic: Callable[..., float], *samples: Tensor) -> float | None:
    """Returns the standard error; None if the samples are too small for it."""
    if min(map(len, samples)) < SMALLEST_SAMPLE:
        return None
    return standard_error(statistic, samples, seed=0)
