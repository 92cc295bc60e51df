import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.draw import disk
from skimage.segmentation import find_boundaries

from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.segmentation.instance_maps import (
    UNKNOWN,
    ObjectSizes,
    inner_boundary,
    normalised_distance,
    object_areas,
    objects_of_mask,
)


def crowd(size=(60, 70), count=25, seed=0) -> np.ndarray:
    """Disks that touch and cover each other, some cut by the border, and objects of one pixel."""
    random = np.random.default_rng(seed)
    instances = np.zeros(size, dtype=np.int32)
    for number in range(1, count + 1):
        centre, radius = random.integers((0, 0), size), random.integers(1, 9)
        instances[disk(centre, radius, shape=size)] = number
    return instances


def boundary_of(instances: np.ndarray) -> np.ndarray:
    return inner_boundary(torch.from_numpy(instances)).numpy()


def test_two_squares_have_their_boundary_also_where_they_touch():
    instances = np.zeros((6, 8), dtype=np.int32)
    instances[1:5, 1:4], instances[1:5, 4:7] = 1, 2
    expected = instances > 0
    expected[2:4, 2] = expected[2:4, 5] = False  # all that is inside
    np.testing.assert_array_equal(boundary_of(instances), expected)


@pytest.mark.parametrize("size", [(60, 70), (1, 9), (9, 1), (1, 1)])
def test_the_boundary_is_that_of_scikit_image(size):
    instances = crowd(size)
    np.testing.assert_array_equal(boundary_of(instances), find_boundaries(instances, mode="inner"))


def test_neither_the_border_of_the_image_nor_what_is_unknown_makes_a_boundary():
    instances = np.ones((4, 5), dtype=np.int32)
    assert not boundary_of(instances).any()
    instances[:, 3:] = UNKNOWN
    instances[0, 0] = 0
    assert boundary_of(instances).nonzero()[0].tolist() == [0, 1]  # the two beside the background


def test_the_distance_in_a_disk_falls_from_its_centre_to_its_edge():
    """Within a pixel, a pixel's distance from the outside is the radius minus its distance from the centre."""
    instances = np.zeros((41, 41), dtype=np.int32)
    y, x = np.mgrid[-20:21, -20:21]
    from_centre = np.hypot(y, x)
    instances[from_centre <= 15] = 3
    distance = normalised_distance(instances)
    assert distance.dtype == np.float32 and distance[20, 20] == distance.max() == 1
    np.testing.assert_allclose(distance[instances == 3], 1 - from_centre[instances == 3] / 16, atol=1 / 16)
    assert not distance[instances == 0].any()


def test_the_distance_is_that_of_each_object_alone():
    instances = crowd()
    distance = normalised_distance(instances)
    for number in np.unique(instances[instances > 0]):
        inside = instances == number
        expected = ndimage.distance_transform_edt(inside)  # over the whole image
        np.testing.assert_allclose(distance[inside], expected[inside] / expected.max(), rtol=1e-6)
    assert ((distance > 0) == (instances > 0)).all() and distance.max() == 1


def test_an_object_at_the_border_of_the_image_goes_on_there():
    """A bar that leaves the image is as deep at the border as in its middle; whole, its ends would be shallow."""
    instances = np.zeros((7, 9), dtype=np.int32)
    instances[1:6] = 1
    rows = normalised_distance(instances)
    np.testing.assert_allclose(rows, np.repeat(np.array([0, 1, 2, 3, 2, 1, 0])[:, None] / 3, 9, axis=1), rtol=1e-6)


def test_images_full_of_one_object_and_empty_ones():
    assert (normalised_distance(np.ones((3, 4), dtype=np.int32)) == 1).all()
    empty = np.zeros((3, 4), dtype=np.int32)
    assert not normalised_distance(empty).any() and not boundary_of(empty).any() and not len(object_areas(empty))


def test_objects_of_one_pixel_are_boundary_and_of_distance_one():
    instances = np.zeros((5, 5), dtype=np.int32)
    instances[1, 1], instances[3, 3] = 1, 60000
    for map_ in (normalised_distance(instances), boundary_of(instances)):
        np.testing.assert_array_equal(map_, instances > 0)
    np.testing.assert_array_equal(object_areas(instances), [1, 1])


def test_without_instance_maps_objects_are_the_components_of_each_class():
    mask = np.array(
        [
            [1, 1, 2, 0, 1],
            [1, 0, 2, 2, 0],
            [0, 1, 255, 2, 2],
        ],
        dtype=np.uint8,
    )
    objects = objects_of_mask(mask)
    assert ((objects > 0) == np.isin(mask, (1, 2))).all()
    assert objects[0, 0] == objects[1, 0] != objects[0, 2] == objects[2, 4]  # touching, of two classes
    assert len({objects[0, 0], objects[2, 1], objects[0, 4]}) == 3  # joined by corners only
    assert objects.max() == 4


def test_instance_maps_say_what_an_object_is_but_not_where_a_class_is_ignored_or_background():
    mask = np.array([[1, 2, 0, 1, IGNORE_INDEX]])
    instances = np.array([[7, 7, 7, 0, 7]], dtype=np.uint16)
    np.testing.assert_array_equal(objects_of_mask(mask, instances), [[7, 7, 0, 0, 0]])


def test_diameters_are_those_of_circles_of_equal_area():
    instances = np.zeros((200, 200), dtype=np.int64)
    instances[disk((60, 60), 50)] = 2
    instances[disk((150, 150), 20)] = 5
    areas = object_areas(instances)
    np.testing.assert_allclose(np.sqrt(4 * areas / np.pi), [100, 40], rtol=0.02)
    assert ObjectSizes.of(areas).diameter == pytest.approx(70, rel=0.02)  # the median of two is their mean
    assert ObjectSizes.of(areas[:1]).diameter == pytest.approx(100, rel=0.02)


def test_the_least_area_is_at_most_a_tenth_of_the_median_and_at_least_a_pixel():
    assert ObjectSizes.of(np.full(50, 170)).min_area == 17  # equal objects, of which the border may leave a part
    assert ObjectSizes.of(np.full(50, 4)).min_area == 1


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (100, 1), (101, 2), (1000, 10)])
def test_at_most_one_object_in_a_hundred_is_smaller_than_the_least_area(count, expected):
    areas = np.random.default_rng(0).permutation(np.arange(1, count + 1))
    least = ObjectSizes.of(areas).min_area
    assert least == expected and (areas < least).mean() <= 0.01
