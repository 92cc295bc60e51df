"""Objects in maps: how many, where they end, and what they are."""

import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.segmentation import find_boundaries

from unet_diffusion.segmentation.measurements import object_table
from unet_diffusion.segmentation.objects import find_objects, one_hot


def disks(centres, radius: float, size: tuple[int, int]) -> np.ndarray:
    """Numbers of disks, where pixels of several go to the nearest centre."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    distances = np.array([np.hypot(rows - y, columns - x) for y, x in centres])
    return np.where(distances.min(axis=0) <= radius, distances.argmin(axis=0) + 1, 0)


def rod(size: tuple[int, int], centre, length: float, width: float, angle: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    y, x = rows - centre[0], columns - centre[1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.hypot(np.maximum(np.abs(along) - length / 2, 0), across) <= width / 2


def maps(instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boundary and the distance that a perfect network would give."""
    boundary = find_boundaries(instances, mode="inner").astype(np.float32)
    distance = np.zeros(instances.shape, dtype=np.float32)
    for label in range(1, instances.max() + 1):
        depth = ndimage.distance_transform_edt(instances == label)
        distance += (depth / max(depth.max(), 1)).astype(np.float32)
    return boundary, distance


def of_mask(mask: np.ndarray, **options) -> np.ndarray:
    return find_objects(one_hot(mask, max(int(mask.max()) + 1, 2)), **options)


def equal_partitions(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = one.ravel().astype(np.int64) * (int(other.max()) + 1) + other.ravel()
    return len(np.unique(pairs)) == len(np.unique(one)) == len(np.unique(other)) and np.array_equal(one > 0, other > 0)


@pytest.mark.parametrize("radius", [4, 9, 20])
@pytest.mark.parametrize("kind", ["mask", "boundary", "distance", "both"])
def test_touching_disks_are_counted_and_cut_where_they_touch(radius, kind):
    step = 1.8 * radius  # they share a fifth of a radius
    centres = [(2 * radius + step * i, 2 * radius + step * j) for i in range(3) for j in range(4)]
    true = disks(centres, radius, (int(4 * radius + 2 * step), int(4 * radius + 3 * step)))
    assert ndimage.label(true)[1] == 1
    boundary, distance = maps(true)
    given = {"boundary": boundary if kind in ("boundary", "both") else None}
    given["distance"] = distance if kind in ("distance", "both") else None
    found = of_mask(1 * (true > 0), **given)
    assert found.dtype == np.int32
    assert found.max() == 12
    assert np.array_equal(found > 0, true > 0)
    best = [np.bincount(found[true == label]).max() / (true == label).sum() for label in range(1, 13)]
    assert min(best) > 0.9


@pytest.mark.parametrize("angle", [0, 0.4, math.pi / 4, 1.2])
def test_an_elongated_object_is_one(angle):
    mask = 1 * rod((90, 90), (45, 45), 60, 9, angle)
    assert of_mask(mask).max() == 1
    assert of_mask(mask, diameter=9).max() == 1


@pytest.mark.parametrize("width", [2, 3, 3.5, 4.5, 5, 6, 7, 8])
def test_a_thin_object_is_one_at_any_angle(width):
    """The steps of its edge make it a pixel wider and narrower, which is much of its width."""
    random = np.random.default_rng(0)
    for angle in np.linspace(0, math.pi, 25):
        place = 32 + random.random(2)
        assert of_mask(1 * rod((64, 64), place, 40, width, angle)).max() == 1
        along, across = width * 2, width / 2 + 0.5
        rows, columns = np.mgrid[:64, :64] - place[:, None, None]
        u = columns * math.cos(angle) + rows * math.sin(angle)
        v = rows * math.cos(angle) - columns * math.sin(angle)
        assert of_mask(1 * (np.hypot(u / along, v / across) < 1)).max() == 1


@pytest.mark.parametrize(("radius", "width"), [(20, 3), (20, 5), (25, 6), (30, 8), (30, 10)])
def test_a_ring_is_one_object(radius, width):
    rows, columns = np.mgrid[:80, :80]
    assert of_mask(1 * (abs(np.hypot(rows - 40, columns - 40) - radius) < width / 2)).max() == 1


def test_small_and_large_objects_in_one_image_are_split_by_the_same_rule():
    mask = np.zeros((120, 200), dtype=int)
    mask[:, :120] = disks([(60, 40), (60, 85)], 26, (120, 120)) > 0
    mask[:, 120:] = disks([(y, x) for y in (30, 60, 90) for x in (20, 27)], 4, (120, 80)) > 0
    assert of_mask(mask).max() == 2 + 6


def test_objects_are_numbered_in_the_order_of_their_first_pixels():
    mask = np.zeros((6, 9), dtype=int)
    mask[4:, :3] = mask[0, 5] = mask[2, 1] = mask[1, 8] = 1
    found = of_mask(mask)
    assert [found[place] for place in ((0, 5), (1, 8), (2, 1), (4, 0))] == [1, 2, 3, 4]
    assert sorted(np.unique(found)) == [0, 1, 2, 3, 4]


def test_pixels_that_touch_by_a_corner_are_two_objects():
    assert np.array_equal(of_mask(np.eye(3, dtype=int)), np.diag([1, 2, 3]))


def test_nothing_and_everything():
    assert not of_mask(np.zeros((5, 7), dtype=int)).any()
    assert (of_mask(np.ones((5, 7), dtype=int)) == 1).all()
    assert (of_mask(np.ones((1, 1), dtype=int)) == 1).all()
    zeros = np.zeros((5, 7), dtype=np.float32)
    assert not of_mask(np.zeros((5, 7), dtype=int), boundary=zeros, distance=zeros).any()
    assert (of_mask(np.ones((5, 7), dtype=int), boundary=zeros, distance=zeros) == 1).all()  # all of one height


def test_objects_of_the_border_are_found_and_not_split():
    true = disks([(0, 20), (20, 0), (39, 39)], 9, (40, 40))
    assert equal_partitions(of_mask(1 * (true > 0)), true)


@pytest.mark.parametrize("kind", ["mask", "boundary", "distance"])
def test_two_classes_that_touch_are_two_objects(kind):
    mask = np.zeros((20, 30), dtype=int)
    mask[5:15, 5:15], mask[5:15, 15:25] = 1, 2
    boundary, distance = maps(mask)
    given = {"mask": {}, "boundary": {"boundary": boundary}, "distance": {"distance": distance}}[kind]
    found = of_mask(mask, **given)
    assert equal_partitions(found, mask)
    table = object_table(found, mask[None], one_hot(mask, 3))
    assert table["class"].tolist() == [1, 2] and table["confidence"].tolist() == [1, 1]


def test_with_maps_an_object_has_the_class_of_most_of_its_probability():
    true = disks([(20, 20)], 12, (40, 40))
    probabilities = one_hot(true, 3)
    probabilities[:, 18:21, 18:21] = np.array([0.0, 0.2, 0.8])[:, None, None]
    boundary, distance = maps(true)
    found = find_objects(probabilities, boundary, distance)
    assert equal_partitions(found, true)
    table = object_table(found, true[None], probabilities)
    area = (true > 0).sum()
    assert table["class"].tolist() == [1]
    assert table["confidence"].tolist() == [pytest.approx((area - 9 * 0.8) / area)]


def test_small_objects_are_left_out_and_small_holes_filled():
    mask = np.zeros((30, 30), dtype=int)
    mask[2:12, 2:12] = 1
    mask[5:7, 5:7] = 0  # a hole of 4 pixels
    mask[20:22, 20:23] = 1  # an object of 6 pixels
    mask[0, 20] = mask[1, 19] = mask[1, 21] = mask[2, 20] = 1  # a hole of 1 pixel, closed by corners alone: no hole
    assert (of_mask(mask, max_hole=4) > 0).sum() == mask.sum() + 4
    assert (of_mask(mask, max_hole=3) > 0).sum() == mask.sum()
    left = of_mask(mask, min_area=7, max_hole=4)
    assert left.max() == 1 and (left == 1).sum() == 100
    assert of_mask(mask, min_area=6).max() == 2


def test_a_hole_belongs_to_the_object_around_it():
    mask = np.zeros((20, 20), dtype=int)
    mask[2:18, 2:18] = 2
    mask[8:11, 8:11] = 0
    mask[5, 5] = 0
    probabilities = one_hot(mask, 4)
    whole = find_objects(probabilities, max_hole=9)
    assert whole.max() == 1 and (whole > 0).sum() == 256
    assert object_table(whole, mask[None], probabilities)["class"].tolist() == [2]


@pytest.mark.parametrize("level", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_what_is_no_object_of_the_maps_is_one_and_not_many(level, noise):
    """Pixels of a class whose distance was learnt as 0, as pixels without a number beside numbered objects have it."""
    disk = disks([(50, 50)], 35, (100, 100))
    distance = level + noise * np.random.default_rng(0).standard_normal(disk.shape)
    boundary = np.full(disk.shape, 0.05)
    assert find_objects(one_hot(disk, 2), boundary, distance, diameter=20).max() == 1


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_thin_object_whose_pixels_are_all_boundary_is_one(width, seed):
    """Maps as a network gives them: the boundary is sure in most places, the distance near 1 all along."""
    random = np.random.default_rng(seed)
    line = np.zeros((60, 100), dtype=int)
    line[30 : 30 + width, 20:80] = 1
    noise = ndimage.gaussian_filter(random.standard_normal(line.shape), 1.5)
    boundary = 1 / (1 + np.exp(-3 - noise / noise.std()))
    distance = line * (0.9 + 0.05 * random.standard_normal(line.shape))
    assert find_objects(one_hot(line, 2), boundary, distance, diameter=10).max() == 1
    other = np.roll(line, width, axis=0)  # touches the first along its whole length, where the distance is low
    both = np.where(line + other, 1, 0)
    assert find_objects(one_hot(both, 2), *maps(line + 2 * other * (1 - line)), diameter=10).max() == (
        1 if width < 3 else 2
    )


def test_a_speck_of_another_class_is_taken_in_if_it_is_too_small():
    mask = np.zeros((30, 30), dtype=int)
    mask[5:25, 5:25] = 1
    mask[10:12, 10:12] = 2
    assert of_mask(mask).max() == 2
    found = of_mask(mask, min_area=5, max_hole=5)
    assert equal_partitions(found, 1 * (mask > 0))


def test_ten_thousand_objects():
    true = np.zeros((800, 800), dtype=int)
    true.reshape(100, 8, 100, 8)[:, 1:7, :, 1:7] = np.arange(1, 10001).reshape(100, 1, 100, 1)
    found = of_mask(1 * (true > 0))
    assert np.array_equal(np.unique(found), np.arange(10001))
    assert equal_partitions(found, true)


def test_the_same_maps_give_the_same_objects_whatever_their_plateaus():
    random = np.random.default_rng(0)
    foreground = ndimage.gaussian_filter(random.random((80, 90)), 3) > 0.5
    probabilities = one_hot(1 * foreground, 2)
    boundary = random.integers(0, 3, foreground.shape).astype(np.float32) / 2
    first = find_objects(probabilities, boundary)
    assert np.array_equal(first, find_objects(probabilities.copy(), boundary.copy()))
    for label, box in enumerate(ndimage.find_objects(first), start=1):
        assert ndimage.label(first[box] == label, structure=np.ones((3, 3)))[1] == 1  # in one piece


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probabilities": np.zeros((1, 4, 4))}, r"shape \(1, 4, 4\), but must be \(K, H, W\)"),
        ({"boundary": np.zeros((4, 5))}, r"boundary has shape \(4, 5\), but probabilities are of 4x4"),
        ({"distance": np.zeros((4, 5))}, "distance has shape"),
        ({"diameter": 0}, "diameter is 0"),
        ({"min_area": -1}, "min_area is -1"),
        ({"max_hole": -1}, "max_hole is -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_objects(**{"probabilities": one_hot(np.zeros((4, 4), dtype=int), 2), **arguments})


def test_the_table_of_a_rectangle_and_a_pixel():
    objects = np.zeros((9, 12), dtype=np.int32)
    objects[2:6, 3:9], objects[8, 11] = 1, 2
    image = np.arange(108, dtype=np.uint16).reshape(1, 9, 12)
    probabilities = np.full((3, 9, 12), 0.2, dtype=np.float32)
    probabilities[1, :6], probabilities[2, 8] = 0.6, 0.6
    table = object_table(objects, np.concatenate([image, 2 * image]), probabilities, ["ground", "cell", "speck"])
    expected = {
        "object": [1, 2],
        "class": [1, 2],
        "class_name": ["cell", "speck"],
        "area": [24, 1],
        "y": [3.5, 8],
        "x": [5.5, 11],
        "top": [2, 8],
        "left": [3, 11],
        "bottom": [6, 9],
        "right": [9, 12],
        "major_axis": [4 * math.sqrt((6**2 - 1) / 12), 0],  # the variance of 6 points in a row
        "minor_axis": [4 * math.sqrt((4**2 - 1) / 12), 0],
        "eccentricity": [math.sqrt(1 - 15 / 35), 0],
        "solidity": [1, 1],
        "confidence": [0.6, 0.6],
        "mean_0": [12 * 3.5 + 5.5, 107],
        "mean_1": [2 * (12 * 3.5 + 5.5), 214],
    }
    assert list(table) == list(expected)
    for name, values in expected.items():
        for found, value in zip(table[name], values):
            assert found == (value if isinstance(value, str) else pytest.approx(value)), name
    for values in table.values():
        assert values.dtype == object or np.isfinite(values).all()


def test_the_table_without_objects_has_its_columns():
    nothing = object_table(np.zeros((4, 5), dtype=np.int32), np.zeros((1, 4, 5)), one_hot(np.zeros((4, 5)), 2))
    assert {len(values) for values in nothing.values()} == {0}
    assert list(nothing)[-1] == "mean_0"
