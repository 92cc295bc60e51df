import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion.data.crops import crop_window
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.images.no_class import IGNORE_INDEX


def starts(side: int, crop: int | None, margin: int) -> tuple[set[int], int]:
    """Where crops start on the endless line of the image, and how long they all are."""
    found, lengths = set(), set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        (window, _), ((before, after), _) = crop_window((side, side), (crop, crop), generator, margin)
        assert window.start == 0 or before == 0
        assert window.stop == side or after == 0
        found.add(window.start - before)
        lengths.add(before + window.stop - window.start + after)
    (length,) = lengths
    return found, length


@pytest.mark.parametrize(
    ("side", "crop", "margin", "expected"),
    [
        (10, 7, 0, range(0, 4)),  # cut inside
        (7, 10, 0, range(-3, 1)),  # whole, at a random place
        (10, 7, 2, range(-2, 6)),  # the margins are cut too, so an output of 7 - 2 * 2 may lie at the border
        (10, 16, 2, range(-4, -1)),
        (10, None, 3, range(-3, -2)),
    ],
)
def test_crops_start_everywhere_they_may(side, crop, margin, expected):
    found, length = starts(side, crop, margin)
    assert found == set(expected)
    assert length == (crop or side + 2 * margin)


@pytest.fixture
def dataset(tmp_path) -> MaskedDataset:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        values = np.arange(100, dtype=np.uint8).reshape(10, 10) + i
        Image.fromarray(values).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray((values > 50).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    folders = {"data": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    return load_masked(MaskedDataConfig(**folders, cache_dir=str(tmp_path / "cache"))).train


def test_a_margin_is_mirrored_and_ignored(dataset):
    whole, item = dataset[1], dataset.mirrored(4)[0, 1]
    assert torch.equal(item["image"], torch.from_numpy(np.pad(whole["image"], ((0, 0), (4, 4), (4, 4)), "reflect")))
    assert torch.equal(item["mask"][4:-4, 4:-4], whole["mask"])
    assert (item["mask"] != IGNORE_INDEX).sum() == whole["mask"].numel()


def test_a_margin_leaves_the_set_and_its_whole_images_as_they_are(dataset):
    assert torch.equal(dataset.mirrored(4)[1]["image"], dataset[1]["image"])
    assert dataset[0, 1]["image"].shape == (1, 10, 10)
