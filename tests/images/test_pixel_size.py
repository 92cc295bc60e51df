"""The pixel size that a file says: of microscopes, not of printers."""

import io

import numpy as np
import pytest
from PIL import Image

from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.pixel_size import read_pixel_size

tifffile = pytest.importorskip("tifffile")
OME = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}


def tiff(**options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((6, 8), dtype=np.uint8), **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"ome": True, "metadata": OME}, (0.25, 0.5)),
        ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}, (0.5, 0.5)),
        ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.5}}, None),  # half of it is nothing
        ({"ome": True, "metadata": OME | {"PhysicalSizeXUnit": "pixel"}}, None),
        ({"ome": True, "metadata": {"axes": "YX"}}, None),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "um"}}, (0.5, 0.25)),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "\\u00B5m"}}, (0.5, 0.25)),
        ({"imagej": True, "resolution": (2, 2), "metadata": {"unit": "mm"}}, (500, 500)),
        ({"imagej": True, "resolution": (300, 300), "metadata": {"unit": "inch"}}, None),
        ({"imagej": True, "resolution": (2, 2)}, None),  # ImageJ then counts in pixels
        ({"resolution": (4, 2), "resolutionunit": "MICROMETER"}, (0.5, 0.25)),
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, (0.5, 0.5)),
        ({"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None),  # 300 dpi
        ({"resolution": (1000, 1000), "resolutionunit": "CENTIMETER"}, None),  # 10 micrometres, 2540 dpi
        *(({"resolution": (dpi, dpi), "resolutionunit": "INCH"}, None) for dpi in (72, 96, 300, 50800)),
        ({"resolution": (2, 2), "resolutionunit": "NONE"}, None),
        ({"resolution": (0, 0), "resolutionunit": "MICROMETER"}, None),
        ({}, None),
    ],
)
def test_metadata_of_microscopes_are_trusted_and_those_of_printers_are_not(options, size, tmp_path):
    data = tiff(**options)
    expected = None if size is None else pytest.approx(size)
    assert read_pixel_size(data) == expected
    (tmp_path / "a.tif").write_bytes(data)
    assert open_image(tmp_path / "a.tif").pixel_size == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_dpi_of_other_programs_are_not_a_pixel_size(kind):
    file = io.BytesIO()
    Image.new("L", (8, 6)).save(file, kind, dpi=(300, 300))
    assert read_pixel_size(file.getvalue()) is None


def test_a_file_that_is_turned_has_its_sides_exchanged():
    options = {"resolution": (4, 2), "resolutionunit": "MICROMETER", "metadata": None}
    turned = tiff(**options, extratags=[(274, "H", 1, 6, True)])
    assert read_pixel_size(turned) == (0.25, 0.5)
    assert read_pixel_size(tiff(**options)) == (0.5, 0.25)


def test_damaged_metadata_say_nothing():
    data = tiff(ome=True, metadata=OME)
    assert read_pixel_size(data.replace(b"<Pixels", b"<Pixel<")) is None
    assert read_pixel_size(data[:40]) is None
    assert read_pixel_size(b"") is None
