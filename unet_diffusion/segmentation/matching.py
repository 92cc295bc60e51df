"""How well predicted objects match true ones: average precision, F1, panoptic quality, and the error of the count."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from unet_diffusion.segmentation.instances import check_instances

THRESHOLDS = (50, 60, 70, 80, 90)  # of the IoU of a match, in percent


@dataclass(frozen=True)
class Matches:
    """Counts over one image or several, from which scores follow.

    Attributes:
        hits: number of matches at each of `THRESHOLDS`. A match is a pair of a predicted and a true object whose IoU
            reaches the threshold; each object is in at most one pair.
        overlap: sum of the IoU of the matches at 0.5.
        predicted: number of predicted objects.
        true: number of true objects.
        miscounted: sum over images of the difference between these two.
    """

    hits: tuple[int, ...]
    overlap: float
    predicted: int
    true: int
    miscounted: int

    def scores(self) -> dict[str, float]:
        """Returns the scores, NaN where they are undefined.

        `ap_50`, ... `ap_90` is TP / (TP + FP + FN) at an IoU of 0.5, ... 0.9, which the Data Science Bowl 2018 and
        StarDist (Schmidt et al. 2018) call average precision. `precision`, `recall` and `f1` are named in the same way,
        and `_mean` is the mean over the thresholds. `panoptic_quality` is that of Kirillov et al. 2019, eq. 1, at 0.5.
        `count_error` is `miscounted` divided by the number of true objects.
        """
        hits = np.array(self.hits, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            of_kind = {
                "ap": hits / (self.predicted + self.true - hits),
                "f1": 2 * hits / (self.predicted + self.true),
                "precision": hits / self.predicted,
                "recall": hits / self.true,
            }
            others = {
                "panoptic_quality": np.divide(2 * self.overlap, self.predicted + self.true),
                "count_error": np.divide(self.miscounted, self.true) if self.true else np.nan,
            }
        named = {
            f"{kind}_{threshold}": float(value)
            for kind, values in of_kind.items()
            for threshold, value in zip((*THRESHOLDS, "mean"), (*values, values.mean()))
        }
        return named | {name: float(value) for name, value in others.items()}


def match_objects(predicted: np.ndarray, true: np.ndarray) -> Matches:
    """Matches the objects of two maps (H, W) of integers, 0 for the background.

    Raises:
        ValueError: the shapes differ, or a map is not of integers from 0 up.
    """
    for labels in (predicted, true):
        check_instances(labels)
    if predicted.shape != true.shape:
        raise ValueError(f"predicted has shape {predicted.shape} and true {true.shape}, but both must be alike.")
    found, sizes = np.unique(predicted[predicted > 0], return_counts=True)
    wanted, true_sizes = np.unique(true[true > 0], return_counts=True)
    both = (predicted > 0) & (true > 0)
    one, other = np.searchsorted(found, predicted[both]), np.searchsorted(wanted, true[both])
    pairs, shared = np.unique(one.astype(np.int64) * max(len(wanted), 1) + other, return_counts=True)
    one, other = np.divmod(pairs, max(len(wanted), 1))
    united = sizes[one] + true_sizes[other] - shared
    hits = tuple(_count(one, other, 100 * shared >= threshold * united) for threshold in THRESHOLDS)
    above = 2 * shared > united
    overlap = float((shared / united)[above].sum()) + 0.5 * (hits[0] - int(above.sum()))
    return Matches(hits, overlap, len(found), len(wanted), abs(len(found) - len(wanted)))


def add_matches(matches: Iterable[Matches]) -> Matches:
    """Adds up the counts of several images."""
    each = list(matches)
    hits = tuple(int(count) for count in np.sum([one.hits for one in each], axis=0))
    return Matches(
        hits,
        sum(one.overlap for one in each),
        sum(one.predicted for one in each),
        sum(one.true for one in each),
        sum(one.miscounted for one in each),
    )


def _count(one: np.ndarray, other: np.ndarray, reached: np.ndarray) -> int:
    """Returns the largest number of these pairs in which no object occurs twice.

    At an IoU above 0.5 no object occurs twice; at exactly 0.5, an object may equal two others together.
    """
    one, other = one[reached], other[reached]
    if len(np.unique(one)) == len(one) and len(np.unique(other)) == len(other):
        return len(one)
    graph = csr_array((np.ones(len(one)), (one, other)))
    return int((maximum_bipartite_matching(graph) >= 0).sum())
