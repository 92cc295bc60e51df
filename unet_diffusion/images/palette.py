"""Colours of classes: masks as palette images, and masks over images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

# Background black, then ten colours that colour-blind readers can tell apart (Okabe & Ito 2008, extended).
PALETTE = [
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (153, 153, 153),
    (146, 73, 0),
    (182, 219, 255),
]


def colour(label: int) -> tuple[int, int, int]:
    """The colour of a class; beyond the palette's end the colours come again, without the background's black."""
    return PALETTE[label] if label < len(PALETTE) else PALETTE[1 + (label - 1) % (len(PALETTE) - 1)]


def viewable(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB; 16-bit and float ones are stretched from their darkest to their lightest value."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    return image.convert("RGB")


def mask_image(mask: np.ndarray, palette: Sequence[Sequence[int]] | None = None) -> Image.Image:
    """A mask of class indices (H, W) as a palette image; values stay the indices.

    Args:
        mask: values 0 to 255.
        palette: red, green and blue of each class, 0 to 255; None, and classes beyond it: our own.
    """
    given = list(palette or [])
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    image.putpalette(
        [channel for label in range(256) for channel in (given[label] if label < len(given) else colour(label))]
    )
    return image


def overlay(
    image: Image.Image, mask: np.ndarray, opacity: float = 0.5, palette: Sequence[Sequence[int]] | None = None
) -> Image.Image:
    """The classes of a mask (H, W) in colour over an image of the same size; class 0 stays clear."""
    base = np.asarray(viewable(image), dtype=np.float32)
    colours = np.asarray(mask_image(mask, palette).convert("RGB"), dtype=np.float32)
    shown = np.where((mask > 0)[..., None], (1 - opacity) * base + opacity * colours, base)
    return Image.fromarray(shown.round().astype(np.uint8))
