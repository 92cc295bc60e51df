"""Measurements of objects: as scikit-image makes them, and the same whatever the blocks they are made of."""

import warnings

import numpy as np
import pytest
from skimage.measure import label, regionprops_table

from tests.segmentation.test_objects import disks, rod
from unet_diffusion.segmentation.blocks import blocks
from unet_diffusion.segmentation.measurements import ObjectMeasurements, hull_area, object_table

NAMES = {
    "object": "label",
    "area": "area",
    "y": "centroid-0",
    "x": "centroid-1",
    "top": "bbox-0",
    "left": "bbox-1",
    "bottom": "bbox-2",
    "right": "bbox-3",
    "major_axis": "axis_major_length",
    "minor_axis": "axis_minor_length",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
    "mean_0": "intensity_mean",
}


def random_objects(seed: int, corners: bool = True) -> np.ndarray:
    """Objects of all shapes, with holes and concave sides; of a single pixel too."""
    values = np.random.default_rng(seed).random((90, 70)) < (0.35 if corners else 0.5)
    return label(values, connectivity=2 if corners else 1).astype(np.int32)


def known_objects() -> np.ndarray:
    """Disks that the border of the image cuts, and an elongated object between them."""
    objects = disks([(0, 10), (30, 0), (89, 69), (45, 75)], 12, (90, 70))
    return np.where(rod(objects.shape, (45, 35), 40, 5, 0.6), objects.max() + 1, objects).astype(np.int32)


@pytest.mark.parametrize(
    "objects", [random_objects(0, False), random_objects(0), known_objects()], ids=["edges", "corners", "known"]
)
def test_it_equals_that_of_scikit_image(objects):
    image = np.random.default_rng(1).integers(0, 60000, (1, *objects.shape)).astype(np.uint16)
    chances = np.full((2, *objects.shape), 0.5, dtype=np.float32)
    found = object_table(objects, image, chances)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Qhull has no hull of a pixel
        expected = regionprops_table(objects, image[0], properties=("label", *_properties()))
    assert len(found["object"]) == objects.max() >= 5
    for ours, theirs in NAMES.items():
        # the axes are roots of differences, so that rounding of 1e-15 is 1e-7 in them
        np.testing.assert_allclose(found[ours], expected[theirs], rtol=1e-9, atol=1e-6, err_msg=ours)


def _properties() -> list[str]:
    return sorted({name.partition("-")[0] for name in NAMES.values()} - {"label"})


def test_ten_thousand_objects():
    objects = np.zeros((800, 800), dtype=np.int32)
    objects.reshape(100, 8, 100, 8)[:, 1:7, :, 2:5] = np.arange(1, 10001).reshape(100, 1, 100, 1)
    table = object_table(objects, np.zeros((1, 800, 800), dtype=np.uint8), np.ones((2, 800, 800), dtype=np.uint8))
    assert np.array_equal(table["object"], np.arange(1, 10001))
    assert set(table["area"]) == {18} and set(table["solidity"]) == {1}
    assert np.array_equal(table["top"], np.repeat(8 * np.arange(100) + 1, 100))


@pytest.mark.parametrize("side", [7, 32, 80])
def test_it_does_not_depend_on_the_blocks(side):
    objects = random_objects(2)
    random = np.random.default_rng(3)
    image = random.integers(0, 255, (2, *objects.shape)).astype(np.uint8)
    chances = random.random((3, *objects.shape), dtype=np.float32)
    measured = ObjectMeasurements(int(objects.max()), 2, 3)
    for rows, columns in blocks(objects.shape, side):
        window = (slice(None), rows, columns)
        measured.add(objects[rows, columns], image[window], chances[window], rows.start, columns.start)
    for name, values in object_table(objects, image, chances).items():
        found = measured.table()[name]
        if name in ("class_name", "class", "object", "area", "top", "left", "bottom", "right", "solidity"):
            assert np.array_equal(found, values), name
        else:
            np.testing.assert_allclose(found, values, rtol=1e-12, atol=1e-6, err_msg=name)


def test_far_from_the_corner_of_the_image_nothing_is_lost():
    """Second moments about the corner of such an image are 1e12 times those about the middle of the object."""
    objects = np.zeros((9, 12), dtype=np.int32)
    objects[2:6, 3:9] = 1
    image, chances = np.ones((1, 9, 12)), np.ones((2, 9, 12))
    near, far = ObjectMeasurements(1, 1, 2), ObjectMeasurements(1, 1, 2)
    near.add(objects, image, chances)
    far.add(objects, image, chances, 1_000_000, 2_000_000)
    for name, (value,) in near.table().items():
        move = {"y": 1e6, "top": 1e6, "bottom": 1e6, "x": 2e6, "left": 2e6, "right": 2e6}.get(name, 0)
        assert far.table()[name][0] == (value if isinstance(value, str) else value + move)


@pytest.mark.parametrize(
    ("rows", "left", "right", "area"),
    [
        ([0], [3], [3], 1),
        ([0], [3], [9], 7),
        ([0, 1, 2], [0, 0, 0], [0, 0, 0], 3),
        ([0, 1, 2, 3], [0, 0, 0, 0], [3, 0, 0, 3], 16),  # the shape of a C
        ([0, 1, 2], [0, 0, 0], [2, 0, 0], 6),  # of an L: the hull has its diagonal
        ([0, 2], [0, 0], [0, 0], 3),  # two pixels with a gap
        ([0, 4], [0, 4], [0, 4], 5),
    ],
)
def test_the_hull_in_closed_form(rows, left, right, area):
    assert hull_area(rows, left, right) == area


def test_numbers_that_no_pixel_has_are_left_out():
    objects = np.array([[0, 3, 3], [5, 0, 0]])
    table = object_table(objects, np.zeros((1, 2, 3)), np.ones((2, 2, 3)))
    assert table["object"].tolist() == [3, 5] and table["area"].tolist() == [2, 1]
    assert table["solidity"].tolist() == [1, 1]


def test_micrometres_of_pixels_that_are_not_square():
    """scikit-image takes the same spacing of rows and columns."""
    objects = random_objects(4)
    table = object_table(objects, np.zeros((1, *objects.shape)), np.ones((2, *objects.shape)), None, (0.25, 2.0))
    names = ("area", "equivalent_diameter_area", "axis_major_length", "axis_minor_length")
    expected = regionprops_table(objects, properties=names, spacing=(0.25, 2.0))
    for ours, theirs in zip(("area_um2", "diameter_um", "major_axis_um", "minor_axis_um"), names):
        np.testing.assert_allclose(table[ours], expected[theirs], rtol=1e-9, atol=1e-6, err_msg=ours)
    assert list(table)[-5:] == ["mean_0", "area_um2", "diameter_um", "major_axis_um", "minor_axis_um"]
