import math

import numpy as np
import pytest
import torch

from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.segmentation.metrics import (
    SegmentationMetrics,
    adapted_rand_error,
    boundary_f1,
    membrane_components,
    variation_of_information,
)


def scores_of(predicted, masks, num_classes):
    metrics = SegmentationMetrics(num_classes)
    metrics.update(torch.tensor(predicted), torch.tensor(masks))
    return metrics.compute()


def test_1100_against_1111():
    scores = scores_of([[[1, 1, 0, 0]]], [[[1, 1, 1, 1]]], 3)
    for prefix in ("pooled", "per_image"):
        assert scores[f"{prefix}/accuracy"] == 0.5
        assert scores[f"{prefix}/dice_1"] == pytest.approx(2 / 3)
        assert scores[f"{prefix}/iou_1"] == 0.5
        assert scores[f"{prefix}/iou_0"] == scores[f"{prefix}/dice_0"] == 0  # predicted, but not there
        assert math.isnan(scores[f"{prefix}/iou_2"])  # in neither, so left out of the means
        assert math.isnan(scores[f"{prefix}/dice_2"])
        assert scores[f"{prefix}/mean_iou"] == 0.25
        assert scores[f"{prefix}/mean_dice"] == pytest.approx(1 / 3)


def test_pooled_and_per_image_differ_as_they_should():
    predicted = [[[1, 1, 0, 0]], [[0, 0, 0, 0]]]
    masks = [[[1, 1, 1, 0]], [[0, 0, 0, 0]]]
    scores = scores_of(predicted, masks, 2)
    assert scores["pooled/accuracy"] == scores["per_image/accuracy"] == 7 / 8
    assert scores["pooled/iou_0"] == 5 / 6
    assert scores["per_image/iou_0"] == (1 / 2 + 1) / 2
    assert scores["pooled/iou_1"] == scores["per_image/iou_1"] == pytest.approx(2 / 3)  # class 1 is in one image
    assert scores["pooled/mean_iou"] == pytest.approx((5 / 6 + 2 / 3) / 2)
    assert scores["per_image/mean_iou"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert scores["per_image/mean_dice"] == pytest.approx(((2 / 3 + 4 / 5) / 2 + 1) / 2)


def test_ignored_pixels_count_nowhere():
    scores = scores_of([[[1, 1, 0, 1]]], [[[1, 1, IGNORE_INDEX, IGNORE_INDEX]]], 2)
    assert scores["pooled/accuracy"] == scores["pooled/iou_1"] == 1
    assert math.isnan(scores["pooled/iou_0"])


def test_an_image_without_labels_is_left_out():
    ignored = [[IGNORE_INDEX, IGNORE_INDEX]]
    scores = scores_of([[[0, 1]], [[0, 1]]], [[[0, 0]], ignored], 2)
    assert scores["per_image/accuracy"] == 0.5
    assert math.isnan(scores_of([[[0, 1]]], [ignored], 2)["pooled/accuracy"])


def test_scores_of_nothing_are_nan():
    assert all(math.isnan(value) for value in SegmentationMetrics(2).compute().values())


def test_confusion_has_masks_in_rows():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([[[1, 1, 0]]]), torch.tensor([[[0, 1, 0]]]))
    assert metrics.confusion.tolist() == [[1, 1], [0, 1]]


def test_states_of_processes_add_up():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 3, (6, 8, 9), generator=generator)
    masks = torch.randint(0, 3, (6, 8, 9), generator=generator)
    whole, first, second = SegmentationMetrics(3), SegmentationMetrics(3), SegmentationMetrics(3)
    whole.update(predicted, masks)
    first.update(predicted[:4], masks[:4])
    second.update(predicted[4:], masks[4:])
    others = iter([second.confusion, second.image_sums])
    first.sum_over_processes(lambda state: state + next(others))
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_bad_labels_and_shapes_are_refused():
    metrics = SegmentationMetrics(2)
    zeros = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="class indices of masks are 0..2"):
        metrics.update(zeros, torch.tensor([[[0, 0], [0, 2]]]))
    with pytest.raises(ValueError, match="class indices of predicted are 255..255"):
        metrics.update(zeros + 255, zeros)
    with pytest.raises(ValueError, match="the same"):
        metrics.update(zeros, zeros[:, :1])
    assert not metrics.confusion.any()


def half_plane(edge, size=(20, 30)):
    return np.broadcast_to((np.arange(size[1]) >= edge).astype(np.int64), size)


def test_boundary_f1_forgives_up_to_the_tolerance():
    # the boundary is two columns wide; moved by 2, all of it is within 2 pixels; by 3, one column of each is too far
    assert boundary_f1(half_plane(10), half_plane(10)) == 1
    assert boundary_f1(half_plane(12), half_plane(10), tolerance=2) == 1
    assert boundary_f1(half_plane(13), half_plane(10), tolerance=2) == 0.5
    assert boundary_f1(half_plane(20), half_plane(10), tolerance=2) == 0


def test_boundary_f1_of_a_false_boundary():
    predicted = half_plane(10) + half_plane(20)
    # class 0 is right. Class 1 ends at 20 too, so its precision is 1/2, its recall 1. Class 2 is false
    assert boundary_f1(predicted, half_plane(10)) == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_boundary_f1_is_undefined_without_boundaries_and_0_where_one_is_missed():
    flat = np.zeros((20, 30), dtype=np.int64)
    assert math.isnan(boundary_f1(flat, flat))
    assert boundary_f1(flat, half_plane(10)) == 0
    assert boundary_f1(half_plane(10), flat) == 0


def test_boundary_f1_counts_nothing_near_ignored_pixels():
    mask = half_plane(10).copy()
    mask[:, 18:] = IGNORE_INDEX
    predicted = half_plane(10).copy()
    predicted[:, 16:] = 0  # a false boundary within 3 pixels of the ignored part, where the true one is not known
    assert boundary_f1(predicted, mask) == 1
    assert math.isnan(boundary_f1(predicted, np.full_like(mask, IGNORE_INDEX)))


def test_one_segment_split_in_halves():
    instances, predicted = np.array([[1, 1, 1, 1]]), np.array([[1, 1, 2, 2]])
    # ordered pairs together: 12 in truth, 4 in the prediction, 4 in both
    assert adapted_rand_error(predicted, instances) == pytest.approx(1 - 2 * 4 / (12 + 4))
    assert variation_of_information(predicted, instances) == pytest.approx((1, 0))  # one bit says which half


def test_two_segments_merged():
    instances, predicted = np.array([[1, 1, 2, 2]]), np.array([[1, 1, 1, 1]])
    assert adapted_rand_error(predicted, instances) == pytest.approx(0.5)
    assert variation_of_information(predicted, instances) == pytest.approx((0, 1))


def test_numbers_of_segments_and_true_background_do_not_matter():
    instances = np.array([[1, 1, 0, 2, 2, 2]])
    predicted = np.array([[9, 9, 4, 0, 0, 0]])
    assert adapted_rand_error(predicted, instances) == 0
    assert variation_of_information(predicted, instances) == (0, 0)


def test_instance_scores_without_instances_are_nan():
    nothing = np.zeros((3, 3), dtype=np.int64)
    assert math.isnan(adapted_rand_error(nothing, nothing))
    assert all(math.isnan(part) for part in variation_of_information(nothing, nothing))
    pixels = np.arange(1, 10).reshape(3, 3)
    assert math.isnan(adapted_rand_error(pixels, pixels))  # single pixels make no pair


def test_a_thicker_membrane_at_the_same_place_is_not_an_error():
    thin, thick, broken = (np.zeros((15, 15), dtype=bool) for _ in range(3))
    thin[:, 7] = True
    thick[:, 6:9] = True
    broken[:10, 7] = True
    truth = membrane_components(thin, fill=False)
    assert truth.max() == 2
    np.testing.assert_array_equal(truth == 0, thin)
    filled = membrane_components(thick, fill=True)
    assert (filled > 0).all()
    assert adapted_rand_error(filled, truth) == 0
    assert adapted_rand_error(membrane_components(broken, fill=True), truth) == pytest.approx(
        1 - 2 * (2 * 105 * 104) / (2 * 105 * 104 + 210 * 209)  # one gap merges both cells of 7 x 15 pixels
    )


def test_an_image_of_membrane_alone_has_no_cells():
    assert not membrane_components(np.ones((4, 5), dtype=bool), fill=True).any()
