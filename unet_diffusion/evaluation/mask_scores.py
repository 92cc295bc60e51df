"""Scores of predicted masks over a labelled set, for all images together and for each image."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from unet_diffusion.checks import is_number, require
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.sets import load_labelled
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.segmentation.instance_maps import objects_of_mask
from unet_diffusion.segmentation.instances import connected_components
from unet_diffusion.segmentation.matching import THRESHOLDS, Matches, add_matches, match_objects
from unet_diffusion.segmentation.metrics import (
    SegmentationMetrics,
    adapted_rand_error,
    boundary_f1,
    membrane_components,
    variation_of_information,
)
from unet_diffusion.segmentation.objects import find_objects, one_hot

OVERALL = {"accuracy": "pixel accuracy", "mean_iou": "mean IoU", "mean_dice": "mean Dice"}
OF_A_CLASS = {"iou": "IoU", "dice": "Dice"}
OF_OBJECTS = {
    **{f"ap_{threshold}": f"AP of objects at IoU 0.{threshold // 10}" for threshold in THRESHOLDS},
    **{
        f"{kind}_{threshold}": f"{shown} of objects, {where}"
        for threshold, where in ((50, "at IoU 0.5"), ("mean", "mean over IoU 0.5 to 0.9"))
        for kind, shown in (("ap", "AP"), ("f1", "F1"), ("precision", "precision"), ("recall", "recall"))
        if (kind, threshold) != ("ap", 50)
    },
    "panoptic_quality": "panoptic quality of objects",
    "count_error": "error of the number of objects",
}
OF_SEGMENTS = {
    "rand_error": "adapted Rand error",
    "splits": "variation of information, splits, bits",
    "merges": "variation of information, merges, bits",
}


@dataclass(frozen=True)
class Scores:
    """The scores of the masks of a set; NaN where a score is undefined.

    Attributes:
        num_classes: the number of classes, background included.
        boundary_tolerance: of the boundary F1, in pixels.
        pooled: scores over the pixels of all images together: `accuracy`, `mean_iou`, `mean_dice`, and `iou_k` and
            `dice_k` of each class k.
        per_image: means over the images in which a score is defined: those of `pooled`, and `boundary_f1`. If a
            membrane was given, also `cell_rand_error`, `cell_splits` and `cell_merges` of the cells between membranes.
            If the set has instance maps, also the same with `instance_`; then `pooled` and `per_image` both also have
            the scores of objects, `object_ap_50`, ... (`Matches.scores`).
        images: the scores of each image, named as in `per_image`, and its `row` in the source.
    """

    num_classes: int
    boundary_tolerance: float
    pooled: dict[str, float]
    per_image: dict[str, float]
    images: tuple[dict[str, float], ...]

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Returns all scores as JSON values, with None for undefined ones; by default classes are named by index."""
        general = [name for name in self.per_image if not name.startswith(tuple(f"{kind}_" for kind in OF_A_CLASS))]
        objects = [name for name in self.pooled if name.startswith("object_")]
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
                "pooled": {name: self.pooled[name] for name in (*OVERALL, *objects)},
                "per_image": {name: self.per_image[name] for name in general},
                "classes": classes,
                "boundary_tolerance": self.boundary_tolerance,
                "images": self.images,
            }
        )

    def to_table(self, class_names: Sequence[str] | None = None) -> str:
        """Returns the scores of the set as a Markdown table, with the names of classes as in `to_dict`."""
        labels = dict(OVERALL)
        for kind, shown in OF_A_CLASS.items():
            for label, name in enumerate(class_names or map(str, range(self.num_classes))):
                labels[f"{kind}_{label}"] = f"{shown} of {name}"
        labels["boundary_f1"] = f"boundary F1, within {self.boundary_tolerance:g} pixels"
        for segments in ("cell", "instance"):
            labels |= {f"{segments}_{kind}": f"{shown}, {segments}s" for kind, shown in OF_SEGMENTS.items()}
        labels |= {f"object_{kind}": shown for kind, shown in OF_OBJECTS.items()}
        lines = [
            f"| {label} | {_cell(self.pooled, name)} | {_cell(self.per_image, name)} |"
            for name, label in labels.items()
            if name in self.per_image
        ]
        return "\n".join(["| score | pooled | mean over images |", "| --- | --- | --- |", *lines])


def labelled_for(
    pipe: SegmentationPipeline, options: MaskedOptions, mask_encoding: dict[str, Any] | None = None
) -> MaskedDataset:
    """Opens a labelled set with the classes, the channels, the range of values and the colours of a pipeline.

    Unless the options state channels or axes, images are read and converted like those that the pipeline segments
    (`pipe.preparation`). `mask_encoding` is the encoding of masks that the pipeline's run recorded, if it is known.
    Raises the errors of `load_labelled`.
    """
    return load_labelled(
        options.converted_like(pipe.preparation),
        num_classes=pipe.num_classes,
        channels=pipe.unet.config.in_channels,
        pixel_range=pipe.pixel_range,
        palette=pipe.palette,
        class_names=pipe.class_names,
        saved=None if mask_encoding is None else MaskEncoding.from_dict(mask_encoding),
    )


def score_masks(
    predict: Callable[[Tensor], Tensor | tuple[Tensor, np.ndarray]],
    dataset: MaskedDataset,
    *,
    boundary_tolerance: float = 2.0,
    membrane: int | None = None,
) -> Scores:
    """Predicts and scores every image of a set, one after the other.

    If the set has instance maps, its instances are compared with the predicted objects, whatever their class: by the
    number of matches (`match_objects`), and by Rand error and variation of information. If `predict` returns no
    objects, the latter two use the connected components of all pixels that are not predicted to be class 0.

    Args:
        predict: returns the mask, int64 (H, W) on the CPU, of a stored image (C, H, W); or the mask and its objects,
            integer (H, W). If it returns no objects, they are found in the mask (`find_objects`).
        dataset: whole images with masks, in which touching instances are not separated.
        boundary_tolerance: of the boundary F1, in pixels.
        membrane: the class of the membrane between cells, to compare the cells too: connected components of all other
            classes, after each pixel of predicted membrane is assigned to the nearest cell (`membrane_components`).
            Ignored pixels count as membrane of the true mask, so that they are left out.

    Raises:
        ValueError: the membrane is not a class, the tolerance is negative, or masks have another size or other classes.
    """
    valid = membrane is None or 0 <= membrane < dataset.num_classes
    require(valid, "membrane", membrane, f"the classes are 0..{dataset.num_classes - 1}")
    valid = is_number(boundary_tolerance) and boundary_tolerance >= 0
    require(valid, "boundary_tolerance", boundary_tolerance, "must be a number of pixels, at least 0")
    metrics = SegmentationMetrics(dataset.num_classes)
    images, matches = [], []
    for index, row in enumerate(dataset.rows):
        item = dataset[index]
        predicted_parts, mask = predict(item["image"]), item["mask"]
        prediction, objects = predicted_parts if isinstance(predicted_parts, tuple) else (predicted_parts, None)
        one = SegmentationMetrics(dataset.num_classes)
        one.update(prediction[None], mask[None])
        metrics.confusion += one.confusion
        metrics.image_sums += one.image_sums
        scores = {"row": int(dataset.cache.rows[row]), **_named(one.compute(), "pooled/")}

        predicted, true = prediction.numpy(), mask.numpy()
        known = true != IGNORE_INDEX
        scores["boundary_f1"] = boundary_f1(predicted, true, boundary_tolerance)
        if membrane is not None:
            cells = membrane_components((true == membrane) | ~known, fill=False)
            scores |= _of_segments("cell", membrane_components(predicted == membrane, fill=True), cells)
        if dataset.cache.has_instances:
            instances = objects_of_mask(true, dataset.cache.instances[row])
            parts = connected_components(predicted != 0) if objects is None else objects
            scores |= _of_segments("instance", parts, instances)
            if objects is None:
                objects = find_objects(one_hot(predicted, dataset.num_classes))
            matches.append(match_objects(known_objects(objects, known), instances))
            scores |= _of_objects(matches[-1])
        images.append(scores)

    computed = metrics.compute()
    others = [name for name in images[0] if name not in ("row", *_named(computed, "per_image/"))]
    means = {name: _mean([scores[name] for scores in images]) for name in others}
    return Scores(
        num_classes=dataset.num_classes,
        boundary_tolerance=boundary_tolerance,
        pooled=_named(computed, "pooled/") | (_of_objects(add_matches(matches)) if matches else {}),
        per_image={**_named(computed, "per_image/"), **means},
        images=tuple(images),
    )


def known_objects(objects: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Leaves out ignored pixels (where `known` is False), and whole objects (H, W) that lie mostly in these.

    Otherwise the rim of an object that nobody has judged would count as an object of its own.
    """
    sizes = np.bincount(objects.ravel())
    inside = np.bincount(objects[known], minlength=len(sizes))
    return np.where(known & (2 * inside >= sizes)[objects], objects, 0)


def _of_segments(kind: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Returns the adapted Rand error and variation of information of labels (H, W), leaving out true label 0."""
    values = (adapted_rand_error(predicted, true), *variation_of_information(predicted, true))
    return {f"{kind}_{name}": value for name, value in zip(OF_SEGMENTS, values)}


def _of_objects(matches: Matches) -> dict[str, float]:
    """Returns the scores of objects under their names among all scores."""
    return {f"object_{name}": value for name, value in matches.scores().items()}


def _named(scores: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Returns the scores whose names start with the prefix, under names without it."""
    return {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    """Returns the mean of the defined scores; NaN if none is defined."""
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _cell(scores: Mapping[str, float], name: str) -> str:
    value = scores.get(name, math.nan)
    return "" if math.isnan(value) else f"{value:.4f}"


def _without_nan(value: Any) -> Any:
    """Returns a JSON value with None in place of NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
