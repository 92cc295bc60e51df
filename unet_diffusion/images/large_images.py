"""Images and masks too large for memory, read and written in windows: NumPy files, TIFF, Zarr, any array."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unet_diffusion.images.decoding import CHANNEL_AXES, LARGEST, UNNAMED_AXES, WHITE_IS_ZERO, negative, scientific
from unet_diffusion.images.pixel_size import PixelSize, pixel_size_of

CHUNK = 1024  # pixels a side of the chunks of a Zarr mask
LABEL_TILE = 512  # pixels a side of the tiles of a label image
BIG_TIFF = 2**32 - 2**25  # bytes from which a TIFF needs addresses of 64 bits
LABELS = "label images in tiles"
TIFF = "TIFF files in windows"
ZARR = "Zarr arrays and compressed TIFF files in windows"


@dataclass(frozen=True)
class Opened:
    """An array that has not been read yet."""

    array: Any
    axes: str  # a letter for each
    bits: int | None = None  # bits of the values if 0 is shown white, so black and white are swapped
    pixel_size: PixelSize | None = None


@dataclass(frozen=True)
class LargeImage:
    """An image from which any window can be read."""

    shape: tuple[int, int, int]  # (H, W, C)
    dtype: np.dtype
    read: Callable[[slice, slice], np.ndarray]  # (rows, columns, C) in memory, in the machine's byte order
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
            Zarr array; or any array (H, W) or (H, W, C) that has a shape and a dtype and can be sliced.
        channels: the expected number of channels. If only the first of three unnamed axes has this size, it is the
            channels; for the pages of a TIFF, so is the last axis.

    Raises:
        ValueError: the file is missing, damaged or of another format, or its shape is not that of an image.
        ImportError: for TIFF and Zarr without the extra `scientific`.
    """
    if not isinstance(source, (str, Path)):
        return _as_image(Opened(source, _axes(source, channels)), "the array")
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.suffix not in (".npy", ".zarr") and path.suffix.lower() not in (".tif", ".tiff"):
        raise ValueError(f"{path} cannot be read in windows; give a .npy, .tif or .zarr file, or an array.")
    try:
        opened = _open_file(path, channels)
    except ImportError:
        raise
    except Exception as error:  # every library reports damaged files in its own way
        raise ValueError(f"{path} cannot be read: {error}; it is damaged, or not what its name says.") from error
    return _as_image(opened, str(path))


def _open_file(path: Path, channels: int | None) -> Opened:
    """Opens the array in a file without reading it."""
    if path.suffix == ".npy":
        mapped = MappedFile(lambda: np.lib.format.open_memmap(path, mode="r"))  # refuses pickled Python objects
        return Opened(mapped, _axes(mapped, channels))
    if path.suffix == ".zarr":
        array = scientific("zarr", ZARR).open_array(path, mode="r")
        return Opened(array, _axes(array, channels))
    tifffile = scientific("tifffile", TIFF)
    with tifffile.TiffFile(path) as tiff:
        axes, first, size = tiff.series[0].axes, tiff.series[0].keyframe, pixel_size_of(tiff)
    try:
        array = MappedFile(lambda: tifffile.memmap(path, mode="r"))
    except ValueError:  # compressed
        array = CompressedTiff(path)
    if axes[0] in UNNAMED_AXES and len(axes) == 3 and array.shape[0] != channels == array.shape[2]:
        axes = "YXC"
    return Opened(array, axes, first.bitspersample if first.photometric == WHITE_IS_ZERO else None, size)


def _axes(array: Any, channels: int | None) -> str:
    if len(array.shape) == 3 and array.shape[2] != channels == array.shape[0]:
        return "CYX"
    return "YX" if len(array.shape) == 2 else "YXC"


def create_mask(path: Path, height: int, width: int) -> Any:
    """Creates a mask uint8 (H, W) to which windows can be assigned; the suffix sets the format: .npy, .tif or .zarr.

    Raises:
        ValueError: the suffix is another one.
        ImportError: for TIFF and Zarr without the extra `scientific`.
    """
    shape = (height, width)
    if path.suffix == ".npy":
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        return MappedFile(lambda: np.load(path, mmap_mode="r+", allow_pickle=False))
    if path.suffix == ".zarr":
        return scientific("zarr", ZARR).create_array(path, shape=shape, chunks=(CHUNK, CHUNK), dtype="uint8")
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile = scientific("tifffile", TIFF)
        tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="minisblack")
        return MappedFile(lambda: tifffile.memmap(path, mode="r+"))
    raise ValueError(f"{path} cannot be written in windows; end its name with .npy, .tif or .zarr.")


class ScratchArrays:
    """Creates arrays of zeros in files of a folder, with only the window in use in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, shape: tuple[int, ...], dtype: Any) -> MappedFile:
        """Returns a new array; raises an OSError if the disk has no room for it."""
        path = self.folder / str(self.count)
        self.count += 1
        length = math.prod(shape) * np.dtype(dtype).itemsize
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a full disk raises an error here; later it would kill the process
                os.posix_fallocate(file.fileno(), 0, length)
            else:
                file.truncate(length)
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
    dtype = np.dtype(array.dtype).newbyteorder("=")

    def read(rows: slice, columns: slice) -> np.ndarray:
        place = tuple({"Y": rows, "X": columns}.get(axis, slice(None)) for axis in axes)
        window = np.array(array[place], dtype=dtype)  # a copy, so that no file stays mapped
        window = window if opened.bits is None else negative(window, opened.bits)
        return np.moveaxis(window, axes.index(others), -1) if others else window[..., None]

    return LargeImage((sizes["Y"], sizes["X"], sizes.get(others, 1)), dtype, read, opened.pixel_size)
