"""Pixels: how an image file becomes an array, and how stored values map to [-1, 1] and back.

An image keeps its own channels and precision: 8-bit, 16-bit or float, with 1, 2, 3, 4 or N channels.
"""

import io
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unet_diffusion.images.fetching import ImageLike, check_pixel_count, pixel_limit, read_bytes, too_large

DTypeName: TypeAlias = Literal["uint8", "uint16", "float32"]

DTYPES: dict[str, torch.dtype] = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
LARGEST = {"uint8": 255, "uint16": 65535}

NPY_MAGIC = b"\x93NUMPY"
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian; the last two are BigTIFF
SAMPLES_PER_PIXEL = 277  # the tag of TIFF
CHANNEL_AXES = "CSQI"  # tifffile's letters for channels, samples, and pages of no stated meaning
CONVERTED_MODES = {
    "1": "L",
    "La": "LA",
    "RGBX": "RGB",
    "RGBa": "RGBA",
    "PA": "RGBA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "HSV": "RGB",
    "LAB": "RGB",
}


@dataclass(frozen=True)
class PixelRange:
    """The stored values that become -1 and 1.

    Args:
        low: stored value that becomes -1, one for all channels or one per channel.
        high: stored value that becomes 1, likewise; above `low`.
        dtype: of the stored images.

    Raises:
        ValueError: if the bounds are not finite, not in order or not equally many, or the dtype is another.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: DTypeName

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; images are stored as one of {', '.join(DTYPES)}.")
        if not self.low or len(self.low) != len(self.high):
            raise ValueError(
                f"low has {len(self.low)} and high has {len(self.high)} values; give one each, or one per channel."
            )
        for low, high in zip(self.low, self.high):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"the range is {low} to {high}; the lower value must be finite and below the upper.")

    @classmethod
    def full(cls, dtype: DTypeName) -> "PixelRange":
        """All values of an integer dtype: 0 to 255 or 0 to 65535."""
        if dtype not in LARGEST:
            raise ValueError(f"{dtype} has no natural range; state one, such as PixelRange((0.0,), (1.0,), {dtype!r}).")
        return cls(low=(0.0,), high=(float(LARGEST[dtype]),), dtype=dtype)

    def to_model(self, stored: Tensor) -> Tensor:
        """Stored values (..., C, H, W) of any dtype to float32 in [-1, 1]; values outside the range are clipped."""
        low, high = self._bounds(stored)
        return ((stored.to(torch.float32) - low) * (2 / (high - low)) - 1).clamp(-1, 1)

    def to_stored(self, images: Tensor) -> Tensor:
        """Values in [-1, 1], (..., C, H, W), to the stored dtype: clipped, and rounded to the nearest integer.

        The inverse of `to_model`; exact for every integer of the range.
        """
        low, high = self._bounds(images)
        values = (images.to(torch.float32).clamp(-1, 1) + 1) * ((high - low) / 2) + low
        if self.dtype != "float32":
            values = values.round().clamp(0, LARGEST[self.dtype])
        return values.to(DTYPES[self.dtype])

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PixelRange":
        """What `to_dict` gave, checked again."""
        if set(fields) != {"low", "high", "dtype"}:
            raise ValueError(f"a pixel range has the keys low, high and dtype; found {', '.join(sorted(fields))}.")
        low, high = (tuple(float(value) for value in fields[name]) for name in ("low", "high"))
        return cls(low=low, high=high, dtype=fields["dtype"])

    def _bounds(self, images: Tensor) -> tuple[Any, Any]:
        if len(self.low) == 1:
            return self.low[0], self.high[0]
        if images.ndim < 3 or images.shape[-3] != len(self.low):
            raise ValueError(f"images of shape {tuple(images.shape)}, but the range is for {len(self.low)} channels.")
        low, high = (torch.tensor(bound, device=images.device)[:, None, None] for bound in (self.low, self.high))
        return low, high


def decode_image(source: ImageLike, *, keep_indices: bool = False) -> np.ndarray:
    """The pixels of one image, with its own channels and precision.

    Grey gives 1 channel, grey with alpha 2, colour 3, with alpha 4; palettes become colour (with alpha where they have
    transparency); CMYK, YCbCr, HSV and Lab are converted to RGB; black-and-white becomes 0 and 255. 16 bits stay 16
    bits: integers of other widths that fit become uint16. Floats become float32. Orientation by EXIF is applied. Of an
    animation the first frame is taken; pages and planes of a TIFF are channels, unless it says that they are depth or
    time. Arrays, `.npy` files included, are (H, W) or (H, W, C). Nothing is unpickled.

    Args:
        source: a PIL image, an array, the bytes of a file, a path or URL, or the `{"bytes", "path"}` of a
            `datasets.Image(decode=False)` column.
        keep_indices: give the indices of a palette image, 1 channel, rather than its colours.

    Returns:
        Array (H, W, C), uint8, uint16 or float32.

    Raises:
        ValueError: naming the file and what is wrong: empty, truncated, not an image, NaN or infinity in it, or more
            pixels than `pixel_limit` allows.
        ImportError: for a TIFF or 16-bit colour PNG that needs the extra `scientific`.
    """
    if isinstance(source, np.ndarray):
        return _checked(source, "the array")
    if isinstance(source, Image.Image):
        return _checked(_pixels(source, keep_indices), getattr(source, "filename", "") or "the image")
    return _decode_bytes(*read_bytes(source), keep_indices)


def read_header(source: ImageLike) -> Image.Image | None:
    """An image as Pillow opens it, pixels not decoded, for its palette or EXIF; None where Pillow cannot open it."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray):
        pixel_limit()
        with suppress(Exception):  # decoders raise nearly every class on damaged bytes
            return Image.open(io.BytesIO(read_bytes(source)[0]))
    return None


def _decode_bytes(data: bytes, name: str, keep_indices: bool) -> np.ndarray:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes).")
    limit = pixel_limit()
    try:
        if data.startswith(NPY_MAGIC):
            pixels = _decode_npy(data)
        elif data.startswith(TIFF_MAGICS):
            pixels = _decode_tiff(data, keep_indices)
        else:
            with Image.open(io.BytesIO(data)) as image:
                if image.format == "PNG" and _loses_depth(image):
                    pixels = _decode_deep_png(image, data)
                else:
                    pixels = _pixels(image, keep_indices)
    except (ImportError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be decoded: it is no image; it begins with {data[:8]!r}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} cannot be decoded: {too_large('more pixels', limit)}") from error
    except Exception as error:  # decoders raise nearly every class on damaged bytes: struct.error, zlib.error
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    return _checked(pixels, name)


def _decode_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled, and nothing is unpickled; save numbers.")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"it is truncated: its header states {shape} values of {dtype}, but it has {len(data)} bytes.")
    height, width, channels = (*shape, 1, 1, 1)[:3]
    check_pixel_count(width, height, channels)
    return np.load(io.BytesIO(data), allow_pickle=False)


def _pixels(image: Image.Image, keep_indices: bool) -> np.ndarray:
    check_pixel_count(*image.size)
    if _loses_depth(image):
        raise ValueError(
            "Pillow would reduce its 16-bit colours to 8 bits; store it as PNG, TIFF or .npy and give the path."
        )
    ImageOps.exif_transpose(image, in_place=True) if image.getexif().get(0x0112, 1) != 1 else image.load()
    if image.mode == "P" and not keep_indices:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in CONVERTED_MODES:
        image = image.convert(CONVERTED_MODES[image.mode])
    return np.asarray(image)


def _loses_depth(image: Image.Image) -> bool:
    """Whether Pillow would load more than 8 bits a channel into a mode that has 8."""
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return False
    tiles = getattr(image, "tile", [])  # how the file's bytes will be unpacked; empty once they are
    arguments = tiles[0][3] if tiles else ()
    if image.format == "PPM":  # (raw mode, largest value)
        return isinstance(arguments, tuple) and len(arguments) > 1 and arguments[1] > 255
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return isinstance(raw_mode, str) and ";16" in raw_mode


def _decode_deep_png(image: Image.Image, data: bytes) -> np.ndarray:
    check_pixel_count(*image.size)
    try:
        from imagecodecs import png_decode
    except ImportError as error:
        raise ImportError("16-bit colour PNG files need imagecodecs: pip install unet-diffusion[scientific]") from error
    return png_decode(data)


def _decode_tiff(data: bytes, keep_indices: bool) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            samples = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1)
            whole = samples == len(image.getbands())  # Pillow takes channels that it does not know for one
            if whole and getattr(image, "n_frames", 1) == 1 and not _loses_depth(image):
                return _pixels(image, keep_indices)
    except Image.UnidentifiedImageError:
        pass  # Pillow knows neither N channels nor float colour
    try:
        from tifffile import TiffFile
    except ImportError as error:
        raise ImportError(
            "TIFF files of several pages, more than 4 channels, or 16-bit or float colour need tifffile: "
            "pip install unet-diffusion[scientific]"
        ) from error
    with TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        axes = dict(zip(series.axes, series.shape))
        width, height = axes.get("X", 1), axes.get("Y", 1)
        check_pixel_count(width, height, math.prod(series.shape) // max(width * height, 1))
        kept = "".join(axis for axis, size in axes.items() if size > 1 or axis in "YX")
        others = kept.replace("Y", "").replace("X", "")
        if len(kept) != len(others) + 2 or len(others) > 1 or others.strip(CHANNEL_AXES):
            raise ValueError(
                f"its axes {series.axes} of sizes {series.shape} are not one image; store each slice as a file."
            )
        pixels = series.asarray().reshape([axes[axis] for axis in kept])
        return np.moveaxis(pixels, [kept.index("Y"), kept.index("X")], [0, 1])


def _checked(pixels: np.ndarray, name: str) -> np.ndarray:
    """Pixels (H, W) or (H, W, C) as a contiguous array (H, W, C) of one of the three dtypes."""
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(f"{name} has shape {pixels.shape}; an image is (height, width) or (height, width, channels).")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32 becomes infinity, refused below
            pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{name} has pixels that are NaN or infinite.")
    elif pixels.dtype.kind not in "ui":
        raise ValueError(f"{name} holds {pixels.dtype}; images hold integers of up to 16 bits or floats.")
    elif pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > LARGEST["uint16"]:
            raise ValueError(
                f"{name} has integers from {pixels.min()} to {pixels.max()}; stored are 0 to 65535, or floats."
            )
        pixels = pixels.astype(np.uint16)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])
