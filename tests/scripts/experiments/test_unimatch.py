"""The parts of UniMatch: boxes, strong views, dropped features and pseudo masks."""

import numpy as np
import pytest
import torch

from scripts.experiments.label_efficiency.unimatch import box, dropped_features, pseudo_masks, varied
from tests.support.segmentation import SMALL
from unet_diffusion import UNet
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
