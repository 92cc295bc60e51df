"""Images that are drawn from a set are read in parts, in a fixed order."""

import numpy as np
import torch

from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.drawn_images import drawn
from unet_diffusion.data.sets import load_images


def test_parts_are_those_of_the_whole(tmp_path):
    levels = np.arange(12 * 4 * 6, dtype=np.uint8).reshape(12, 4, 6)
    config = DataConfig(data=levels, validation_fraction=0, cache_dir=str(tmp_path))
    images = drawn(load_images(config).train, 10)
    whole = images[:]
    assert images.shape == whole.shape == (10, 1, 4, 6)
    rows = (whole[:, 0, 0, 0] + 1) * 127.5 / 24  # of the array
    assert len({*rows.round().int().tolist()}) == 10 and not torch.equal(rows, rows.sort().values)
    assert torch.equal(whole, torch.from_numpy(levels[rows.round().int()][:, None]).float() * (2 / 255) - 1)
    assert torch.equal(torch.cat([images[:3], images[3:9], images[9:20]]), whole)
    assert torch.equal(images[torch.tensor([7, 2])], whole[[7, 2]])
    assert torch.equal(images.first(4)[:], whole[:4])


def test_images_are_cut_and_mirrored_as_in_training_but_always_in_the_same_way(tmp_path):
    values = np.arange(40 * 9 * 9).reshape(40, 9, 9).astype(np.uint16)
    config = DataConfig(data=values, validation_fraction=0, crop_size=4, cache_dir=str(tmp_path), value_range=(0, 3240))
    train = load_images(config).train
    images = drawn(train, 40, random=True, flip=True)
    assert images.are_cut and not train.flip
    cut = ((images[:] + 1) * 1620).round().long()[:, 0]
    torch.testing.assert_close(images.first(7)[3:], images[3:7])
    right = cut[:, 0, 1] - cut[:, 0, 0]  # 1 in an image, -1 in a mirrored one
    assert 8 < (right == -1).sum() < 32 and ((right == 1) | (right == -1)).all()
    places = cut.amin(dim=(1, 2)) % 81
    assert len(set(places.tolist())) > 15  # of 36
    central = ((drawn(train, 40)[:] + 1) * 1620).round().long()[:, 0]
    assert set((central.amin(dim=(1, 2)) % 81).tolist()) == {2 * 9 + 2}
