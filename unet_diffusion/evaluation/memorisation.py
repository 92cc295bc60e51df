"""Scores that show whether generated images are copies of training images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.evaluation.generation_metrics import SMALLEST_SAMPLE, nearest_neighbours, standard_error
from unet_diffusion.images.figures import array_images, grid

LEVEL = 0.05  # share of the held-out images whose distances count as near


@dataclass(frozen=True)
class Memorisation:
    """How near generated images are to training images, pixel by pixel.

    Distances are root mean square differences of pixels; images in [-1, 1] are at most 2 apart. Held-out images set the
    scale: of new images drawn from the data, 5 % would be nearer than the nearest 5 % of the held-out ones. A generator
    that memorised has far more near images, but so has one whose images are too smooth; the pairs show which it is (as
    in figure 10 of Ho et al. 2020).

    Attributes:
        generated: the median over generated images of the distance to the nearest training image.
        held_out: the same for held-out images; None if there are none.
        near: share of generated images that are nearer to a training image than 95 % of the held-out images are; None
            if there are none.
        generated_count: generated images.
        held_out_count: held-out images.
        training_count: training images that were compared.
        generated_error: standard error of `generated`; None for fewer than 64 images, as for the other errors.
        held_out_error: standard error of `held_out`.
        near_error: standard error of `near`.
        flag: a sentence that says why the scores should be read with care, or "".
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
        text = f"nearest of {self.training_count} training images: root mean square difference {ours}"
        if self.held_out is None or self.near is None:
            text += f" (median of {self.generated_count} generated images; none were held out to compare with)"
        else:
            error = "" if self.near_error is None else f" +- {self.near_error:.1%}"
            text += (
                f" for {self.generated_count} generated and {with_error(self.held_out, self.held_out_error)} for "
                f"{self.held_out_count} held-out images (medians); {self.near:.1%}{error} of the generated ones are "
                "nearer than 95 % of the held-out ones"
            )
        return f"{text}\n{self.flag}" if self.flag else text


def with_error(value: float, error: float | None) -> str:
    """Returns three digits of a score, and two of its standard error."""
    return f"{value:.3g}" if error is None else f"{value:.3g} +- {error:.2g}"


def memorisation(
    generated: Tensor, training: Tensor, held_out: Tensor | None = None, pairs: int = 16
) -> tuple[Memorisation, Image.Image]:
    """Returns the scores, and a grid of the generated images nearest to a training image, each beside that image.

    Args:
        generated: images in [-1, 1], (M, C, H, W).
        training: images trained on, of the same kind, (N, C, H, W).
        held_out: images not trained on, of the same kind, (K, C, H, W).
        pairs: number of pairs in the grid.

    Raises:
        ValueError: images of different sizes or channels.
    """
    nearest = nearest_neighbours(generated.flatten(1), training.flatten(1))
    pixels = generated[0].numel() ** 0.5
    distances = nearest.distances[:, 0] / pixels
    counts = (len(generated), 0 if held_out is None else len(held_out), len(training))
    if held_out is None or not len(held_out):
        scores = Memorisation(_median(distances), None, None, *counts, _error(_median, distances))
    else:
        controls = nearest_neighbours(held_out.flatten(1), training.flatten(1)).distances[:, 0] / pixels
        values = (_median(distances), _median(controls), _share_below(distances, controls))
        flag = ""
        if len(controls) < SMALLEST_SAMPLE:
            flag = (
                f"{len(controls)} held-out images are too few to measure how near the nearest 5 % of them are; hold "
                f"out {SMALLEST_SAMPLE} or more."
            )
        errors = (_error(_median, distances), _error(_median, controls), _error(_share_below, distances, controls))
        scores = Memorisation(*values, *counts, *errors, flag=flag)
    shown = distances.argsort()[:pairs]
    both = torch.stack([generated[shown], training[nearest.indices[shown, 0]]], dim=1).flatten(0, 1)
    images = array_images((both / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    return scores, grid(images, columns=min(8, len(images)))


def _median(distances: Tensor) -> float:
    return distances.median().item()


def _share_below(distances: Tensor, controls: Tensor) -> float:
    """Returns the share of distances that are below those of the nearest 5 % of the controls."""
    return (distances < controls.quantile(LEVEL)).double().mean().item()


def _error(statistic: Callable[..., float], *samples: Tensor) -> float | None:
    """Returns the standard error; None for samples that are too small for one."""
    if min(map(len, samples)) < SMALLEST_SAMPLE:
        return None
    return standard_error(statistic, samples, seed=0)
