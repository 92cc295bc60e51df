import math
import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from unet_diffusion.segmentation.instances import border_weight_map, connected_components, separate_instances


def two_squares():
    instances = np.zeros((7, 13), dtype=np.int32)
    instances[2:5, 2:5] = 1
    instances[2:5, 8:11] = 7  # numbers need not be consecutive
    return instances


def test_border_weights_of_two_squares_by_hand():
    weights = border_weight_map(two_squares(), w0=10, sigma=5, class_weights=(0.5, 2.0))
    between = 0.5 + 10 * math.exp(-(4**2) / 50)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[3, 5:8], between, rtol=1e-6)  # d1 + d2 = 1 + 3, 2 + 2, 3 + 1
    corner = math.hypot(2, 2)  # from (0, 6) to (2, 4) and to (2, 8)
    assert weights[0, 6] == pytest.approx(0.5 + 10 * math.exp(-((2 * corner) ** 2) / 50), rel=1e-6)
    assert weights[3, 0] == pytest.approx(0.5 + 10 * math.exp(-((2 + 8) ** 2) / 50), rel=1e-6)
    assert (weights[two_squares() > 0] == 2).all()


def test_border_weights_of_a_binary_mask_are_those_of_its_components():
    np.testing.assert_array_equal(border_weight_map(two_squares() > 0), border_weight_map(two_squares()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_border_weights_do_not_depend_on_the_integer_type(dtype):
    np.testing.assert_array_equal(border_weight_map(two_squares().astype(dtype)), border_weight_map(two_squares()))


def test_one_instance_or_none_has_no_border():
    assert (border_weight_map(two_squares() == 1) == 1).all()
    assert (border_weight_map(np.zeros((4, 5), dtype=np.uint16)) == 1).all()


def test_border_weights_equal_the_formula_with_all_distances():
    points = np.random.default_rng(0).random((60, 70)) > 0.995
    instances = connected_components(ndimage.binary_dilation(points, iterations=2))
    labels = np.unique(instances[instances > 0])
    assert len(labels) >= 10
    distances = np.sort([ndimage.distance_transform_edt(instances != label) for label in labels], axis=0)
    expected = 1 + 10 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * 1.5**2)) * (instances == 0)
    weights = border_weight_map(instances, sigma=1.5)  # windows of 9 pixels, so far pixels lie outside them
    np.testing.assert_allclose(weights, expected, rtol=2e-6)


def test_memory_of_the_border_map_does_not_grow_with_the_number_of_instances():
    instances = np.zeros((512, 512), dtype=np.int32)
    for label, (y, x) in enumerate(np.ndindex(14, 15), start=1):
        instances[36 * y : 36 * y + 20, 34 * x : 34 * x + 20] = label
    tracemalloc.start()
    border_weight_map(instances)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * instances.size  # bytes: a few arrays of the map's size; one float32 for each of 210 would be 840


def test_bad_instance_maps_are_refused():
    for instances in (np.zeros((2, 3, 3), dtype=int), np.zeros((3, 3)), np.full((3, 3), -1)):
        with pytest.raises(ValueError, match="instance map has shape"):
            border_weight_map(instances)
    with pytest.raises(ValueError, match="sigma is 0"):
        border_weight_map(two_squares(), sigma=0)


def test_touching_instances_lose_one_pixel_each_whatever_their_numbers():
    instances = np.zeros((5, 8), dtype=np.uint16)
    instances[1:4, 1:4] = 1
    instances[1:4, 4:7] = 2
    expected = instances.copy()
    expected[:, 3:5] = 0
    np.testing.assert_array_equal(separate_instances(instances), expected)
    swapped = np.array([0, 2, 1], dtype=np.uint16)
    np.testing.assert_array_equal(separate_instances(swapped[instances]), swapped[expected])


def test_instances_apart_are_left_as_they_are():
    np.testing.assert_array_equal(separate_instances(two_squares()), two_squares())


def test_components_join_by_edges_only():
    assert connected_components(np.array([[1, 0], [0, 1]], dtype=bool)).max() == 2
    assert connected_components(np.array([[1, 1], [0, 1]], dtype=bool)).max() == 1
