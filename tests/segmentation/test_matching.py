"""Matches of objects, against a reference that tries every assignment, and against StarDist where it is installed."""

import math
from itertools import permutations

import numpy as np
import pytest

from unet_diffusion.segmentation.matching import THRESHOLDS, add_matches, match_objects


def reference(predicted: np.ndarray, true: np.ndarray, threshold: float) -> tuple[int, float]:
    """The largest number of matches, and the largest sum of their IoU, over all assignments."""
    ones = [predicted == label for label in np.unique(predicted) if label]
    others = [true == label for label in np.unique(true) if label]
    if len(ones) > len(others):
        ones, others = others, ones
    best = (0, 0.0)
    for chosen in permutations(others, len(ones)):
        ious = [(one & other).sum() / (one | other).sum() for one, other in zip(ones, chosen)]
        reached = [iou for iou in ious if iou >= threshold]
        best = max(best, (len(reached), sum(reached)))
    return best


def random_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps of up to five objects on few pixels, so that ties at an IoU of one half are frequent."""
    random = np.random.default_rng(seed)
    true = np.repeat(random.integers(0, 5, 10), 2)[None] * np.ones((2, 1), dtype=int)
    predicted = true.copy()
    predicted[random.random(true.shape) < 0.25] = random.integers(0, 6)
    predicted[true == random.integers(1, 5)] = random.integers(0, 6)
    return predicted, true


@pytest.mark.parametrize("seed", range(20))
def test_matches_are_those_of_the_best_assignment(seed):
    predicted, true = random_pair(seed)
    found = match_objects(predicted, true)
    for threshold, hits in zip(THRESHOLDS, found.hits):
        assert hits == reference(predicted, true, threshold / 100)[0]
    assert found.overlap == pytest.approx(reference(predicted, true, 0.5)[1])
    assert (found.predicted, found.true) == tuple(len(set(np.unique(each)) - {0}) for each in (predicted, true))


def test_matches_are_those_of_stardist():
    matching = pytest.importorskip("stardist.matching", reason="StarDist is not installed").matching
    for seed in range(20):
        predicted, true = random_pair(seed)
        scores = match_objects(predicted, true).scores()
        for threshold in THRESHOLDS:
            theirs = matching(true, predicted, thresh=threshold / 100)
            assert scores[f"ap_{threshold}"] == pytest.approx(theirs.accuracy)
            assert scores[f"f1_{threshold}"] == pytest.approx(theirs.f1)
        theirs = matching(true, predicted, thresh=0.5)
        assert scores["panoptic_quality"] == pytest.approx(theirs.panoptic_quality)


def test_one_object_that_equals_two_matches_one_of_them():
    true, predicted = np.array([[1, 1, 2, 2]]), np.array([[3, 3, 3, 3]])
    found = match_objects(predicted, true)
    assert found.hits == (1, 0, 0, 0, 0) and found.overlap == 0.5
    assert match_objects(true, predicted) == type(found)((1, 0, 0, 0, 0), 0.5, 2, 1, 1)


def test_scores_by_hand():
    true, predicted = np.zeros((4, 20), dtype=int), np.zeros((4, 20), dtype=int)
    true[:, :5], true[:, 6:10], true[:, 12:14] = 1, 2, 3
    predicted[:, :5], predicted[:, 6:9], predicted[:, 16:] = 5, 4, 9  # IoU 1 and 3 / 4, one missed and one false
    scores = match_objects(predicted, true).scores()
    assert [scores[f"ap_{each}"] for each in THRESHOLDS] == pytest.approx([2 / 4, 2 / 4, 2 / 4, 1 / 5, 1 / 5])
    assert scores["ap_mean"] == pytest.approx((3 * 2 / 4 + 2 / 5) / 5)
    assert scores["precision_50"] == scores["recall_50"] == scores["f1_50"] == pytest.approx(2 / 3)
    assert scores["f1_90"] == pytest.approx(1 / 3)
    assert scores["panoptic_quality"] == pytest.approx(1.75 / (2 + 0.5 + 0.5))
    assert scores["count_error"] == 0


def test_images_are_pooled_by_their_counts_and_errors_of_counts_do_not_cancel():
    one, two = np.array([[1, 0, 2]]), np.array([[1, 0, 0]])
    both = add_matches([match_objects(one, two), match_objects(two, one)])
    scores = both.scores()
    assert (both.hits, both.predicted, both.true, both.miscounted) == ((2,) * 5, 3, 3, 2)
    assert scores["ap_50"] == pytest.approx(2 / 4)
    assert scores["count_error"] == pytest.approx(2 / 3)


def test_without_objects_scores_are_undefined_and_false_objects_count():
    nothing, one = np.zeros((2, 2), dtype=int), np.ones((2, 2), dtype=int)
    assert all(math.isnan(value) for value in match_objects(nothing, nothing).scores().values())
    false = match_objects(one, nothing).scores()
    assert false["ap_50"] == false["precision_50"] == false["f1_50"] == false["panoptic_quality"] == 0
    assert math.isnan(false["recall_50"]) and math.isnan(false["count_error"])
    missed = match_objects(nothing, one).scores()
    assert missed["ap_50"] == missed["recall_50"] == 0 and missed["count_error"] == 1
    assert math.isnan(missed["precision_50"])


def test_maps_that_differ_in_size_or_are_not_of_integers_are_refused():
    with pytest.raises(ValueError, match="both must be alike"):
        match_objects(np.zeros((2, 2), dtype=int), np.zeros((2, 3), dtype=int))
    with pytest.raises(ValueError, match="must be"):
        match_objects(np.zeros((2, 2)), np.zeros((2, 2), dtype=int))
