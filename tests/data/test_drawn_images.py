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
