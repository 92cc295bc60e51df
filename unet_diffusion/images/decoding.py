"""Decoding: how an image file becomes an array.

An image keeps its own channels and precision: 8-bit, 16-bit or float, with 1, 2, 3, 4 or N channels.
"""

import importlib
import importlib.util
import io
import math
import os
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from unet_diffusion.checks import Question
from unet_diffusion.images.axes import USUAL_CHANNELS, AxisOrder, order_of_array, order_of_pages
from unet_diffusion.images.fetching import ImageLike, read_bytes
from unet_diffusion.images.headers import LOSSY_TIFF, bits_per_channel, is_lossy, unread_format

DTypeName: TypeAlias = Literal["uint8", "uint16", "float32"]  # of decoded images
PixelReading: TypeAlias = Literal["image", "values", "colours"]

LARGEST = {"uint8": 255, "uint16": 65535}
LARGEST_OF_MASKS = (1 << 24) - 1  # largest number of an object; floats hold all integers up to it
NOT_A_CLASS = (
    "; where it stands for pixels without a class, write 255, which is ignored, or in an instance map 0, for no object"
)
RENUMBER = "; renumber the objects from 1 up, as skimage.segmentation.relabel_sequential does"
MAX_PIXELS = "UNET_DIFFUSION_MAX_PIXELS"  # environment variable that sets PIL.Image.MAX_IMAGE_PIXELS

AVIF = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()  # since Pillow 11.3
# Pillow's names of the formats that are read (MPO is a kind of JPEG); TGA is last, since any file could be one
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", *AVIF, "TGA")
DRAWN_OUTSIDE = ("EPS", "WMF")  # formats that Pillow hands to Ghostscript or Windows, which run what the file says
NPY_MAGIC = b"\x93NUMPY"
NPY_LOCK = threading.Lock()  # NumPy parses headers with `ast`, which fails in threads before CPython 3.11.8 (gh-106905)
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big endian; the last two are BigTIFF
WHITE_IS_ZERO = 0  # value of the tag PHOTOMETRIC
SIGNED = 2  # value of the tag SAMPLE_FORMAT
PLANES = 2  # value of the tag PLANAR_CONFIGURATION
ASSOCIATED_ALPHA = 1  # among the extra samples of a page: colours are stored multiplied by alpha
UNCOMPRESSED = 1  # value of the tag COMPRESSION
BITS_PER_SAMPLE = 258  # tag of TIFF, as the next six
COMPRESSION = 259
PHOTOMETRIC = 262
DESCRIPTION = 270
SAMPLES_PER_PIXEL = 277
PLANAR_CONFIGURATION = 284
SAMPLE_FORMAT = 339
EXIF_ORIENTATION = 0x0112
OTHER_COLOURS = (5, 8, 9, 10)  # values of the tag PHOTOMETRIC: CMYK and three kinds of Lab
CHANNEL_AXES = "CSQI"  # tifffile's letters for channels, samples, and pages of no stated meaning
UNNAMED_AXES = "QI"
TO_RGB = dict.fromkeys(("RGBX", "CMYK", "YCbCr", "HSV", "LAB"), "RGB")
CONVERTED_MODES = {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA", **TO_RGB}


@dataclass(frozen=True)
class Decoded:
    """One image, read once, with the facts that its file states."""

    pixels: np.ndarray  # (H, W, C), uint8, uint16 or float32, turned upright
    palette: list[int] | None = None  # red, green and blue of each index in turn, if the pixels are indices
    orientation: int = 1  # EXIF orientation in the file, 1 to 8; 1, upright, if there is none
    format: str = ""  # such as "JPEG", "PNG", "TIFF" or "NPY"; empty for arrays
    lossy: bool = False  # the file keeps its values only approximately, as JPEG does
    pages: int = 1  # frames of an animation, or pages of a TIFF, which may be channels
    unread_pages: int = 0  # pages that are left out: all frames but the first, or pages of another size
    white_is_zero: bool = False  # a TIFF whose lookup table is inverted: 0 is shown white
    separate: bool = False  # the channels are pages or planes of a TIFF, none of which is colour or alpha
    scale: float = 1.0  # factor to 8 or 16 bits of grey values that have fewer; unless "image" is read, it is undone


@dataclass(frozen=True)
class Request:
    """How to read an image; see `decode`."""

    axes: AxisOrder | None = None
    channels: int | None = None
    reading: PixelReading = "image"

    def order(self, shape: tuple[int, ...], unnamed_pages: bool = False) -> AxisOrder:
        """Returns the order of three axes; masks need not state it if their first or last axis has one entry."""
        if self.reading != "image" and shape[-1] == 1:
            return "HWC"
        if self.reading != "image" and shape[0] == 1 and shape[-1] > USUAL_CHANNELS and self.axes is None:
            return "CHW"
        return (order_of_pages if unnamed_pages else order_of_array)(shape, self.axes, self.channels)


def decode_image(source: ImageLike, *, axes: AxisOrder | None = None, channels: int | None = None) -> np.ndarray:
    """Decodes one image with its own channels and precision.

    Grey images have 1 channel, grey with alpha 2, colour 3, colour with alpha 4. Palettes become colour (with alpha if
    they have transparency). CMYK, YCbCr, HSV and Lab are converted to RGB. Black-and-white becomes 0 and 255. 16 bits
    stay 16 bits, and integers of other widths that fit become uint16. Floats become float32. The EXIF orientation is
    applied. Of an animation, the first frame is read. Nothing is unpickled.

    A grey TIFF of 1 to 16 bits whose lookup table is inverted ("white is zero") is read as it is shown: 0 becomes the
    largest value. Masks keep the stored values (`decode_mask`).

    If a TIFF names its axes, these names count, and depth or time are refused. Arrays, including `.npy` files, are (H,
    W), (H, W, C) or (C, H, W); if there are more axes, those of length 1 are dropped. If a TIFF does not name the axis
    of its pages, the pages are its channels. If the order is unclear, an error asks for `axes`.

    Args:
        source: a PIL image, an array, the bytes of a file, a path or URL, or the `{"bytes", "path"}` of a
            `datasets.Image(decode=False)` column.
        axes: order of the axes of arrays, and of TIFF files that do not name their axes.
        channels: the expected number of channels; it settles the order of axes if only one order fits.

    Returns:
        Array (H, W, C), uint8, uint16 or float32.

    Raises:
        ValueError: the file is empty, truncated or not an image, its axes are ambiguous, it holds NaN or infinity, or
            it has more pixels than `pixel_limit` allows. The message names the file and the problem.
        ImportError: a TIFF, or a colour PNG, JPEG 2000 or AVIF with more than 8 bits, needs the extra `scientific`.
    """
    return decode(source, axes=axes, channels=channels).pixels


def decode(
    source: ImageLike,
    *,
    axes: AxisOrder | None = None,
    channels: int | None = None,
    reading: PixelReading = "image",
) -> Decoded:
    """Decodes one image as `decode_image` does, with the facts that its file states; the file is read once.

    Args:
        source: as `decode_image` takes it.
        axes: as `decode_image` takes them.
        channels: as `decode_image` takes them.
        reading: "image": as it is shown; "values": as it is stored, so a palette image gives its indices, 1 channel, a
            TIFF in which white is zero is not inverted, and grey values of 2 or 4 bits or with another largest value
            (PGM) are not scaled; "colours": like "values", but with the colours of a palette.
    """
    request = Request(axes, channels, reading)
    if isinstance(source, np.ndarray):
        name = "the array"
        try:
            array = source.reshape(_without_ones(source.shape))
            decoded = Decoded(array.transpose(_places(array.shape, request)))
        except Question as error:
            raise Question(error.question, f"{name} is unclear: {error.found}") from error
        except ValueError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
    elif isinstance(source, Image.Image):
        if source.format in DRAWN_OUTSIDE:
            raise ValueError(
                f"the image is a file of {source.format}, which another program would run to draw it; if you trust the "
                "file, give image.convert('RGB')."
            )
        _check_unread_bits(source)
        decoded, name = _from_pillow(source, request), getattr(source, "filename", "") or "the image"
    else:
        data, name = read_bytes(source)
        decoded = _decode_bytes(data, name, request)
    return replace(decoded, pixels=_checked(decoded.pixels, name, of_mask=reading != "image"))


def pixel_limit() -> int | None:
    """Returns the largest number of pixels that an image may have; without a limit, a small file could fill the memory.

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
    """Imports a package of the extra `scientific` that `files` need; the ImportError states this."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{files} need {package}: pip install unet-diffusion[scientific]") from error


def _check_pixel_count(width: int, height: int, channels: int = 1) -> None:
    """Raises a ValueError for an image above the limit, which is for pixels of up to 4 channels."""
    limit = pixel_limit()
    if limit is not None and width * height * -(-channels // 4) > limit:
        raise ValueError(_too_large(f"{width}x{height} pixels of {channels} channels", limit))


def _too_large(size: str, limit: int | None) -> str:
    return (
        f"it has {size}, above the limit of {limit} that guards against decompression bombs; if you trust it, set the "
        f"environment variable {MAX_PIXELS} to more."
    )


def _decode_bytes(data: bytes, name: str, request: Request) -> Decoded:
    if not data:
        raise ValueError(f"{name} is empty (0 bytes).")
    limit = pixel_limit()
    try:
        if data.startswith(NPY_MAGIC):
            with NPY_LOCK:
                return _decode_npy(data, request)
        if data.startswith(TIFF_MAGICS):
            return _decode_tiff(data, request)
        with _opened(data) as image:
            frames = _frames(image)
            lossy = is_lossy(image.format, data)
            return replace(_decode_opened(image, data, request), lossy=lossy, pages=frames, unread_pages=frames - 1)
    except (ImportError, MemoryError):
        raise
    except Question as error:
        raise Question(error.question, f"{name} is unclear: {error.found}") from error
    except Image.UnidentifiedImageError as error:
        what = unread_format(data) or f"it is not an image of a format that is read; it begins with {data[:8]!r}"
        raise ValueError(f"{name} cannot be decoded: {what}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} cannot be decoded: {_too_large('more pixels', limit)}") from error
    except Exception as error:  # damaged bytes raise errors of all kinds, such as struct.error
        raise ValueError(f"{name} cannot be decoded: {error}") from error


def _opened(data: bytes) -> Image.Image:
    """Opens a file of one of the formats that are read, whatever its name, and of no other that Pillow knows."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _decode_npy(data: bytes, request: Request) -> Decoded:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickled, and nothing is unpickled; save numbers.")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"it is truncated: its header states {shape} values of {dtype}, but it has {len(data)} bytes.")
    shape = _without_ones(shape)
    places = _places(shape, request)
    height, width, channels = (*(shape[place] for place in places), 1, 1, 1)[:3]
    _check_pixel_count(width, height, channels)
    return Decoded(np.load(io.BytesIO(data), allow_pickle=False).reshape(shape).transpose(places), format="NPY")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape of more than three axes without the first axes of length 1, such as one time and one depth."""
    axes = list(shape)
    while len(axes) > 3 and 1 in axes:
        axes.remove(1)
    return tuple(axes)


def _places(shape: tuple[int, ...], request: Request, unnamed_pages: bool = False) -> tuple[int, ...]:
    """Returns the axes of an array that are rows, columns and channels; all axes in order unless there are three."""
    if len(shape) != 3 or 0 in shape or request.order(shape, unnamed_pages) == "HWC":
        return tuple(range(len(shape)))
    return 1, 2, 0


def _decode_opened(image: Image.Image, data: bytes, request: Request) -> Decoded:
    """Decodes a file other than TIFF that Pillow has opened but not loaded."""
    bits = bits_per_channel(image.format, data)
    if image.format == "PNG" and _loses_depth(image):
        return _decode_deep(image, data, "png_decode")
    if image.format == "JPEG2000" and bits > 8 and (bits, image.mode) != (16, "I;16"):
        return _decode_deep(image, data, "jpeg2k_decode")
    if image.format == "AVIF" and bits > 8:
        return _decode_deep(image, data, "avif_decode")
    return _from_pillow(image, request)


def _decode_deep(image: Image.Image, data: bytes, decoder: str) -> Decoded:
    """Decodes a file of more than 8 bits a channel, which Pillow would reduce to 8."""
    _check_pixel_count(*image.size)
    orientation = _orientation(image)
    kind = image.format or ""
    pixels = getattr(scientific("imagecodecs", f"{kind} files of more than 8 bits a channel"), decoder)(data)
    return Decoded(_upright(pixels, orientation), orientation=orientation, format=kind)


def _frames(image: Image.Image) -> int:
    """Returns the number of frames of an animation; further images in a JPEG file are previews or depth maps."""
    if image.format == "MPO":
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a damaged frame that is not read
        return 1


def _from_pillow(image: Image.Image, request: Request) -> Decoded:
    _check_pixel_count(*image.size)
    if _loses_depth(image):
        raise ValueError(
            "Pillow would reduce its 16-bit colours to 8 bits; store it as PNG, TIFF or .npy and give the path."
        )
    if _is_garbled(image):
        raise ValueError("Pillow reads wrong values of such TIFF files, signed, big-endian or planar; give the path.")
    kind, tags = image.format or "", getattr(image, "tag_v2", {})
    lossy = tags.get(COMPRESSION) in LOSSY_TIFF if kind == "TIFF" else is_lossy(kind, None)
    scale = _scale(image)  # first, since looking for an orientation loads a PNG
    orientation, palette, white_is_zero = _orientation(image), None, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if orientation == 1:
        image.load()
    else:
        image = ImageOps.exif_transpose(image)
    turned_round = white_is_zero and image.mode in ("1", "L")  # Pillow does this at 1 to 8 bits
    if image.mode == "P" and request.reading == "values":
        palette = image.getpalette()
    elif image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode in CONVERTED_MODES:
        image = image.convert(CONVERTED_MODES[image.mode])
    pixels, bits = np.asarray(image), tags.get(BITS_PER_SAMPLE, (None,))[0]
    if white_is_zero and turned_round != (request.reading == "image"):
        pixels = negative(pixels, bits if pixels.dtype.itemsize > 1 else None)
    if scale != 1 and request.reading != "image":
        pixels = np.round(pixels / scale).astype(pixels.dtype)
    kind = "JPEG" if kind == "MPO" else kind
    return Decoded(pixels, palette, orientation, kind, lossy, white_is_zero=white_is_zero, scale=scale)


def negative(pixels: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Swaps black and white in bools and in unsigned integers of up to 16 bits; other values stay as they are.

    Args:
        pixels: of any shape.
        bits: number of bits of the integers that are used; by default all.
    """
    if pixels.dtype.kind == "b":
        return ~pixels
    if pixels.dtype.kind != "u" or pixels.itemsize > 2:
        return pixels
    return pixels.dtype.type((1 << (bits or 8 * pixels.itemsize)) - 1) - pixels


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels (H, W) or (H, W, C) by an EXIF orientation, as `ImageOps.exif_transpose` does."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    down = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    across = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[down, across]


def _loses_depth(image: Image.Image) -> bool:
    """Returns whether Pillow would load more than 8 bits a channel into a mode that has 8."""
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB"):
        return False
    if max(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))) > 8:  # of TIFF
        return True
    raw_mode, largest = _unpacking(image)
    return largest > 255 if image.format == "PPM" else ";16" in raw_mode


def _unpacking(image: Image.Image) -> tuple[str, int]:
    """Returns Pillow's name for how pixels are stored, and the largest value that a PPM or PGM file states, or else 0.

    The name is empty, and the value 0, once the pixels are loaded.
    """
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ()
    parts = arguments if isinstance(arguments, tuple) else (arguments,)
    raw_mode = parts[0] if parts and isinstance(parts[0], str) else ""
    return raw_mode, parts[1] if image.format == "PPM" and len(parts) > 1 else 0


def _scale(image: Image.Image) -> float:
    """Returns the factor by which Pillow multiplies the grey values of a file, such as 17 at 4 bits."""
    raw_mode, largest = _unpacking(image)
    if image.mode in ("L", "I") and largest:
        return LARGEST["uint8" if image.mode == "L" else "uint16"] / largest
    return next((255 / (2**bits - 1) for bits in (2, 4) if raw_mode.startswith(f"L;{bits}")), 1.0)


def _is_garbled(image: Image.Image) -> bool:
    """Returns whether Pillow reads signed bytes of a TIFF as unsigned, swaps its bytes twice, or loses planes."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return False
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ()) and image.mode == "L"
    twice = tags.prefix == b"MM" and tags.get(COMPRESSION, UNCOMPRESSED) != UNCOMPRESSED and image.mode in ("I", "F")
    planar = tags.get(PLANAR_CONFIGURATION) == PLANES and image.mode == "LA"
    return signed or twice or planar


def _check_unread_bits(image: Image.Image) -> None:
    """Raises a ValueError for an open JPEG 2000 or AVIF file with more than 8 bits, which Pillow would change."""
    file = getattr(image, "fp", None)  # None once the pixels are loaded
    if file is None or image.format not in ("JPEG2000", "AVIF"):
        return
    place = file.tell()
    file.seek(0)
    bits = bits_per_channel(image.format, file.read())
    file.seek(place)
    if bits > 8 and (bits, image.mode) != (16, "I;16"):
        raise ValueError(f"Pillow would not keep the {bits} bits a channel of this {image.format} file; give the path.")


def _decode_tiff(data: bytes, request: Request) -> Decoded:
    orientation, whole = 1, False
    try:
        with _opened(data) as image:
            orientation, tags = _orientation(image), getattr(image, "tag_v2", {})
            whole = tags.get(SAMPLES_PER_PIXEL, 1) == len(image.getbands())  # Pillow merges unknown channels to one
            whole = whole and not _loses_depth(image) and not _is_garbled(image)
            if whole and getattr(image, "n_frames", 1) == 1 and not _states_planes(tags.get(DESCRIPTION)):
                return _from_pillow(image, request)
    except Image.UnidentifiedImageError:
        pass  # Pillow knows neither N channels nor float colour
    special = "TIFF files of several pages, more than 4 channels, or 16-bit or float colour"
    with scientific("tifffile", special).TiffFile(io.BytesIO(data)) as tiff:
        series = tiff.series[0]
        pages = len(tiff.pages)
        unread = max(0, pages - len(series.pages))
        if whole and series.ndim == 2 + (len(series.axes) > 2 and series.axes[-1] == "S"):
            with _opened(data) as image:  # the other pages are previews, or other images
                return replace(_from_pillow(image, request), pages=pages, unread_pages=unread)
        first = series.keyframe
        if first.photometric in OTHER_COLOURS:
            raise ValueError("its colours are CMYK or Lab of more than 8 bits, or of several pages; convert it to RGB.")
        pixels, separate = _planes(series, request)
        if is_premultiplied(first) and series.axes[-1] == "S":
            pixels = _straight(pixels)
        white_is_zero = first.photometric == WHITE_IS_ZERO
        if white_is_zero and request.reading == "image":
            grey = slice(1 if series.axes[-1] == "S" else None)  # other samples are alpha
            pixels[..., grey] = negative(pixels[..., grey], first.bitspersample)
        lossy = int(first.compression) in LOSSY_TIFF
        if orientation == 1:  # Pillow cannot open the file
            orientation = first.tags.valueof(EXIF_ORIENTATION, default=1)
        upright = _upright(pixels, orientation)
        return Decoded(upright, None, orientation, "TIFF", lossy, pages, unread, white_is_zero, separate)


def is_premultiplied(page: Any) -> bool:
    """Returns whether a page of `tifffile` holds integers of grey or colour that are multiplied by alpha."""
    alone = len(page.extrasamples) == 1 and page.samplesperpixel in (2, 4)
    return alone and int(page.extrasamples[0]) == ASSOCIATED_ALPHA and page.dtype in ("uint8", "uint16")


def _straight(pixels: np.ndarray) -> np.ndarray:
    """Divides the first channels of pixels (H, W, C), uint8 or uint16, by alpha, as Pillow does at 8 bits."""
    alpha, largest = pixels[..., -1:].astype(np.uint64), LARGEST[pixels.dtype.name]
    divided = np.minimum(pixels[..., :-1] * np.uint64(largest) // np.maximum(alpha, 1), largest)
    straight = np.where(alpha == 0, pixels[..., :-1], divided)
    return np.concatenate([straight, alpha], axis=2).astype(pixels.dtype)


def _states_planes(description: Any) -> bool:
    """Returns whether a TIFF of one page states that more planes follow, as large ImageJ stacks do."""
    text = description if isinstance(description, str) else ""
    return (text.startswith("ImageJ=") and "\nimages=" in text) or '"truncated"' in text


def _planes(series: Any, request: Request) -> tuple[np.ndarray, bool]:
    """Returns the stored pixels of a TIFF series, (H, W) or (H, W, C), and whether its pages are the channels."""
    sizes = [(axis, size) for axis, size in zip(series.axes, series.shape) if size > 1 or axis in "YX"]
    kept, shape = "".join(axis for axis, _ in sizes), tuple(size for _, size in sizes)
    others = kept.replace("Y", "").replace("X", "")
    if len(kept) != len(others) + 2 or len(others) > 1 or others.strip(CHANNEL_AXES):
        raise ValueError(
            f"its axes {series.axes} have the sizes {series.shape}, but an image has rows (Y), columns (X) and "
            "channels only; store each image or slice in a file of its own."
        )
    places = (kept.index("Y"), kept.index("X"), *map(kept.index, others))
    if places == (1, 2, 0) and others in UNNAMED_AXES:
        places = _places(shape, request, unnamed_pages=True)
    height, width, channels = (*(shape[place] for place in places), 1)[:3]
    _check_pixel_count(width, height, channels)
    return series.asarray().reshape(shape).transpose(places), others not in ("", "S") and places != (0, 1, 2)


def _checked(pixels: np.ndarray, name: str, of_mask: bool = False) -> np.ndarray:
    """Checks pixels (H, W) or (H, W, C), and returns them contiguous, (H, W, C), in one of the three dtypes.

    Masks of one channel may also be uint32, up to `LARGEST_OF_MASKS`.
    """
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        fix = "; store each image in a file or an array of its own" if pixels.ndim > 3 else ""
        raise ValueError(
            f"{name} has shape {pixels.shape}, but an image is (height, width), (height, width, channels) or "
            f"(channels, height, width){fix}."
        )
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise ValueError(f"{name} has pixels that are NaN or infinite{NOT_A_CLASS if of_mask else ''}.")
    elif pixels.dtype.kind not in "ui":
        raise ValueError(f"{name} holds {pixels.dtype}; images hold integers of up to 16 bits or floats.")
    elif pixels.dtype != np.uint8:
        low, high, numbers = pixels.min(), pixels.max(), of_mask and pixels.size == math.prod(pixels.shape[:2])
        largest = LARGEST_OF_MASKS if numbers else LARGEST["uint16"]
        if low < 0 or high > largest:
            if not of_mask:
                fix = "; convert them to float32, and give value_range"
            elif low < 0:
                fix = NOT_A_CLASS.replace("it stands", f"{low} stands")
            else:
                fix = RENUMBER if numbers else ""
            raise ValueError(f"{name} holds {low} to {high}, but integers must be from 0 to {largest}{fix}.")
        pixels = pixels.astype(np.uint16 if high <= LARGEST["uint16"] else np.uint32)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])
