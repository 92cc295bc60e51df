"""The table of the comparison, and the figure of the images on which it went worst."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from scripts.reports import markdown_table
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.images.figures import grid
from unet_diffusion.images.palette import outlines, viewable

Row = dict[str, Any]  # of a case.json
SCORES = {  # name in the table and place in the scores of a way
    "AP at 0.5": ("pooled", "object_ap_50"),
    "AP, mean of 0.5 to 0.9": ("pooled", "object_ap_mean"),
    "F1 at 0.5": ("pooled", "object_f1_50"),
    "PQ": ("pooled", "object_panoptic_quality"),
    "count error, summed": ("pooled", "object_count_error"),
    "count error, mean of images": ("per_image", "object_count_error"),
}
COSTS: dict[str, Callable[[Row, Row], float | None]] = {
    "parameters": lambda row, way: row["parameters"],
    "training, CPU s": lambda row, way: row["seconds"],
    "images seen": lambda row, way: row["steps"] * row["batch_size"],
    "CPU s per image": lambda row, way: way["predict_seconds"],
    "to its masks": lambda row, way: way["predict_seconds"] / row["masks_seconds"] if "masks_seconds" in row else None,
}
LINE = (255, 40, 160)  # outlines, a colour of no stain
SCALE = 2  # pixels a side of the figure for one of an image


def summary(rows: Sequence[Row], left_out: Iterable[tuple[str, str, int, str]] = ()) -> str:
    """Tables of scores and costs as Markdown, means over the seeds with least and most, for each set and label count.

    Args:
        rows: finished cases.
        left_out: set, method and number of labels of cases that were not run, with the reason.
    """
    parts = []
    groups = dict.fromkeys([*((row["data"], row["labels"]) for row in rows), *((one[0], one[2]) for one in left_out)])
    for name, count in groups:
        ways: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
        for row in rows:
            if (row["data"], row["labels"]) == (name, count):
                for way, found in row["ways"].items():
                    ways.setdefault((way, str(row["config"])), []).append((row, found))
        scores, costs = [], []
        for (way, _), pairs in ways.items():
            seeds = f" ({len(pairs)} seeds)" if len(pairs) > 1 else ""
            picked = [[found["scores"][place][key] for _, found in pairs] for place, key in SCORES.values()]
            scores.append([way + seeds, *map(shown, picked)])
            spent = [[cost(row, found) for row, found in pairs] for cost in COSTS.values()]
            costs.append([way, *(plain(values) for values in spent)])
        for one in dict.fromkeys(left_out):
            if (one[0], one[2]) == (name, count):
                scores.append([one[1], f"not run: {one[3]}", *[""] * (len(SCORES) - 1)])
        parts += [f"## {name}, {count} labelled images\n", markdown_table(("way", *SCORES), scores)]
        parts += [markdown_table(("way", *COSTS), costs)] if costs else []
    return "\n".join(parts)


def shown(values: Sequence[float | None]) -> str:
    """The mean, with least and most where there are several; empty where a score is undefined."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.3f} to {max(known):.3f})"


def plain(values: Sequence[float | None]) -> str:
    """The mean with three digits, or all digits of a whole number above these; empty where it is undefined."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = statistics.mean(known)
    return f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}"


def worst_images(ways: dict[str, tuple[Sequence[np.ndarray], Sequence[float | None]]], count: int) -> list[int]:
    """Returns the images with the lowest AP at 0.5, by its mean over the ways; images without objects are left out.

    Args:
        ways: of each way its objects and the AP of each image, None where it is undefined.
        count: number of images.
    """
    precision = np.array([values for _, values in ways.values()], dtype=float)  # None becomes NaN
    means = precision.mean(axis=0)
    order = [int(index) for index in np.argsort(means, kind="stable") if not np.isnan(means[index])]
    return order[:count]


def worst_figure(
    dataset: MaskedDataset, ways: dict[str, tuple[Sequence[np.ndarray], Sequence[float | None]]], count: int
) -> Image.Image:
    """A row for each of the worst images: the image, its true outlines, and those of each way with its AP at 0.5."""
    panels = []
    for index in worst_images(ways, count):
        image = dataset[index]["image"].permute(1, 2, 0).numpy()
        true = np.asarray(dataset.cache.instances[dataset.rows[index]])
        panels.append(panel(image, None, f"image {index}"))
        panels.append(panel(image, true, f"true: {len(np.unique(true[true > 0]))}"))
        for way, (found, precision) in ways.items():
            objects = found[index]
            number = len(np.unique(objects[objects > 0]))
            panels.append(panel(image, objects, f"{way}: {number}, AP {precision[index]:.2f}"))
    return grid(panels, columns=len(ways) + 2)


def panel(image: np.ndarray, objects: np.ndarray | None, caption: str) -> Image.Image:
    """An image (H, W, C), stretched to its own percentiles 1 and 99.8, enlarged, with outlines and a caption."""
    low, high = np.percentile(image, (1, 99.8))
    stretched = np.clip((image - low) / max(high - low, 1) * 255, 0, 255).astype(np.uint8)
    pixels = np.asarray(viewable(Image.fromarray(stretched if stretched.shape[2] == 3 else stretched[..., 0])))
    pixels = pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    if objects is not None:  # enlarged first, so that lines are thin
        pixels[outlines(objects.repeat(SCALE, axis=0).repeat(SCALE, axis=1))] = LINE
    height = 16
    shown_image = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    shown_image.paste(Image.fromarray(pixels), (0, height))
    ImageDraw.Draw(shown_image).text((2, 1), caption, fill="black")
    return shown_image
