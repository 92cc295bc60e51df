"""Whether generated pictures are copies of training pictures."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.figures import array_pictures, grid
from unet_diffusion.generation_metrics import nearest_neighbours

LEVEL = 0.05  # share of the held-out pictures that are nearer than what counts as near


@dataclass(frozen=True)
class Memorisation:
    """How near generated pictures are to training pictures, pixel by pixel.

    Distances are root mean square differences of pixels; pictures in [-1, 1] are at most 2 apart. Held-out pictures are
    the measure of what is near: of pictures that were drawn from the data anew, 5 % would be nearer than the nearest
    5 % of these. A generator that memorised has far more, but so has one whose pictures are too smooth; the pairs show
    which it is (as in figure 10 of Ho et al. 2020).

    Attributes:
        generated: the median over generated pictures of the distance to the nearest training picture.
        held_out: the same of pictures that were held out; None where there are none.
        near: share of generated pictures that are nearer to a training picture than 95 % of the held-out ones; None
            likewise.
        generated_count: generated pictures.
        held_out_count: held-out pictures.
        training_count: training pictures that were looked at.
    """

    generated: float
    held_out: float | None
    near: float | None
    generated_count: int
    held_out_count: int
    training_count: int

    def __str__(self) -> str:
        """One sentence."""
        told = f"nearest of {self.training_count} training pictures: root mean square difference {self.generated:.3g}"
        if self.held_out is None:
            return f"{told} (median of {self.generated_count} generated pictures; none were held out to compare with)"
        return (
            f"{told} for {self.generated_count} generated and {self.held_out:.3g} for {self.held_out_count} held-out "
            f"pictures (medians); {self.near:.1%} of the generated ones are nearer than 95 % of the held-out ones"
        )


def memorisation(
    generated: Tensor, training: Tensor, held_out: Tensor | None = None, pairs: int = 16
) -> tuple[Memorisation, Image.Image]:
    """The figures, and the generated pictures that are nearest to a training picture, each beside that one.

    Args:
        generated: pictures in [-1, 1], (M, C, H, W).
        training: of the same kind, (N, C, H, W).
        held_out: of the same kind, not trained on, (K, C, H, W).
        pairs: pictures that are shown.

    Raises:
        ValueError: pictures of different sizes or channels.
    """
    nearest = nearest_neighbours(generated.flatten(1), training.flatten(1))
    pixels = generated[0].numel() ** 0.5
    distances, fresh, near = nearest.distances[:, 0] / pixels, None, None
    if held_out is not None and len(held_out):
        controls = nearest_neighbours(held_out.flatten(1), training.flatten(1)).distances[:, 0] / pixels
        fresh = controls.median().item()
        near = (distances < controls.quantile(LEVEL)).double().mean().item()
    shown = distances.argsort()[:pairs]
    both = torch.stack([generated[shown], training[nearest.indices[shown, 0]]], dim=1).flatten(0, 1)
    pictures = array_pictures((both / 2 + 0.5).permute(0, 2, 3, 1).numpy())
    kept = 0 if held_out is None else len(held_out)
    figures = Memorisation(distances.median().item(), fresh, near, len(generated), kept, len(training))
    return figures, grid(pictures, columns=min(8, len(pictures)))
