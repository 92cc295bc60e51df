"""The size of a pixel in the object that an image shows, if the file states it."""

import io
import math
from collections.abc import Mapping
from typing import Any

from unet_diffusion.images.decoding import TIFF_MAGICS, scientific

PixelSize = tuple[float, float]  # height and width of a pixel, in micrometres

MICROMETRES = {
    **dict.fromkeys(("µm", "μm", "\\u00B5m", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
}
RESOLUTION_UNITS = {3: 1e4, 4: 1e3, 5: 1.0}  # values of the tag in micrometres; 1 is none, and 2 the inch
FINEST_PRINT = 10.0  # micrometres; coarser resolutions may be those of a printer or screen
ORIENTATION = 274  # tag of TIFF, as the next three
X_RESOLUTION = 282
Y_RESOLUTION = 283
RESOLUTION_UNIT = 296


def read_pixel_size(data: bytes) -> PixelSize | None:
    """Returns the height and width in micrometres of a pixel of an image file, or None if the file does not state it.

    These are trusted, in this order:
        - `PhysicalSizeX` and `PhysicalSizeY` of an OME-TIFF;
        - the resolution of a TIFF of ImageJ or Fiji, if its unit is a metric length;
        - the resolution of any other TIFF in micrometres or, if a pixel is smaller than 10 micrometres, in millimetres
          or centimetres.
    A resolution in inches is that of a printer or screen, and so is that of PNG and JPEG; it tells nothing about the
        object.

    Raises:
        ImportError: for a TIFF without the extra `scientific`.
    """
    if not data.startswith(TIFF_MAGICS):
        return None
    tifffile = scientific("tifffile", "pixel sizes of TIFF files")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            size = pixel_size_of(tiff)
            is_turned = _tag(tiff, ORIENTATION) in (5, 6, 7, 8)
    except (
        Exception
    ):  # damaged bytes raise errors of all kinds; an error of the image itself, if any, is raised elsewhere
        return None
    return (size[1], size[0]) if size and is_turned else size


def known_pixel_size(data: bytes) -> PixelSize | None:
    """Returns the same as `read_pixel_size`, but None for a TIFF if the extra `scientific` is not installed."""
    try:
        return read_pixel_size(data)
    except ImportError:
        return None


def pixel_size_of(tiff: Any) -> PixelSize | None:
    """Returns the same as `read_pixel_size`, for a `tifffile.TiffFile`; the orientation is not applied."""
    try:
        return _of_ome(tiff) or _of_imagej(tiff) or _of_tags(tiff)
    except Exception:  # metadata that is damaged, or has another form
        return None


def _of_ome(tiff: Any) -> PixelSize | None:
    if not tiff.is_ome or not tiff.ome_metadata:
        return None
    images = scientific("tifffile", "OME-TIFF files").xml2dict(tiff.ome_metadata).get("OME", {}).get("Image", {})
    pixels = (images[0] if isinstance(images, list) else images).get("Pixels", {})
    y, x = (_length(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "YX")
    return _size(y, x)


def _of_imagej(tiff: Any) -> PixelSize | None:
    stated: Mapping[str, Any] = tiff.imagej_metadata or {}
    unit = stated.get("unit")
    return _size(
        _length(_per_pixel(tiff, Y_RESOLUTION), stated.get("yunit", unit)),
        _length(_per_pixel(tiff, X_RESOLUTION), unit),
    )


def _of_tags(tiff: Any) -> PixelSize | None:
    if tiff.is_imagej:  # the unit of its resolution is in the description
        return None
    unit = RESOLUTION_UNITS.get(int(_tag(tiff, RESOLUTION_UNIT) or 0), math.nan)
    size = _size(_per_pixel(tiff, Y_RESOLUTION) * unit, _per_pixel(tiff, X_RESOLUTION) * unit)
    return size if size and (unit == 1 or max(size) < FINEST_PRINT) else None


def _tag(tiff: Any, code: int) -> Any:
    tag = tiff.pages[0].tags.get(code)
    return None if tag is None else tag.value


def _per_pixel(tiff: Any, code: int) -> float:
    """Returns how many units a pixel measures; NaN if the tag of pixels per unit is missing."""
    pixels, units = _tag(tiff, code) or (0, 0)
    return units / pixels if pixels else math.nan


def _length(value: Any, unit: Any) -> float:
    """Returns a length in micrometres, NaN if there is none."""
    return float(value) * MICROMETRES.get(str(unit), math.nan) if isinstance(value, (int, float)) else math.nan


def _size(y: float, x: float) -> PixelSize | None:
    """Returns a size if both are lengths."""
    return (y, x) if all(math.isfinite(each) and each > 0 for each in (y, x)) else None
