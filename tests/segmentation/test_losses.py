import math

import pytest
import torch
import torch.nn.functional as F

from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.segmentation.losses import (
    BOUNDARY_WEIGHT,
    boundary_loss,
    class_counts,
    class_weights_from_counts,
    cross_entropy,
    dice_loss,
    distance_loss,
    segmentation_loss,
)


def random_batch(num_classes=3, size=(6, 7)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_classes, *size, generator=generator)
    masks = torch.randint(0, num_classes, (2, *size), generator=generator)
    return logits, masks


def sure_logits(masks, num_classes):
    return 200.0 * F.one_hot(masks, num_classes).movedim(-1, 1).float()  # softmax is 0 or 1 to float32 precision


def test_cross_entropy_of_equal_logits_is_log_of_the_number_of_classes():
    _, masks = random_batch(num_classes=5)
    assert cross_entropy(torch.zeros(2, 5, 6, 7), masks).item() == pytest.approx(math.log(5), rel=1e-6)


def test_cross_entropy_is_the_mean_over_images_of_their_mean_over_pixels_that_are_not_ignored():
    logits, masks = random_batch()
    masks[0, :3] = IGNORE_INDEX
    each = [F.cross_entropy(logits[i : i + 1], masks[i : i + 1], ignore_index=IGNORE_INDEX) for i in range(2)]
    torch.testing.assert_close(cross_entropy(logits, masks), sum(each) / 2)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_the_loss_is_the_mean_of_those_of_its_parts_however_many_pixels_are_ignored(loss):
    """Gradients of micro-batches and processes are averaged; all pixels of one image are ignored."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 3, 6, 7, generator=generator)
    masks = torch.randint(0, 3, (8, 6, 7), generator=generator)
    for image, ignored in enumerate((0, 1, 2, 3, 4, 5, 6, 6)):
        masks[image, :ignored] = IGNORE_INDEX
    weights = None if loss == "dice" else torch.rand(8, 1, 6, 7, generator=generator)
    whole = segmentation_loss(logits, masks, loss, pixel_weights=weights)
    for size in (1, 2, 4):
        parts = [
            segmentation_loss(logits[part], masks[part], loss, pixel_weights=None if weights is None else weights[part])
            for part in (slice(start, start + size) for start in range(0, 8, size))
        ]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_class_and_pixel_weights_multiply_and_the_divisor_stays_the_number_of_pixels():
    masks = torch.tensor([[[0, 1, 1, IGNORE_INDEX]]])
    weights = torch.tensor([[[[1.0, 2.0, 3.0, 1000.0]]]])
    loss = cross_entropy(torch.zeros(1, 2, 1, 4), masks, torch.tensor([0.5, 4.0]), weights)
    assert loss.item() == pytest.approx((0.5 * 1 + 4 * 2 + 4 * 3) / 3 * math.log(2), rel=1e-6)


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits, masks = random_batch()
    half = logits.bfloat16()
    for loss in ("cross_entropy", "dice", "both"):
        value = segmentation_loss(half, masks, loss)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, segmentation_loss(half.float(), masks, loss), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_a_batch_of_ignored_pixels_costs_nothing_and_keeps_the_graph(loss):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = segmentation_loss(logits, torch.full((2, 4, 4), IGNORE_INDEX), loss)
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_ignored_pixels_get_no_gradient_and_others_do(loss):
    logits, masks = random_batch()
    masks[:, 2] = IGNORE_INDEX
    logits.requires_grad_()
    segmentation_loss(logits, masks, loss).backward()
    assert not logits.grad[:, :, 2].any()
    assert logits.grad[:, :, :2].abs().sum(dim=1).gt(0).all()


def test_dice_of_1100_against_1111_is_two_thirds():
    masks = torch.tensor([[[1, 1, 1, 1]]])
    loss = dice_loss(sure_logits(torch.tensor([[[1, 1, 0, 0]]]), 2), masks)  # class 0 occurs in no mask: left out
    assert loss.item() == pytest.approx(1 - 2 / 3, rel=1e-6)


def test_dice_averages_the_images_and_in_each_the_classes_that_occur():
    masks = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, IGNORE_INDEX]]])
    predicted = torch.tensor([[[0, 0, 1, 0]], [[0, 2, 0, 1]]])
    # first: class 0 has 2 of 2 true, 3 predicted, so 4 / 5, class 1 has 1 of 2, 1 predicted, so 2 / 3;
    # second: class 0 has 2 of 3 true, 2 predicted, so 4 / 5, and no other occurs in the mask
    expected = 1 - ((4 / 5 + 2 / 3) / 2 + 4 / 5) / 2
    assert dice_loss(sure_logits(predicted, 3), masks).item() == pytest.approx(expected, rel=1e-6)


def test_soft_dice_of_equal_logits():
    masks = torch.tensor([[[0, 0, 0, 1]]])
    # p is 1/2 everywhere: class 0 gives 2 * 1.5 / (2 + 3), class 1 gives 2 * 0.5 / (2 + 1)
    assert dice_loss(torch.zeros(1, 2, 1, 4), masks).item() == pytest.approx(1 - (3 / 5 + 1 / 3) / 2, rel=1e-6)


def test_the_loss_of_a_right_and_sure_prediction_is_zero():
    _, masks = random_batch()
    assert segmentation_loss(sure_logits(masks, 3), masks, "both").item() == pytest.approx(0, abs=1e-6)


def test_both_is_the_sum():
    logits, masks = random_batch()
    both = segmentation_loss(logits, masks, "both", class_weights=torch.tensor([1.0, 2.0, 3.0]))
    parts = cross_entropy(logits, masks, torch.tensor([1.0, 2.0, 3.0])) + dice_loss(logits, masks)
    torch.testing.assert_close(both, parts)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice", "both"])
def test_targets_of_an_unpadded_network_are_cut_at_the_centre(loss):
    logits, masks = random_batch(size=(6, 7))
    outside = F.pad(masks, (92, 92, 92, 92), value=1)  # 572 - 388 = 184 pixels, as in the 2015 network
    torch.testing.assert_close(segmentation_loss(logits, outside, loss), segmentation_loss(logits, masks, loss))


def test_pixel_weights_are_cut_with_the_mask():
    logits, masks = random_batch(size=(6, 7))
    weights = torch.rand(2, 1, 6, 7)
    expected = cross_entropy(logits, masks, pixel_weights=weights)
    padded = cross_entropy(logits, F.pad(masks, (2, 2, 2, 2)), pixel_weights=F.pad(weights, (2, 2, 2, 2), value=9.0))
    torch.testing.assert_close(padded, expected)


def test_masks_smaller_than_the_logits_are_refused():
    logits, masks = random_batch(size=(6, 7))
    with pytest.raises(ValueError, match="5x7.*6x7"):
        cross_entropy(logits, masks[:, :5])


def test_unknown_loss_and_weights_without_a_place_are_refused():
    logits, masks = random_batch()
    with pytest.raises(ValueError, match="'focal'.*'cross_entropy', 'dice', 'both'"):
        segmentation_loss(logits, masks, "focal")
    with pytest.raises(ValueError, match="takes no class or pixel weights"):
        segmentation_loss(logits, masks, "dice", class_weights=torch.ones(3))


def test_class_weights_have_mean_one_over_the_pixels_and_equal_shares():
    masks = torch.tensor([[0] * 6 + [1] * 3 + [3] + [IGNORE_INDEX] * 5])
    counts = class_counts(masks, 4)
    assert counts.tolist() == [6, 3, 0, 1]
    weights = class_weights_from_counts(counts)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 1.0, 10 / 3]))
    assert (weights * counts).sum().item() == pytest.approx(10)


def test_class_weights_of_rare_classes_are_limited():
    """A class of one pixel in a million weighs 50 times as much as the background, not a million times."""
    counts = torch.tensor([999_899, 100, 1, 0])
    weights = class_weights_from_counts(counts)
    assert (weights[1] / weights[0]).item() == pytest.approx(50)
    assert (weights[2] / weights[0]).item() == pytest.approx(50)
    assert weights[3] == 1
    assert (weights * counts).sum().item() == pytest.approx(1_000_000)
    kept = class_weights_from_counts(torch.tensor([980, 20]))  # 49 times
    torch.testing.assert_close(kept, torch.tensor([1000 / 1960, 1000 / 40]))


def test_class_weights_of_nothing_are_one():
    assert class_weights_from_counts(torch.zeros(2)).tolist() == [1, 1]


def test_class_counts_refuse_an_index_without_a_class():
    with pytest.raises(ValueError, match="0..7.*2 classes"):
        class_counts(torch.tensor([[0, 7]]), 2)


# --- objects ---


def test_losses_of_objects_by_hand():
    """Two pixels of the first image count, and one of the second, of which the other is ignored."""
    masks = torch.tensor([[[0, 1]], [[1, IGNORE_INDEX]]])
    boundary = torch.tensor([[[False, True]], [[True, True]]])
    even = torch.zeros(2, 1, 2)  # probability 1/2 everywhere
    expected = math.log(2) * ((1 + BOUNDARY_WEIGHT) / 2 + BOUNDARY_WEIGHT) / 2
    assert boundary_loss(even, boundary, masks).item() == pytest.approx(expected, rel=1e-6)
    distance = torch.tensor([[[0.0, 0.5]], [[1.0, 0.0]]])
    predicted = torch.tensor([[[0.2, 0.5]], [[0.4, 9.0]]])
    assert distance_loss(predicted, distance, masks).item() == pytest.approx((0.2**2 / 2 + 0.6**2) / 2, rel=1e-6)


def test_ignored_pixels_have_no_gradient_in_the_losses_of_objects():
    logits, masks = random_batch()
    masks[0, 2:], masks[1] = IGNORE_INDEX, IGNORE_INDEX
    for loss, target in ((boundary_loss, masks == 1), (distance_loss, masks / 3)):
        values = logits[:, 0].clone().requires_grad_(True)
        loss(values, target, masks).backward()
        assert (values.grad[0, :2] != 0).all() and not values.grad[masks == IGNORE_INDEX].any()


def test_targets_of_objects_are_cut_to_the_logits_of_an_unpadded_network():
    logits, masks = random_batch(size=(6, 7))
    inner = (slice(None), slice(1, -1), slice(1, -1))
    for loss, target in ((boundary_loss, masks == 1), (distance_loss, masks / 3)):
        small = logits[:, 0][inner]
        torch.testing.assert_close(loss(small, target, masks), loss(small, target[inner], masks[inner]))
        with pytest.raises(ValueError, match="must not be smaller"):
            loss(logits[:, 0], target[inner], masks[inner])
