"""The scores of predicted masks over a labelled set, for all images together and for each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.images.labels import IGNORE_INDEX
from unet_diffusion.segmentation.instances import connected_components
from unet_diffusion.segmentation.metrics import (
    SegmentationMetrics,
    adapted_rand_error,
    boundary_f1,
    membrane_components,
    variation_of_information,
)

OVERALL = {"accuracy": "pixel accuracy", "mean_iou": "mean IoU", "mean_dice": "mean Dice"}
OF_A_CLASS = {"iou": "IoU", "dice": "Dice"}
OF_SEGMENTS = {
    "rand_error": "adapted Rand error",
    "splits": "variation of information, splits, bits",
    "merges": "variation of information, merges, bits",
}


@dataclass(frozen=True)
class Scores:
    """How good the masks of a set are; NaN where a score is undefined.

    Attributes:
        num_classes: the background included.
        boundary_tolerance: of the boundary F1, in pixels.
        pooled: the pixels of all images counted together: `accuracy`, `mean_iou`, `mean_dice`, and `iou_k` and
            `dice_k` of each class k.
        per_image: means over the images in which a score is defined: those of `pooled`, `boundary_f1`, and, where
            they were asked for or can be told, `cell_rand_error`, `cell_splits`, `cell_merges` of the cells between
            membranes, and the same with `instance_`.
        images: the scores of each image, named as in `per_image`, and its `row` in the source.
    """

    num_classes: int
    boundary_tolerance: float
    pooled: dict[str, float]
    per_image: dict[str, float]
    images: tuple[dict[str, float], ...]

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """All scores as JSON has them, undefined ones as None; those of a class stand beside its name.

        Args:
            class_names: one each; by default the indices.
        """
        general = [name for name in self.per_image if not name.startswith(tuple(f"{kind}_" for kind in OF_A_CLASS))]
        classes = [
            {
                "name": name,
                "pooled": {kind: self.pooled[f"{kind}_{label}"] for kind in OF_A_CLASS},
                "per_image": {kind: self.per_image[f"{kind}_{label}"] for kind in OF_A_CLASS},
            }
            for label, name in enumerate(class_names or map(str, range(self.num_classes)))
        ]
        return _without_nan(
            {
                "pooled": {name: self.pooled[name] for name in OVERALL},
                "per_image": {name: self.per_image[name] for name in general},
                "classes": classes,
                "boundary_tolerance": self.boundary_tolerance,
                "images": self.images,
            }
        )

    def to_table(self, class_names: Sequence[str] | None = None) -> str:
        """The scores of the set as a Markdown table; arguments as for `to_dict`."""
        labels = dict(OVERALL)
        for kind, shown in OF_A_CLASS.items():
            for label, name in enumerate(class_names or map(str, range(self.num_classes))):
                labels[f"{kind}_{label}"] = f"{shown} of {name}"
        labels["boundary_f1"] = f"boundary F1, within {self.boundary_tolerance:g} pixels"
        for segments in ("cell", "instance"):
            labels |= {f"{segments}_{kind}": f"{shown}, {segments}s" for kind, shown in OF_SEGMENTS.items()}
        lines = [
            f"| {label} | {_shown(self.pooled, name)} | {_shown(self.per_image, name)} |"
            for name, label in labels.items()
            if name in self.per_image
        ]
        return "\n".join(["| score | pooled | mean over images |", "| --- | --- | --- |", *lines])


def score_masks(
    predict: Callable[[Tensor], Tensor],
    dataset: MaskedDataset,
    *,
    boundary_tolerance: float = 2.0,
    membrane: int | None = None,
) -> Scores:
    """Predicts and scores every image of a set, one after the other.

    Where the set has instance maps, its instances are compared with the connected components of all that is predicted
    to be another class than 0.

    Args:
        predict: gives the mask, int64 (H, W) on the CPU, of a stored image (C, H, W).
        dataset: images with masks, which come whole and are not separated where instances touch.
        boundary_tolerance: of the boundary F1, in pixels.
        membrane: the class of the membrane between cells, to compare the cells too: connected components of all other
            classes, the predicted membrane being given to the nearest cell (`membrane_components`). Ignored pixels
            count as membrane of the true mask, so that they are left out.

    Raises:
        ValueError: a membrane that is no class, a negative tolerance, or masks of another size or with other classes.
    """
    if membrane is not None and not 0 <= membrane < dataset.num_classes:
        raise ValueError(f"membrane is {membrane}, but the classes are 0..{dataset.num_classes - 1}.")
    if not boundary_tolerance >= 0:
        raise ValueError(f"boundary_tolerance is {boundary_tolerance}, but must be 0 pixels or more.")
    metrics = SegmentationMetrics(dataset.num_classes)
    images = []
    for index, row in enumerate(dataset.rows):
        item = dataset[index]
        found, mask = predict(item["image"]), item["mask"]
        one = SegmentationMetrics(dataset.num_classes)
        one.update(found[None], mask[None])
        metrics.confusion += one.confusion
        metrics.image_sums += one.image_sums
        scores = {"row": int(dataset.cache.rows[row]), **_named(one.compute(), "pooled/")}

        predicted, true = found.numpy(), mask.numpy()
        known = true != IGNORE_INDEX
        scores["boundary_f1"] = boundary_f1(predicted, true, boundary_tolerance)
        if membrane is not None:
            cells = membrane_components((true == membrane) | ~known, fill=False)
            scores |= _of_segments("cell", membrane_components(predicted == membrane, fill=True), cells)
        if dataset.cache.has_instances:
            instances = np.where(known, dataset.cache.instances[row], 0)
            scores |= _of_segments("instance", connected_components(predicted != 0), instances)
        images.append(scores)

    computed = metrics.compute()
    others = [name for name in images[0] if name not in ("row", *_named(computed, "per_image/"))]
    means = {name: _mean([scores[name] for scores in images]) for name in others}
    return Scores(
        num_classes=dataset.num_classes,
        boundary_tolerance=boundary_tolerance,
        pooled=_named(computed, "pooled/"),
        per_image={**_named(computed, "per_image/"), **means},
        images=tuple(images),
    )


def _of_segments(kind: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Adapted Rand error and variation of information of labels (H, W); 0 in the true ones is left out."""
    values = (adapted_rand_error(predicted, true), *variation_of_information(predicted, true))
    return {f"{kind}_{name}": value for name, value in zip(OF_SEGMENTS, values)}


def _named(scores: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    """The mean of those that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _shown(scores: Mapping[str, float], name: str) -> str:
    value = scores.get(name, math.nan)
    return "" if math.isnan(value) else f"{value:.4f}"


def _without_nan(value: Any) -> Any:
    """A value of JSON in which NaN, which JSON does not know, is None."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
