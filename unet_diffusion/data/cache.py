"""Images that are decoded once and kept in a memory-mapped file, so that reading one only copies its pixels."""

import hashlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from filelock import FileLock

from unet_diffusion.data.columns import class_names, image_reader
from unet_diffusion.data.folders import CACHE, hash_of, states_of
from unet_diffusion.data.sources import cache_home, unwritable_cache
from unet_diffusion.files import remove_leftovers, written_aside
from unet_diffusion.images.decoding import DTypeName, decode, pixel_limit
from unet_diffusion.images.fetching import NotFetched
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.images.pixel_range import DTYPES
from unet_diffusion.images.resizing import Preparation

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)

FORMAT = 4  # of the files below; after a change, old caches are not read
ROWS_AT_ONCE = 256  # whose columns are read, but not decoded
ROWS_PER_TASK = 16  # of a thread; handing over small images one by one takes longer than decoding them
QUICK = 0.002  # seconds for a row; up to this, a task has several rows
MOST_AHEAD = 2  # tasks of each thread that are computed or wait, which bounds the memory
MOST_BROKEN = 10  # images named in messages
DIGEST_SIZE = 16  # bytes; even among billions of images, two different ones then have different digests


class ImageCache:
    """The usable images of one source, each (C, H, W), all with the same dtype and channels.

    Args:
        folder: written by `cache_images`. It holds `pixels.bin`, the values of one image after another, `sizes.npy`
            (N, 2), `labels.npy` (N,), `digests.npy` (N, 16) and `info.json`.
    """

    def __init__(self, folder: Path) -> None:
        info = json.loads((folder / "info.json").read_text())
        self.folder = folder
        self.fingerprint = folder.parent.name
        self.dtype: DTypeName = info["dtype"]
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}")
        self.channels: int = info["channels"]
        self.class_names: tuple[str, ...] | None = None if info["class_names"] is None else tuple(info["class_names"])
        self.broken: list[str] = info["broken"]  # a message for each image that was left out
        self.labels = np.load(folder / "labels.npy")  # int64 (N,)
        self.groups: list[str] | None = info["groups"]  # the name of each image's group
        self.digests = np.load(folder / "digests.npy")  # uint8 (N, 16): hash of each image as decoded, not prepared
        self.sizes = np.load(folder / "sizes.npy")  # int64 (N, 2): height and width
        self.pixels = PixelFile(folder / "pixels.bin", self.dtype, self.sizes, self.channels)

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> Any:
        return ImageCache, (self.folder,)  # a worker process maps the file again instead of receiving a copy of it

    def image(self, index: int) -> np.ndarray:
        """Returns an image (C, H, W), a read-only view of the file."""
        return self.pixels[index]

    def ids(self, rows: np.ndarray) -> list[str]:
        """Returns the content hash of each of the rows, the same for equal images whatever their files."""
        return hexadecimal(self.digests[rows])


class PixelFile:
    """Arrays of different sizes, one after another in a memory-mapped file.

    Args:
        path: of the file.
        dtype: of the values.
        sizes: int64 (N, 2), height and width of each array.
        channels: the arrays are (channels, H, W); None: (H, W).
    """

    def __init__(self, path: Path, dtype: str, sizes: np.ndarray, channels: int | None = None) -> None:
        self.path, self.dtype, self.sizes, self.channels = path, dtype, sizes, channels
        self.ends = np.cumsum(sizes.prod(axis=1) * (channels or 1))  # int64 (N,): end of each array, in values
        values = np.memmap(path, dtype=dtype, mode="r", shape=(int(self.ends[-1]),))
        self.values = values.view(np.ndarray)  # since slicing a memmap runs Python code

    def __reduce__(self) -> Any:
        return PixelFile, (self.path, self.dtype, self.sizes, self.channels)  # a worker process maps the file again

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns an array, a read-only view of the file."""
        height, width = self.sizes[index]
        shape = (height, width) if self.channels is None else (self.channels, height, width)
        return self.values[self.ends[index] - math.prod(shape) : self.ends[index]].reshape(shape)


def cache_images(
    dataset: datasets.Dataset, preparation: Preparation, name: str, max_broken: float, cache_dir: str | Path | None
) -> ImageCache:
    """Decodes and prepares all images of a source, or opens the cache that an earlier call wrote.

    If several processes call it at once, one decodes and the others wait. The folder's name is a hash of the rows, the
    names of their classes, the states of the files that they name, and the preparation, so no change of these is
    missed. Its parent folder is `unet_diffusion` in `cache_dir`, or else in the cache of `datasets`. If too many images
    are broken and some of them are remote, nothing is kept, so that the next call fetches them again.

    Raises:
        ValueError: too many images are broken, none is usable, or sizes differ and images are neither resized nor cut.
    """
    key = [FORMAT, source_key(dataset), class_names(dataset), preparation.to_dict()]
    folder = written_once("images", key, cache_dir, lambda aside: _write(dataset, preparation, name, max_broken, aside))
    cache = opened(ImageCache, folder)
    report_broken(cache, name, max_broken)
    return cache


def source_key(dataset: datasets.Dataset) -> str:
    """Returns a hash of the rows of a data set, and of the states of the local files that its images lie in."""
    states = states_of(files_of(dataset))
    return hash_of(dataset._fingerprint, states) if states else dataset._fingerprint


def files_of(dataset: datasets.Dataset) -> list[str]:
    """Returns the local files that image columns name, if the rows hold only paths."""
    files = []
    for name in dataset.features:
        column = dataset.data.column(name)
        while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            column = pyarrow.compute.list_flatten(column)
        if pyarrow.types.is_struct(column.type) and {field.name for field in column.type} == {"bytes", "path"}:
            outside = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes"))
            paths = pyarrow.compute.struct_field(column, "path").filter(outside).to_pylist()
            files += [local for path in paths if path is not None and (local := local_path(path)) is not None]
    return files


def present(dataset: datasets.Dataset, column: str) -> list[int]:
    """Returns the rows whose value in a column, such as one of masks, is not empty."""
    rows: list[int] = []
    start = 0
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        values = table[column]
        found = pyarrow.compute.is_valid(values)
        if pyarrow.types.is_struct(values.type) and {field.name for field in values.type} == {"bytes", "path"}:
            parts = [pyarrow.compute.is_valid(pyarrow.compute.struct_field(values, name)) for name in ("bytes", "path")]
            found = pyarrow.compute.or_(*parts)
        elif pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
            found = pyarrow.compute.greater(pyarrow.compute.fill_null(pyarrow.compute.list_value_length(values), 0), 0)
        rows += [start + row for row, filled in enumerate(found.to_pylist()) if filled]
        start += len(values)
    return rows


def local_path(place: str) -> str | None:
    """Returns the path of a file on this machine; None for a URL of anything else."""
    if place.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(urlsplit(place).path))
    return None if "://" in place else place


def content_digest(*arrays: np.ndarray) -> bytes:
    """Returns 16 bytes that depend on the dtype, the shape and the values of arrays, and on nothing else."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for array in arrays:
        digest.update(f"{array.dtype.name} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()


def hexadecimal(digests: np.ndarray) -> list[str]:
    """Returns digests, uint8 (N, 16), as text."""
    return [digest.tobytes().hex() for digest in digests]


def opened(kind: Callable[[Path], T], folder: Path) -> T:
    """Opens a folder of the cache; raises a ValueError if it was damaged after it was written."""
    try:
        return kind(folder)
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the cache {folder} is damaged: {type(error).__name__}: {error}; delete that folder to decode again."
        ) from error


def written_once(name: str, key: Any, cache_dir: str | Path | None, write: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache; `write` fills it unless an earlier call has done so.

    The name of its parent folder is a hash of `key`, the JSON values on which the contents depend, and of the pixel
    limit. `write` fills an empty folder, which is then renamed into place. Raises an OSError if the cache cannot be
    written.
    """
    home = cache_home(cache_dir) / CACHE
    home /= hashlib.sha256(json.dumps([key, pixel_limit()], sort_keys=True).encode()).hexdigest()[:32]
    folder = home / name
    try:
        if not folder.is_dir():
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / "lock"):
                if not folder.is_dir():
                    remove_leftovers(home, alone=True)
                    with written_aside(folder) as aside:
                        aside.mkdir()
                        write(aside)
    except OSError as error:
        raise unwritable_cache(error) from error
    return folder


def report_broken(cache: ImageCache, name: str, max_broken: float) -> None:
    """Warns of the images that were left out; raises a ValueError if their share is above `max_broken`."""
    _check_broken(cache.broken, len(cache), name, max_broken)
    for sentence in cache.broken[:MOST_BROKEN]:
        logger.warning("left out of %s: %s", name, sentence)
    if len(cache.broken) > MOST_BROKEN:
        logger.warning("left out of %s: %d more images", name, len(cache.broken) - MOST_BROKEN)


def _check_broken(broken: list[str], usable: int, name: str, max_broken: float) -> None:
    total = usable + len(broken)
    if len(broken) > max_broken * total:
        problem = too_many_broken(len(broken), total, name, max_broken)
        raise ValueError(f"{problem} {' '.join(broken[:MOST_BROKEN])}")


def too_many_broken(broken: int, total: int, name: str, max_broken: float) -> str:
    """Returns the error for a source whose share of broken images is above `max_broken`."""
    return (
        f"{broken} of the {total} images of {name} cannot be used, more than max_broken={max_broken} allows; repair or "
        "remove them, or raise max_broken."
    )


def check_same_kind(images: str, cache: ImageCache, others: str, channels: int, dtype: str) -> None:
    """Raises a ValueError unless the images of a cache have these channels and this dtype.

    The message is "IMAGES have 1 channels of uint8, but OTHERS 3 of uint8 ...", with a verb in `others`.
    """
    if (cache.channels, cache.dtype) != (channels, dtype):
        raise ValueError(
            f"{images} have {cache.channels} channels of {cache.dtype}, but {others} {channels} of {dtype}; "
            f"{_how_to_agree(cache.channels == channels, cache.dtype == dtype)}."
        )


def check_like_first(image: np.ndarray, channels: int, dtype: str) -> None:
    """Raises a ValueError unless an image (H, W, C) has the channels and the dtype of the first of its source."""
    if (image.shape[2], image.dtype.name) != (channels, dtype):
        raise ValueError(
            f"the image has {image.shape[2]} channels of {image.dtype}, but the first has {channels} of {dtype}; "
            f"{_how_to_agree(image.shape[2] == channels, image.dtype.name == dtype)}."
        )


def _how_to_agree(same_channels: bool, same_dtype: bool) -> str:
    """Returns the fix for images of different channels or data types."""
    dtype = [] if same_dtype else ["store all images in one data type"]
    return " and ".join(dtype + ([] if same_channels else ["give channels=1 or 3 to convert colours"]))


class ImageWriter:
    """A context manager that writes the files of an `ImageCache` into an empty folder, image by image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.all_fetched = True
        self.sizes: list[tuple[int, ...]] = []
        self.labels: list[int] = []
        self.digests: list[bytes] = []
        self.groups: list[str] = []
        self.first: np.ndarray | None = None

    def __enter__(self) -> "ImageWriter":
        self.file = open(self.folder / "pixels.bin", "wb")  # noqa: SIM115  (closed by __exit__)
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def check(self, image: np.ndarray) -> None:
        """Raises a ValueError unless an image (H, W, C) has the channels and the dtype of the first."""
        if self.first is not None:
            check_like_first(image, self.first.shape[2], self.first.dtype.name)

    def append(self, image: np.ndarray, digest: bytes, label: int | None = None, group: str | None = None) -> None:
        """Adds an image that has passed `check`. Either all images have a group, or none has."""
        self.first = image if self.first is None else self.first
        self.file.write(np.ascontiguousarray(image.transpose(2, 0, 1)).data)
        self.sizes.append(image.shape[:2])
        self.labels.append(NO_LABEL if label is None else label)
        self.digests.append(digest)
        self.groups += [] if group is None else [group]

    def leave_out(self, row: int, problem: ValueError) -> None:
        """Records that a row cannot be used."""
        self.broken.append(f"row {row}: {problem}")
        self.all_fetched &= not isinstance(problem, NotFetched)

    def finish(self, name: str, max_broken: float, class_names: tuple[str, ...] | None = None) -> None:
        """Writes the remaining files after the last image.

        Raises:
            ValueError: there is no image; or too many are broken and some of them could not be fetched.
        """
        if self.first is None:
            problems = " ".join(self.broken[:MOST_BROKEN])
            raise ValueError(f"{name} has no usable image among {len(self.broken)}. {problems}".rstrip())
        if not self.all_fetched:
            _check_broken(self.broken, len(self.sizes), name, max_broken)
        np.save(self.folder / "sizes.npy", np.array(self.sizes, dtype=np.int64))
        np.save(self.folder / "labels.npy", np.array(self.labels, dtype=np.int64))
        np.save(self.folder / "digests.npy", as_array(self.digests))
        info = {
            "name": name,
            "dtype": self.first.dtype.name,
            "channels": self.first.shape[2],
            "class_names": class_names,
            "groups": self.groups or None,
            "broken": self.broken,
        }
        (self.folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")


def as_array(digests: list[bytes]) -> np.ndarray:
    """Returns digests as an array, uint8 (N, 16)."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_SIZE)


def each_row(dataset: datasets.Dataset, prepare: Callable[[dict[str, Any]], T]) -> Iterator[T | ValueError]:
    """Calls `prepare` with each row in several threads; yields the results, or ValueErrors, in order.

    Threads take rows one by one, or several at once if these are quick, so that few large images are in memory.
    """

    def prepare_all(rows: list[dict[str, Any]]) -> tuple[list[T | ValueError], float]:
        results: list[T | ValueError] = []
        start = time.perf_counter()
        for row in rows:
            try:
                results.append(prepare(row))
            except ValueError as error:
                results.append(error)
        return results, time.perf_counter() - start

    def tasks() -> Iterator[list[dict[str, Any]]]:
        for columns in dataset.iter(batch_size=ROWS_PER_TASK):
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            while rows:
                task, rows = rows[:count], rows[count:]
                yield task

    count = 1  # rows of the next task
    for results, seconds in in_order(prepare_all, tasks()):
        count = ROWS_PER_TASK if seconds < QUICK * len(results) else 1
        yield from results


def in_order(compute: Callable[[S], T], values: Iterable[S]) -> Iterator[T]:
    """Calls `compute` with each value in several threads, and yields the results in order.

    Besides the result that is yielded, at most `MOST_AHEAD` values for each thread are computed or wait.
    """
    count = os.cpu_count() or 1
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(count) as threads:  # decoders and resizing release the GIL
        for value in values:
            waiting.append(threads.submit(compute, value))
            if len(waiting) > MOST_AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _write(dataset: datasets.Dataset, preparation: Preparation, name: str, max_broken: float, folder: Path) -> None:
    read, names = image_reader(dataset), class_names(dataset)

    def prepare(row: dict[str, Any]) -> tuple[np.ndarray, bytes, int | None, str | None]:
        label = row.get("label")
        if label is not None and names is not None and not NO_LABEL <= label < len(names):
            raise ValueError(f"its label is {label}, but must be from 0 to {len(names) - 1}, or -1 for none.")
        image = decode(read(row["image"]), axes=preparation.axes)
        return preparation(image), content_digest(image.pixels), label, row.get("group")

    with ImageWriter(folder) as writer:
        for row, prepared in enumerate(each_row(dataset, prepare)):
            if isinstance(prepared, ValueError):
                writer.leave_out(row, prepared)
                continue
            image, digest, label, group = prepared
            if preparation.image_size is None and preparation.crop == "center" and writer.first is not None:
                _check_same_size(image, writer.first, row)  # random crops are cut later, from images of any size
            try:
                writer.check(image)
            except ValueError as problem:
                writer.leave_out(row, problem)
            else:
                writer.append(image, digest, label, group)
        writer.finish(name, max_broken, names)


def _check_same_size(image: np.ndarray, first: np.ndarray, row: int) -> None:
    if image.shape[:2] != first.shape[:2]:
        sizes = ["x".join(map(str, each.shape[1::-1])) for each in (image, first)]
        raise ValueError(
            f"row {row} has {sizes[0]} pixels, but the rows before have {sizes[1]}; give image_size to resize them, or "
            "crop_size to train on pieces of one size."
        )
