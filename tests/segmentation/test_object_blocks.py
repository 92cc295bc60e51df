"""Objects that are found block by block: the same as in one piece, whatever the blocks."""

from functools import partial

import numpy as np
import pytest
from scipy import ndimage

from tests.segmentation.test_objects import disks, rod
from unet_diffusion.segmentation import objects as module
from unet_diffusion.segmentation.blocks import blocks, connected_parts
from unet_diffusion.segmentation.objects import ObjectSearch, find_objects, one_hot


class Counted:
    """An array from which windows can be read, and which keeps the size of the largest one."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.largest = values, values.shape, 0

    def __getitem__(self, window) -> np.ndarray:
        part = self.values[window]
        self.largest = max(self.largest, part[0].size if part.ndim == 3 else part.size)
        return part


def in_blocks(side: int, probabilities, boundary=None, distance=None, diameter=None, min_area=0, max_hole=0):
    found, count = ObjectSearch(probabilities, boundary, distance, np.zeros, side).find(diameter, min_area, max_hole)
    assert count == found.max()
    return found


def random_maps(height: int, width: int, num_classes: int, seed: int):
    """Smooth random maps: many objects, holes, contacts of classes, and ascents in all directions."""
    random = np.random.default_rng(seed)
    smooth = partial(ndimage.gaussian_filter, sigma=2)
    logits = np.stack([smooth(random.normal(size=(height, width))) for _ in range(num_classes)])
    probabilities = np.exp(8 * logits) / np.exp(8 * logits).sum(axis=0)
    boundary, distance = (smooth(random.random((height, width))).astype(np.float32) for _ in range(2))
    return probabilities.astype(np.float32), boundary, distance


@pytest.mark.parametrize("kind", ["mask", "boundary", "both"])
@pytest.mark.parametrize("options", [{}, {"diameter": 9.0, "min_area": 12, "max_hole": 9}])
def test_objects_do_not_depend_on_the_blocks(kind, options):
    probabilities, boundary, distance = random_maps(83, 61, 3, seed=len(kind))
    given = {"mask": (), "boundary": (boundary,), "both": (boundary, distance)}[kind]
    whole = find_objects(probabilities, *given, **options)
    assert whole.max() > 20
    for side in (5, 16, 40):
        assert np.array_equal(in_blocks(side, probabilities, *given, **options), whole)


def test_only_windows_are_read():
    probabilities, boundary, distance = (Counted(each) for each in random_maps(90, 400, 2, seed=1))
    in_blocks(16, probabilities, boundary, distance, diameter=9.0)
    assert probabilities.largest == 16 * 16
    assert boundary.largest == distance.largest == (16 + 2 * 4) ** 2  # 4 sigma of 0.08 diameters, rounded, and 1


@pytest.mark.parametrize(
    "mask",
    [
        disks([(100, 100)], 90, (200, 200)),  # its depth is more than the first halo
        rod((120, 300), (60, 150), 280, 9, 0.2),
        np.ones((70, 90)),  # there is no edge at all
        np.zeros((70, 90)),
        np.eye(40),  # corners alone
        disks([(0, 20), (20, 0), (39, 39)], 9, (40, 40)),
    ],
    ids=["large", "elongated", "everything", "nothing", "corners", "cut by the border"],
)
def test_objects_larger_than_a_block_are_one(mask):
    probabilities = one_hot(1 * (mask > 0), 2)
    found = in_blocks(32, probabilities)
    assert np.array_equal(found, find_objects(probabilities))
    assert found.max() == {40: 40 if mask[0, 0] else 3}.get(len(mask), int(mask.any()))


def test_a_mask_too_wide_for_any_window_is_refused(monkeypatch):
    monkeypatch.setattr(module, "LARGEST_WINDOW", 100**2)
    with pytest.raises(ValueError, match="rows 64 to 96, columns 96 to 128 that are more than 64 pixels from its edge"):
        in_blocks(32, one_hot(1 * (disks([(150, 150)], 140, (300, 300)) > 0), 2))


def test_ten_thousand_objects_across_blocks():
    true = np.zeros((800, 800), dtype=int)
    true.reshape(100, 8, 100, 8)[:, 1:7, :, 1:7] = np.arange(1, 10001).reshape(100, 1, 100, 1)
    found = in_blocks(300, one_hot(1 * (true > 0), 2))
    assert np.array_equal(found, true)  # both are numbered row by row


@pytest.mark.parametrize("corners", [False, True])
def test_connected_parts_are_those_of_the_whole(corners):
    values = np.random.default_rng(0).integers(0, 3, (37, 23))
    parts = connected_parts(values.__getitem__, values.shape, 6, np.zeros(values.shape, dtype=np.int32), corners)
    structure = np.ones((3, 3)) if corners else None
    found = parts[:, :]
    expected = sum(ndimage.label(values == value, structure)[1] for value in (1, 2))
    assert np.array_equal(found > 0, values > 0)
    assert parts.sizes[1:].tolist() == np.bincount(found.ravel())[1:].tolist()
    assert len(parts.sizes) == expected + 1
    for value in (1, 2):
        labels, count = ndimage.label(values == value, structure)
        assert len(np.unique(np.stack([labels, found])[:, labels > 0], axis=1).T) == count


def test_blocks_cover_each_pixel_once():
    count = np.zeros((7, 10), dtype=int)
    for block in blocks(count.shape, 4):
        count[block] += 1
    assert (count == 1).all()
