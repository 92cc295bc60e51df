"""Decoding: how an image file becomes an array.

An image keeps its own channels and precision: 8-bit, 16-bit or float, with 1, 2, 3, 4 or N channels.
"""

import importlib
import io
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from unet_diffusion.checks import Question
from unet_diffusion.images.fetching import ImageLike, read_bytes

DTypeName: TypeAlias = Literal["uint8", "uint16", "float32"]  # of decoded images

LARGEST = {"uint8": 255, "uint16": 65535}
MAX_PIXELS = "UNET_DIFFUSION_MAX_PIXELS"  # environment variable that sets PIL.Image.MAX_IMAGE_PIXELS

NPY_MAGIC = b"\x93NUMPY"
NPY_LOCK = threading.Lock()  # NumPy parses headers by `ast`, which fails in threads before CPython 3.11.8 (gh-106905)
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian; the last two are BigTIFF
SAMPLES_PER_PIXEL = 277  # tag of TIFF
EXIF_ORIENTATION = 0x0112
LOSSY = ("JPEG", "MPO")
CHANNEL_AXES = "CSQI"  # tifffile's letters for channels, samples, and pages of no stated meaning
TO_RGB = dict.fromkeys(("RGBX", "CMYK", "YCbCr", "HSV", "LAB"), "RGB")
CONVERTED_MODES = {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA", **TO_RGB}


@dataclass(frozen=True)
class Decoded:
    """One image, read once."""

    pixels: np.ndarray  # (H, W, C), uint8, uint16 or float32, turned upright
    palette: list[int] | None = None  # red, green and blue of each index in turn, if the pixels are indices
    orientation: int = 1  # EXIF orientation that the file states, 1 to 8; 1, upright, if it states none
    format: str = ""  # of the file, such as "JPEG"; empty for arrays
    lossy: bool = False  # the file's compression changes values


def decode_image(source: ImageLike) -> np.ndarray:
    """Decodes one image with its own channels and precision.

    Grey images have 1 channel, grey with alpha 2, colour 3, colour with alpha 4. Palettes become colour (with alpha
    where they have transparency). CMYK, YCbCr, HSV and Lab are converted to RGB. Black-and-white becomes 0 and 255.
    16 bits stay 16 bits: integers of other widths that fit become uint16. Floats become float32. The EXIF orientation
    is applied. Animations give their first frame. Pages and planes of a TIFF are channels, unless it says that
    they are depth or time. Arrays, `.npy` files included, are (H, W) or (H, W, C). Nothing is unpickled.

    Args:
        source: a PIL image, an array, the bytes of a file, a path or URL, or the `{"bytes", "path"}` of a
            `datasets.Image(decode=False)` column.

    Returns:
        Array (H, W, C), uint8, uint16 or float32.

    Raises:
        ValueError: naming the file and what is wrong: empty, truncated, not an image, NaN or infinity in it, or more
            pixels than `pixel_limit` allows.
        ImportError: for a TIFF or 16-bit colour PNG that needs the extra `scientific`.
    """
    return decode(source).pixels


def decode(source: ImageLike, *, keep_indices: bool = False) -> Decoded:
    """Decodes one image as `decode_image` does, with its palette and orientation; the file is read once.

    With `keep_indices`, a palette image gives its indices, 1 channel, instead of its colours.
    """
    if isinstance(source, np.ndarray):
        decoded, name = Decoded(source), "the array"
    elif isinstance(source, Image.Image):
        decoded, name = _from_pillow(source, keep_indices), getattr(source, "filename", "") or "the image"
    else:
        data, name = read_bytes(source)
        decoded = _decode_bytes(data, name, keep_indices)
    return replace(decoded, pixels=_checked(decoded.pixels, name))


def pixel_limit() -> int | None:
    """Returns the number of pixels that an image may have, since a small file can hold enough to fill the memory.

    The limit is `PIL.Image.MAX_IMAGE_PIXELS`, about 89 million; None means no limit. The environment variable
    `UNET_DIFFUSION_MAX_PIXELS` sets it.

    Raises:
        ValueError: the environment variable is not a positive number.
    """
    stated = os.environ.get(MAX_PIXELS)
    if stated is not None:
        if not stated.isdecimal() or int(stated) < 1:
            raise ValueError(f"{MAX_PIXELS} is {stated!r}, but must be the number of pixels that an image may have.")
        Image.MAX_IMAGE_PIXELS = int(stated)  # Pillow checks it too when it opens a file
    return Image.MAX_IMAGE_PIXELS


def scientific(package: str, files: str) -> Any:
    """Imports a package of the extra `scientific`, which `files` need; the ImportError says so."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{files} need {package}: pip install unet-diffusion[scientific]") from error


def _check_pixel_count(width: int, height: int, channels: int = 1) -> None:
    """Raises a ValueError for an image above the limit, which holds for pixels of up to 4 channels."""
    limit = pixel_limit()
    if limit is not None and width * height * -(-channels // 4) > limit:
        raise ValueError(_too_large(f"{width}x{height} pixels of {channels} channels", limit))


def _too_large(size: str, limit: int | None) -> str:
    return (
        f"it has {size}, above the limit of {limit} that guards against decompression bombs; if you trust it, set the "
        f"environment variable {MAX_PIXELS} to more."
    )


def _decode_bytes(data: bytes, name: str, keep_indices: bool) -> Decoded:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes).")
    limit = pixel_limit()
    try:
        if data.startswith(NPY_MAGIC):
            with NPY_LOCK:
                return _decode_npy(data)
        if data.startswith(TIFF_MAGICS):
            return _decode_tiff(data, keep_indices)
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG" and _loses_depth(image):
                return _decode_deep_png(image, data)
            lossy = image.format in LOSSY
            return replace(_from_pillow(image, keep_indices), format=image.format or "", lossy=lossy)
    except (ImportError, MemoryError, Question):
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be decoded: it is not an image; it begins with {data[:8]!r}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} cannot be decoded: {_too_large('more pixels', limit)}") from error
    except Exception as error:  # damaged bytes raise errors of all kinds, such as struct.error
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _decode_npy(data: bytes) -> Decoded:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled, and nothing is unpickled; save numbers.")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"it is truncated: its header states {shape} values of {dtype}, but it has {len(data)} bytes.")
    height, width, channels = (*shape, 1, 1, 1)[:3]
    _check_pixel_count(width, height, channels)
    return Decoded(np.load(io.BytesIO(data), allow_pickle=False))


def _from_pillow(image: Image.Image, keep_indices: bool) -> Decoded:
    _check_pixel_count(*image.size)
    if _loses_depth(image):
        raise ValueError(
            "Pillow would reduce its 16-bit colours to 8 bits; store it as PNG, TIFF or .npy and give the path."
        )
    orientation, palette = _orientation(image), None
    if orientation == 1:
        image.load()
    else:
        image = ImageOps.exif_transpose(image)
    if image.mode == "P" and keep_indices:
        palette = image.getpalette()
    elif image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in CONVERTED_MODES:
        image = image.convert(CONVERTED_MODES[image.mode])
    return Decoded(np.asarray(image), palette, orientation)


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _loses_depth(image: Image.Image) -> bool:
    """Returns whether Pillow would load more than 8 bits a channel into a mode that has 8."""
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return False
    tiles = getattr(image, "tile", [])  # how the file's bytes will be unpacked; empty once they are
    arguments = tiles[0][3] if tiles else ()
    if image.format == "PPM":  # (raw mode, largest value)
        return isinstance(arguments, tuple) and len(arguments) > 1 and arguments[1] > 255
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return isinstance(raw_mode, str) and ";16" in raw_mode


def _decode_deep_png(image: Image.Image, data: bytes) -> Decoded:
    _check_pixel_count(*image.size)
    pixels = scientific("imagecodecs", "16-bit colour PNG files").png_decode(data)
    return Decoded(pixels, orientation=_orientation(image))


def _decode_tiff(data: bytes, keep_indices: bool) -> Decoded:
    orientation = 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = _orientation(image)
            samples = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1)
            whole = samples == len(image.getbands())  # Pillow reads channels that it does not know as one
            if whole and getattr(image, "n_frames", 1) == 1 and not _loses_depth(image):
                return _from_pillow(image, keep_indices)
    except Image.UnidentifiedImageError:
        pass  # Pillow knows neither N channels nor float colour
    special = "TIFF files of several pages, more than 4 channels, or 16-bit or float colour"
    with scientific("tifffile", special).TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        axes = dict(zip(series.axes, series.shape))
        width, height = axes.get("X", 1), axes.get("Y", 1)
        _check_pixel_count(width, height, math.prod(series.shape) // max(width * height, 1))
        kept = "".join(axis for axis, size in axes.items() if size > 1 or axis in "YX")
        others = kept.replace("Y", "").replace("X", "")
        if len(kept) != len(others) + 2 or len(others) > 1 or others.strip(CHANNEL_AXES):
            raise ValueError(
                f"its axes {series.axes} of sizes {series.shape} are not one image; store each slice as a file."
            )
        pixels = series.asarray().reshape([axes[axis] for axis in kept])
        pixels = np.moveaxis(pixels, [kept.index("Y"), kept.index("X")], [0, 1])
        return Decoded(pixels, orientation=orientation)


def _checked(pixels: np.ndarray, name: str) -> np.ndarray:
    """Checks pixels (H, W) or (H, W, C), and returns them contiguous, (H, W, C), in one of the three dtypes."""
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"{name} has shape {pixels.shape}; an image is (height, width) or (height, width, channels).")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{name} has pixels that are NaN or infinite.")
    elif pixels.dtype.kind not in "ui":
        raise ValueError(f"{name} holds {pixels.dtype}; images hold integers of up to 16 bits or floats.")
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > LARGEST["uint16"]:
            raise ValueError(f"{name} holds {pixels.min()} to {pixels.max()}, but integers must be from 0 to 65535.")
        pixels = pixels.astype(np.uint16)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])
