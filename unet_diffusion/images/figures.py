"""Images to look at: grids of samples and curves of a run, written as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.files import written_aside
from unet_diffusion.images.conversion import stored_image
from unet_diffusion.images.palette import viewable
from unet_diffusion.training.metrics_log import series


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Lays out images of one size in rows.

    Args:
        images: PIL images; they are shown as RGB.
        columns: images per row; None makes the grid about square.
        gap: white pixels between images.
        scale: side in pixels of the square that each pixel becomes.
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = (side * scale for side in images[0].size)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        place = (gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap))
        sheet.paste(viewable(image).resize((width, height), Image.Resampling.NEAREST), place)
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG aside and renames it."""
    with written_aside(path) as aside:
        image.save(aside, optimize=True)


def save_stored(image: Tensor, path: Path) -> None:
    """Writes stored values (C, H, W) aside and renames them: as PNG if the suffix says so, else as array (H, W, C)."""
    if path.suffix == ".png":
        save_image(stored_image(image), path)
    else:
        with written_aside(path) as aside:
            np.save(aside, image.permute(1, 2, 0).cpu().numpy())


def save_curves(rows: list[dict[str, Any]], path: Path, panels: Mapping[str, Sequence[str]]) -> None:
    """Plots quantities of a `metrics.jsonl` against the step, losses on a logarithmic axis.

    Args:
        rows: its lines.
        path: the PNG to write.
        panels: for each panel its title and the quantities drawn in it; quantities that were not logged are left out.
    """
    from matplotlib.figure import Figure  # here, since it takes a tenth of the time that the package takes to import
    from matplotlib.ticker import LogFormatter

    panels = {title: [name for name in names if series(rows, name)[0]] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.2), layout="constrained")
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        if all(name.endswith("loss") for name in names):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # plain text: the parser of mathematical text keeps its last
            axes.yaxis.set_minor_formatter(LogFormatter())  # errors, and with them all that its callers held
        for name in names:
            steps, values = series(rows, name)
            axes.plot(steps, values, label=name.replace("_", " "), marker="." if len(steps) < 40 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)


def array_images(images: np.ndarray) -> list[Image.Image]:
    """Converts images (B, H, W, C) in [0, 1] to PIL images: the first three of more channels, the first of two."""
    eight_bit = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0]) for image in eight_bit]
