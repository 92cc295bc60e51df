"""Pictures to look at: grids of samples, curves of a run, masks over pictures; all written as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from unet_diffusion.atomic import written_aside
from unet_diffusion.metrics_log import series

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


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Lays pictures of one size out in rows.

    Args:
        pictures: PIL images; shown as RGB.
        columns: pictures in a row; None makes the grid about square.
        gap: white pixels between them.
        scale: how many pixels a side each pixel becomes.
    """
    columns = columns or int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    width, height = (side * scale for side in pictures[0].size)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        place = (gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap))
        sheet.paste(viewable(picture).resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def viewable(picture: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB; 16-bit and float ones are stretched from their darkest to their lightest value."""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float64)
        low, high = values.min(), values.max()
        picture = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    return picture.convert("RGB")


def mask_picture(mask: np.ndarray) -> Image.Image:
    """A mask of class indices (H, W) as a palette image; values stay the indices."""
    picture = Image.fromarray(mask.astype(np.uint8), mode="P")
    picture.putpalette([channel for label in range(256) for channel in colour(label)])
    return picture


def overlay(picture: Image.Image, mask: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """The classes of a mask (H, W) in colour over a picture of the same size; class 0 stays clear."""
    base = np.asarray(viewable(picture), dtype=np.float64)
    colours = np.asarray(mask_picture(mask).convert("RGB"), dtype=np.float64)
    shown = np.where((mask > 0)[..., None], (1 - opacity) * base + opacity * colours, base)
    return Image.fromarray(shown.round().astype(np.uint8))


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG aside and renames it."""
    with written_aside(path) as aside:
        picture.save(aside, optimize=True)


def save_curves(rows: list[dict[str, Any]], path: Path, panels: Mapping[str, Sequence[str]]) -> None:
    """Plots quantities of a `metrics.jsonl` against the step.

    Args:
        rows: its lines.
        path: the PNG to write.
        panels: for each panel its title and the quantities drawn in it; quantities that were not logged are left out.
    """
    panels = {title: [name for name in names if series(rows, name)[0]] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.2), layout="constrained")
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for name in names:
            steps, values = series(rows, name)
            axes.plot(steps, values, label=name.replace("_", " "), marker="." if len(steps) < 40 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)


def array_pictures(images: np.ndarray) -> list[Image.Image]:
    """Pictures (B, H, W, C) in [0, 1] as PIL images; of more channels than RGB the first three, of two the first."""
    eight_bit = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0]) for image in eight_bit]
