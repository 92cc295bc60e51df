"""Scores of masks: accuracy, Dice and IoU over pixels, boundary F1, and the scores of instance maps."""

from collections.abc import Callable

import numpy as np
import skimage.metrics
import torch
from scipy import ndimage
from skimage.segmentation import expand_labels, find_boundaries
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.segmentation.instances import connected_components
from unet_diffusion.segmentation.losses import check_labels


class SegmentationMetrics:
    """Pixel accuracy, IoU and Dice, pooled over all pixels and as means over images.

    torchmetrics computes the confusion matrix. Its scores are not used, since they give 0 to a class that occurs
    neither in the masks nor in the predictions. Here the score of such a class is NaN and is left out of the means.

    Attributes:
        confusion: int64 (K, K), pixels by class of the mask (rows) and of the prediction (columns).
        image_sums: float64 (2, 3 + 2 K): for each score, the sum over images where it is defined, and their number.
            Columns: accuracy, mean IoU, mean Dice, IoU per class, Dice per class.

    Both are sums, so they can be added over processes (`sum_over_processes`).
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.image_sums = torch.zeros(2, 3 + 2 * num_classes, dtype=torch.float64)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Adds images.

        Args:
            predicted: class indices (B, H, W).
            masks: class indices or `ignore_index` (B, H, W).

        Raises:
            ValueError: the shapes differ, or a class index is out of range.
        """
        if predicted.shape != masks.shape or masks.ndim != 3:
            raise ValueError(
                f"predicted has shape {tuple(predicted.shape)} and masks {tuple(masks.shape)}, "
                f"but both must be the same (B, H, W)."
            )
        check_labels("predicted", predicted, self.num_classes)
        check_labels("masks", masks[masks != self.ignore_index], self.num_classes)
        for image, mask in zip(predicted, masks):
            confusion = multiclass_confusion_matrix(
                image, mask, num_classes=self.num_classes, ignore_index=self.ignore_index, validate_args=False
            ).cpu()
            self.confusion += confusion
            scores = self._scores(confusion)
            self.image_sums += torch.stack([scores.nan_to_num(), (~scores.isnan()).double()])

    def sum_over_processes(self, sum_tensor: Callable[[Tensor], Tensor]) -> None:
        """Replaces the state by its sum over all processes; each image must have been seen by one process only.

        Args:
            sum_tensor: returns the sum of a tensor on the CPU over processes.
        """
        self.confusion = sum_tensor(self.confusion)
        self.image_sums = sum_tensor(self.image_sums)

    def compute(self) -> dict[str, float]:
        """Returns the scores, in [0, 1], or NaN where undefined.

        `pooled/...` counts the pixels of all images together. `per_image/...` is the mean over the images for which the
        score is defined: `mean_iou` first averages over the classes that occur in the image, and `iou_2` is over the
        images in which class 2 occurs (in mask or prediction).

        Returns:
            For each prefix `accuracy`, `mean_iou`, `mean_dice`, and `iou_k` and `dice_k` for each class k.
        """
        classes = range(self.num_classes)
        names = ["accuracy", "mean_iou", "mean_dice", *(f"iou_{k}" for k in classes), *(f"dice_{k}" for k in classes)]
        sums, counts = self.image_sums
        pooled, per_image = self._scores(self.confusion).tolist(), (sums / counts).tolist()
        return {f"pooled/{name}": value for name, value in zip(names, pooled)} | {
            f"per_image/{name}": value for name, value in zip(names, per_image)
        }

    @staticmethod
    def _scores(confusion: Tensor) -> Tensor:
        """Scores float64 (3 + 2 K,) of a confusion matrix, in the columns of `image_sums`; 0 / 0 is NaN."""
        confusion = confusion.double()
        hits = confusion.diagonal()
        sizes = confusion.sum(dim=0) + confusion.sum(dim=1)  # predicted plus true pixels of each class
        iou, dice = hits / (sizes - hits), 2 * hits / sizes
        means = torch.stack([hits.sum() / confusion.sum(), iou.nanmean(), dice.nanmean()])
        return torch.cat([means, iou, dice])


def boundary_f1(predicted: np.ndarray, mask: np.ndarray, tolerance: float = 2.0) -> float:
    """Boundary F1 (Csurka et al. 2013), the mean over the classes that have a boundary in the mask or the prediction.

    Precision is the share of predicted boundary pixels with a true one within `tolerance`. Recall is the share of true
    boundary pixels with a predicted one. Boundary pixels are those on both sides of an edge. Nothing is counted within
    the tolerance of ignored pixels, since the true boundary is unknown there.

    Args:
        predicted: class indices (H, W).
        mask: class indices or 255 = ignored (H, W).
        tolerance: distance in pixels.

    Returns:
        A score in [0, 1]; NaN if neither has a boundary.
    """
    known = mask != IGNORE_INDEX
    # a boundary pixel looks one pixel beyond itself; distance_transform_edt is undefined on a map without zeros
    counted = known if known.all() else ndimage.distance_transform_edt(known) > tolerance + 1
    scores = []
    for label in np.union1d(predicted[known], mask[known]):
        true = find_boundaries((mask == label) & known)
        found = find_boundaries((predicted == label) & known)
        hits = _near(true, tolerance) & found & counted
        recalled = _near(found, tolerance) & true & counted
        found, true = found & counted, true & counted
        if found.any() or true.any():
            precision, recall = (part.sum() / max(whole.sum(), 1) for part, whole in ((hits, found), (recalled, true)))
            scores.append(2 * precision * recall / max(precision + recall, 1e-12))
    return float(np.mean(scores)) if scores else float("nan")


def _near(boundary: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns which pixels (H, W) have a pixel of `boundary` within the tolerance."""
    if not boundary.any():
        return np.zeros_like(boundary)
    return ndimage.distance_transform_edt(~boundary) <= tolerance


def membrane_components(membrane: np.ndarray, fill: bool) -> np.ndarray:
    """Labels cells, the connected components of a bool map (H, W) that are not membrane: int32 (H, W), 1..n.

    With `fill`, membrane pixels go to the nearest cell, so that the width of a predicted membrane does not count (the
    border thinning of Arganda-Carreras et al. 2015). The truth is not filled, since scores leave out its membrane, 0.
    """
    cells = connected_components(~membrane)
    return expand_labels(cells, distance=max(cells.shape) * 2) if fill else cells


def adapted_rand_error(predicted: np.ndarray, instances: np.ndarray) -> float:
    """1 - F1 over pairs of pixels in the same instance (Arganda-Carreras et al. 2015), through scikit-image.

    Args:
        predicted: integer labels (H, W); every value, including 0, is a segment.
        instances: true labels (H, W); pixels of value 0 are left out.

    Returns:
        An error in [0, 1], 0 for equal partitions; NaN if there is no true instance or no pair of pixels.
    """
    if not instances.any():
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):  # instances of single pixels make no pair
        return float(skimage.metrics.adapted_rand_error(instances, predicted)[0])


def variation_of_information(predicted: np.ndarray, instances: np.ndarray) -> tuple[float, float]:
    """The two parts of the variation of information (Meila 2007), which add up to it, in bits, through scikit-image.

    Args:
        predicted: integer labels (H, W); every value, including 0, is a segment.
        instances: true labels (H, W); pixels of value 0 are left out.

    Returns:
        (splits, merges): H(predicted | true) and H(true | predicted), at least 0; NaN if there is no true instance.
    """
    if not instances.any():
        return float("nan"), float("nan")
    splits, merges = skimage.metrics.variation_of_information(instances, predicted, ignore_labels=(0,))
    return float(splits), float(merges)
