"""Colours of classes: masks drawn as palette images, and masks drawn over images."""

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
    """Returns the colour of a class; after the last one the colours repeat, without the background's black."""
    return PALETTE[label] if label < len(PALETTE) else PALETTE[1 + (label - 1) % (len(PALETTE) - 1)]


def viewable(image: Image.Image) -> Image.Image:
    """Converts any PIL image to 8-bit RGB; 16-bit and float images are stretched from darkest to lightest value."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    return image.convert("RGB")


def mask_image(mask: np.ndarray, palette: Sequence[Sequence[int]] | None = None) -> Image.Image:
    """Converts a mask of class indices (H, W) to a palette image; its values are still the indices.

    Args:
        mask: values 0 to 255.
        palette: red, green and blue of each class, 0 to 255; classes without an entry get the colours of `colour`.
    """
    given = list(palette or [])
    image = Image.fromarray(mask.astype(np.uint8), mode="P")
    image.putpalette(
        [channel for label in range(256) for channel in (given[label] if label < len(given) else colour(label))]
    )
    return image


def overlay(
    image: Image.Image,
    mask: np.ndarray,
    opacity: float = 0.5,
    palette: Sequence[Sequence[int]] | None = None,
    objects: np.ndarray | None = None,
) -> Image.Image:
    """Draws the classes of a mask (H, W) in colour over an image of the same size; class 0 stays transparent.

    The outlines of `objects`, numbers (H, W), 0 for the background, are drawn without any transparency, in the colour
    of the class that most of the object's pixels have in the mask.
    """
    base = np.asarray(viewable(image), dtype=np.float32)
    strength = np.where(mask > 0, opacity, 0.0)
    if objects is not None:
        lines = outlines(objects)
        mask, strength = np.where(lines, _main_classes(objects, mask)[objects], mask), np.where(lines, 1.0, strength)
    colours = np.asarray(mask_image(mask, palette).convert("RGB"), dtype=np.float32)
    shown = (1 - strength[..., None]) * base + strength[..., None] * colours
    return Image.fromarray(shown.round().astype(np.uint8))


def _main_classes(objects: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns, for objects 0..n, the class that most of their pixels have in a mask; 1 if all of them have class 0."""
    known = (objects > 0) & (mask > 0)
    pairs, counts = np.unique(objects[known].astype(np.int64) * 256 + mask[known], return_counts=True)
    pairs = pairs[np.argsort(counts, kind="stable")]  # the most frequent class of an object is assigned last
    classes = np.ones(int(objects.max()) + 1, dtype=np.uint8)
    classes[pairs // 256] = pairs % 256
    return classes


def outlines(objects: np.ndarray) -> np.ndarray:
    """Returns the pixels of objects (H, W) that touch background or another object at an edge, bool (H, W)."""
    from skimage.segmentation import find_boundaries

    return find_boundaries(objects, mode="inner")
