"""The parts of UniMatch: boxes, strong views, dropped features and pseudo masks."""

import numpy as np
import pytest
import torch

from scripts.experiments.label_efficiency.unimatch import (
    UniMatchTask,
    box,
    dropped_features,
    pooled_dice,
    pseudo_masks,
    varied,
)
from tests.support.segmentation import SMALL
from unet_diffusion import UNet
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.images.no_class import IGNORE_INDEX


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_boxes_have_the_stated_areas_and_shapes_in_half_of_the_cases():
    boxes = [box(generator, 64) for generator in generators(400)]
    areas = np.array([each.sum().item() for each in boxes]) / 64**2
    assert 0.4 < (areas > 0).mean() < 0.6
    assert areas.max() <= 0.4 and areas[areas > 0].min() > 0.01  # whole pixels round 0.02 down
    for each in boxes:
        rows, columns = each.any(1).sum(), each.any(0).sum()
        assert each.sum() == rows * columns  # a rectangle


@torch.no_grad()
def test_dropped_features_leave_the_first_half_as_it_is_and_end_with_the_block():
    unet = UNet(**{**SMALL, "num_classes": 3}).to_segmentation().eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 1, 16, 16)
    plain = unet(x).logits
    with dropped_features(unet, generators(1)):
        both = unet(x).logits
    assert both.shape == (4, 3, 16, 16)
    torch.testing.assert_close(both[:2], plain)
    assert not torch.allclose(both[2:], plain)
    torch.testing.assert_close(unet(x).logits, plain)


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_views_keep_shape_and_range_and_follow_their_generators(channels):
    images = torch.rand(6, channels, 16, 16) * 2 - 1
    views = varied(images, generators(6))
    assert views.shape == images.shape and views.abs().max() <= 1
    assert torch.equal(views, varied(images, generators(6)))
    assert not torch.allclose(views, images, atol=0.02)
    alone = varied(images[3:4], generators(4)[3:])
    assert torch.equal(views[3:4], alone)


def test_pixels_teach_where_the_prediction_is_sure_and_inside_of_the_image():
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, :2] = 5.0  # a probability of 0.993; the last pixel has 0.5
    outside = torch.tensor([[[0, IGNORE_INDEX, 0]]])
    assert pseudo_masks(logits, outside).tolist() == [[[1, IGNORE_INDEX, IGNORE_INDEX]]]


def test_weak_views_are_mirrored_and_turned_or_rotated_or_as_they_are():
    task = UniMatchTask.__new__(UniMatchTask)
    task.augmentation = AugmentationConfig()
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    views, outside = task._weak(image.expand(400, -1, -1, -1), generators(400))
    turned = {image[0].rot90(k, (1, 2)).flip(side).numpy().tobytes() for k in range(4) for side in (1, 2)}
    kinds = [
        0 if torch.equal(view, image[0]) else 1 if view.numpy().tobytes() in turned else 2
        for view in views.contiguous()
    ]
    assert 0.2 < kinds.count(0) / 400 < 0.3 and 0.45 < kinds.count(1) / 400 < 0.55
    cut = (outside == IGNORE_INDEX).any((1, 2)).tolist()
    assert not any(lost for lost, kind in zip(cut, kinds) if kind < 2)
    assert sum(cut) > 0.5 * kinds.count(2)  # small angles lose no whole pixel


def test_dice_pools_the_batch_and_leaves_out_what_is_ignored():
    probability = torch.tensor([[[0.9, 0.4]], [[0.2, 0.7]]])  # of class 1
    logits = torch.stack([(1 - probability).log(), probability.log()], dim=1)
    masks = torch.tensor([[[1, 0]], [[0, IGNORE_INDEX]]])
    first = 2 * (0.6 + 0.8) / (0.1**2 + 0.6**2 + 0.8**2 + 2)  # of class 0
    second = 2 * 0.9 / (0.9**2 + 0.4**2 + 0.2**2 + 1)
    assert pooled_dice(logits, masks).item() == pytest.approx(1 - (first + second) / 2, abs=1e-4)
    assert pooled_dice(logits, torch.full_like(masks, IGNORE_INDEX)).item() == pytest.approx(0, abs=1e-6)
