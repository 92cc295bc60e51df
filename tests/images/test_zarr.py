"""Zarr arrays and groups, as OME-Zarr has them."""

import numpy as np
import pytest
import zarr

from unet_diffusion.images.large_images import open_image


@pytest.mark.parametrize("version", [2, 3])
def test_an_array_of_a_group_is_opened_by_its_own_path(tmp_path, version):
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    group = zarr.create_group(tmp_path / "slide.ome.zarr", zarr_format=version)
    for level in ("0", "1"):
        group.create_array(level, data=pixels)
    image = open_image(tmp_path / "slide.ome.zarr" / "0")
    assert np.array_equal(image.read(slice(1, 3), slice(0, 2))[..., 0], pixels[1:3, :2])
    with pytest.raises(ValueError, match=r"is a group of Zarr arrays, .* one of them: .*ome.zarr/0, .*ome.zarr/1\.$"):
        open_image(tmp_path / "slide.ome.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read in windows"):
        open_image(tmp_path / "empty")
