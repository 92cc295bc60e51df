"""Images and masks too large for memory, read and written in windows: NumPy files, TIFF, Zarr, any array."""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from unet_diffusion.images.decoding import (
    CHANNEL_AXES,
    EXIF_ORIENTATION,
    LARGEST,
    OTHER_COLOURS,
    UNNAMED_AXES,
    WHITE_IS_ZERO,
    is_premultiplied,
    negative,
    scientific,
)
from unet_diffusion.images.headers import LOSSY_TIFF
from unet_diffusion.images.pixel_size import PixelSize, pixel_size_of

CHUNK = 1024  # pixels a side of the chunks of a Zarr mask
LABEL_TILE = 512  # pixels a side of the tiles of a label image
LARGE_PART = 2**26  # bytes of a tile or strip, read for every window that it touches, from which a warning is due
PALETTE_INDICES = 3  # value of the tag PHOTOMETRIC: the pixels are indices of a table of colours
YCBCR = 6  # value of the tag PHOTOMETRIC; lossy compression converts such colours from RGB and back by itself
BIG_TIFF = 2**32 - 2**25  # bytes from which a TIFF needs addresses of 64 bits
LABELS = "label images in tiles"
TIFF = "TIFF files in windows"
ZARR = "Zarr arrays and compressed TIFF files in windows"
WINDOW_SUFFIXES = (".npy", ".zarr", ".tif", ".tiff")


@dataclass(frozen=True)
class Opened:
    """An array that has not been read yet."""

    array: Any
    axes: str  # a letter for each
    bits: int | None = None  # bits of the values if 0 is shown white, so black and white are swapped
    pixel_size: PixelSize | None = None
    unlike: str = ""  # how the file is shown otherwise than its values are stored, and the fix


@dataclass(frozen=True)
class LargeImage:
    """An image from which any window can be read."""

    shape: tuple[int, int, int]  # (H, W, C)
    dtype: np.dtype  # float32 for floats of any width
    read: Callable[[slice, slice], np.ndarray]  # finite (rows, columns, C) in memory, in the machine's byte order
    pixel_size: PixelSize | None = None  # height and width in micrometres, if the file states them


class MappedFile:
    """An array in a file. `map_file` maps it again for every window, so that read pages do not stay in memory."""

    def __init__(self, map_file: Callable[[], np.ndarray]) -> None:
        self.map_file = map_file
        mapped = map_file()
        self.shape, self.dtype = mapped.shape, mapped.dtype

    def __getitem__(self, window: Any) -> np.ndarray:
        return self.map_file()[window]

    def __setitem__(self, window: Any, values: np.ndarray) -> None:
        self.map_file()[window] = values


class CompressedTiff:
    """The first series of a TIFF that cannot be mapped, opened again for every window so that no file stays open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as array:
            self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, window: Any) -> np.ndarray:
        with self._opened() as array:
            return array[window]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        with scientific("tifffile", TIFF).TiffFile(self.path) as tiff:
            yield scientific("zarr", ZARR).open_array(tiff.aszarr(level=0), mode="r")


def open_image(source: Any, channels: int | None = None) -> LargeImage:
    """Opens an image without reading it.

    Args:
        source: path of a `.npy` file, a TIFF (memory-mapped if it is not compressed, else read by tiles or strips) or a
            Zarr array, such as `image.ome.zarr/0`; or any array (H, W) or (H, W, C) that has a shape and a dtype and
            can be sliced.
        channels: the expected number of channels. If only the first of three unnamed axes has this size, it is the
            channels; for the pages of a TIFF, so is the last axis.

    Raises:
        ValueError: the file is missing, damaged or of another format, or its shape is not that of an image. Or a TIFF
            is to be shown turned, or with other colours or values than it stores. `read` raises it for NaN and
            infinity.
        ImportError: for TIFF and Zarr without the extra `scientific`.
    """
    if not isinstance(source, (str, Path)):
        return _as_image(Opened(source, _axes(source, channels)), "the array")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.suffix.lower() not in WINDOW_SUFFIXES and not _is_zarr(path):
        raise ValueError(f"{path} cannot be read in windows; give a .npy, .tif or .zarr file, or an array.")
    try:
        opened = _open_file(path, channels)
    except (ImportError, NotAnArray):
        raise
    except Exception as error:  # every library reports damaged files in its own way
        raise ValueError(f"{path} cannot be read: {error}; it is damaged, or not what its name says.") from error
    if opened.unlike:
        raise ValueError(f"{path} {opened.unlike}, or segment it whole if it fits in memory.")
    return _as_image(opened, str(path))


class NotAnArray(ValueError):
    """A folder that holds several arrays."""


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _open_file(path: Path, channels: int | None) -> Opened:
    """Opens the array in a file without reading it."""
    if path.suffix.lower() == ".npy":
        mapped = MappedFile(lambda: np.lib.format.open_memmap(path, mode="r"))  # refuses pickled Python objects
        return Opened(mapped, _axes(mapped, channels))
    if path.suffix.lower() == ".zarr" or _is_zarr(path):
        zarr = scientific("zarr", ZARR)
        array = zarr.open(path, mode="r")
        if isinstance(array, zarr.Group):
            names = ", ".join(str(path / name) for name in sorted(array.array_keys())) or "it has none itself"
            raise NotAnArray(f"{path} is a group of Zarr arrays, as in OME-Zarr; give one of them: {names}.")
        return Opened(array, _axes(array, channels))
    tifffile = scientific("tifffile", TIFF)
    with tifffile.TiffFile(path) as tiff:
        axes, first, size = tiff.series[0].axes, tiff.series[0].keyframe, pixel_size_of(tiff)
        unlike = _unlike(first)
    try:
        array = MappedFile(lambda: tifffile.memmap(path, mode="r"))
    except ValueError:  # compressed
        array = CompressedTiff(path)
        part = math.prod(first.chunks) * first.dtype.itemsize
        if part > LARGE_PART:
            logging.getLogger(__name__).warning(
                "%s is compressed in parts of %d MiB, each of which is decoded for every window that it touches; store "
                "it in tiles to save time and memory",
                path,
                part >> 20,
            )
    if axes[0] in UNNAMED_AXES and len(axes) == 3 and array.shape[0] != channels == array.shape[2]:
        axes = "YXC"
    return Opened(array, axes, first.bitspersample if first.photometric == WHITE_IS_ZERO else None, size, unlike)


def _unlike(page: Any) -> str:
    """Returns how a page of a TIFF is shown otherwise than it is stored, and the fix; empty if it is shown so.

    `decode_image` converts such images whole.
    """
    orientation = page.tags.valueof(EXIF_ORIENTATION, default=1)
    if orientation != 1:
        return f"is stored turned or mirrored (orientation {orientation}); store it upright"
    if page.bitspersample in (2, 4):
        return f"has {page.bitspersample} bits a value, which are scaled to 8 to be shown; store it with 8 bits"
    if is_premultiplied(page):
        return "holds values that are multiplied by alpha; store them as they are (unassociated alpha)"
    if page.photometric == PALETTE_INDICES:
        return "holds indices of a table of colours; convert it to RGB"
    if page.photometric in OTHER_COLOURS or (page.photometric == YCBCR and int(page.compression) not in LOSSY_TIFF):
        return f"holds colours as {page.photometric.name}; convert it to RGB"
    return ""


def _axes(array: Any, channels: int | None) -> str:
    if len(array.shape) == 3 and array.shape[2] != channels == array.shape[0]:
        return "CYX"
    return "YX" if len(array.shape) == 2 else "YXC"


def create_mask(path: Path, height: int, width: int) -> Any:
    """Creates a mask uint8 (H, W) to which windows can be assigned; the suffix sets the format: .npy, .tif or .zarr.

    Raises:
        ValueError: the suffix is another one; upper and lower case are the same.
        OSError: the disk has no room for it.
        ImportError: for TIFF and Zarr without the extra `scientific`.
    """
    check_mask_name(path)
    shape = (height, width)
    if path.suffix.lower() == ".zarr":
        return scientific("zarr", ZARR).create_array(path, shape=shape, chunks=(CHUNK, CHUNK), dtype="uint8")
    if path.suffix.lower() == ".npy":
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        mask = MappedFile(lambda: np.load(path, mmap_mode="r+", allow_pickle=False))
    else:
        tifffile = scientific("tifffile", TIFF)
        tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="minisblack")
        mask = MappedFile(lambda: tifffile.memmap(path, mode="r+"))
    with open(path, "r+b") as file:
        _reserve(file, path.stat().st_size)
    return mask


def check_mask_name(path: Path) -> None:
    """Raises a ValueError unless `create_mask` has a format for the suffix."""
    if path.suffix.lower() not in WINDOW_SUFFIXES:
        raise ValueError(f"{path} cannot be written in windows; end its name with .npy, .tif or .zarr.")


def _reserve(file: IO[bytes], length: int) -> None:
    """Gives a file its length and room on the disk.

    A full disk raises an OSError here; later, when the mapped file is written to, it would kill the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, length)
    else:
        file.truncate(length)


class ScratchArrays:
    """Creates arrays of zeros in files of a folder, with only the window in use in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> MappedFile:
        """Returns a new array; raises an OSError if the disk has no room for it."""
        path = self.folder / str(self.count)
        self.count += 1
        with open(path, "wb") as file:
            _reserve(file, math.prod(shape) * np.dtype(dtype).itemsize)
        return MappedFile(lambda: np.memmap(path, dtype, "r+", shape=shape))


def check_label_format() -> None:
    """Raises an ImportError if the extra `scientific`, which label images need, is not installed."""
    scientific("tifffile", LABELS)


def write_labels(path: Path, labels: Any, largest: int) -> None:
    """Writes a label image (H, W) tile by tile, as a compressed TIFF: uint16, or uint32 if a number is above 65535.

    Raises:
        ImportError: without the extra `scientific`.
    """
    dtype = np.dtype(np.uint16 if largest <= LARGEST["uint16"] else np.uint32)
    height, width = labels.shape

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, height, LABEL_TILE):
            for left in range(0, width, LABEL_TILE):
                part = labels[top : top + LABEL_TILE, left : left + LABEL_TILE]
                tile = np.zeros((LABEL_TILE, LABEL_TILE), dtype)
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile

    scientific("tifffile", LABELS).imwrite(
        path,
        tiles(),
        shape=(height, width),
        dtype=dtype,
        tile=(LABEL_TILE, LABEL_TILE),
        compression="zlib",
        photometric="minisblack",
        metadata=None,
        bigtiff=height * width * dtype.itemsize > BIG_TIFF,
    )


def _as_image(opened: Opened, name: str) -> LargeImage:
    """Wraps an array whose axes are Y, X and at most one more."""
    array, axes = opened.array, opened.axes
    sizes = dict(zip(axes, array.shape))
    others = axes.replace("Y", "").replace("X", "")
    named = len(array.shape) == len(axes) == len(others) + 2 and len(others) <= 1 and not others.strip(CHANNEL_AXES)
    if not named or 0 in array.shape or np.dtype(array.dtype).kind not in "buif":
        raise ValueError(
            f"{name} has shape {tuple(array.shape)} of {array.dtype} and axes {axes}; "
            "an image is (height, width) or has channels as its only other axis, and holds numbers."
        )
    dtype = np.dtype(np.float32) if np.dtype(array.dtype).kind == "f" else np.dtype(array.dtype).newbyteorder("=")

    def read(rows: slice, columns: slice) -> np.ndarray:
        place = tuple({"Y": rows, "X": columns}.get(axis, slice(None)) for axis in axes)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused below
            window = np.array(array[place], dtype=dtype)  # a copy, so that no file stays mapped
        if dtype.kind == "f" and not np.isfinite(window).all():
            raise ValueError(f"{name} has pixels that are NaN or infinite; replace them.")
        window = np.moveaxis(window, axes.index(others), -1) if others else window[..., None]
        if opened.bits is not None:
            grey = slice(1 if others == "S" else None)  # other samples are alpha
            window[..., grey] = negative(window[..., grey], opened.bits)
        return window

    return LargeImage((sizes["Y"], sizes["X"], sizes.get(others, 1)), dtype, read, opened.pixel_size)
