"""Images decoded once and kept as a memory-mapped file, so that reading one is a copy of its pixels."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from filelock import FileLock

from unet_diffusion.data.sources import class_names, image_reader
from unet_diffusion.files import remove_leftovers, written_aside
from unet_diffusion.images.decoding import DTypeName, decode_image, pixel_limit
from unet_diffusion.images.labels import NO_LABEL
from unet_diffusion.images.pixel_range import DTYPES
from unet_diffusion.images.resizing import Preparation

T = TypeVar("T")

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files below; a change makes old caches unread
ROWS_AT_ONCE = 256  # read and decoded in parallel; bounds the memory
ROWS_A_TASK = 16  # of one thread: handing over small images one by one takes longer than decoding them
SHOWN = 10  # broken images named one by one


class ImageCache:
    """The usable images of one source, (C, H, W) each, all of one dtype and number of channels.

    Args:
        folder: written by `cache_images`. It holds `pixels.bin`, all values one image after the other, `sizes.npy`
            (N, 2), `labels.npy` (N,) and `info.json`.
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
        self.broken: list[str] = info["broken"]  # a sentence for each image that was left out
        self.labels = np.load(folder / "labels.npy")  # int64 (N,)
        self.sizes = np.load(folder / "sizes.npy")  # int64 (N, 2): height and width
        self.ends = np.cumsum(self.sizes.prod(axis=1) * self.channels)  # int64 (N,): where each image ends, in values
        values = np.memmap(folder / "pixels.bin", dtype=self.dtype, mode="r", shape=(int(self.ends[-1]),))
        self.values = values.view(np.ndarray)  # each slice of a memmap runs Python code

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> Any:
        return ImageCache, (self.folder,)  # a worker process maps the file again instead of receiving a copy of it

    def image(self, index: int) -> np.ndarray:
        """Image (C, H, W) as a read-only view of the file."""
        height, width = self.sizes[index]
        size = self.channels * height * width
        return self.values[self.ends[index] - size : self.ends[index]].reshape(self.channels, height, width)


def cache_images(
    dataset: datasets.Dataset, preparation: Preparation, name: str, max_broken: float, cache_dir: str | Path | None
) -> ImageCache:
    """Decodes and prepares all images of a source, or opens what an earlier call wrote.

    Processes that call it at once wait for the one that decodes. The folder's name is a hash of the source's
    fingerprint and the preparation, so that a change of either is never overlooked.

    Args:
        dataset: from `open_source`.
        preparation: what is done to every image before it is stored.
        name: of the source, for messages.
        max_broken: share of the images that may be unusable; each is named in a warning.
        cache_dir: parent of the folder; by default `unet_diffusion` in the cache of `datasets`.

    Raises:
        ValueError: if more images are broken, if none is usable, or if sizes differ and nothing is resized or cut.
    """
    key = [FORMAT, dataset._fingerprint, asdict(preparation)]
    folder = written_once("images", key, cache_dir, lambda aside: _write(dataset, preparation, name, aside))
    cache = opened(ImageCache, folder)
    report_broken(cache, name, max_broken)
    return cache


def opened(kind: Callable[[Path], T], folder: Path) -> T:
    """What was kept in a folder of the cache; ValueError if it has been damaged since it was written."""
    try:
        return kind(folder)
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the cache {folder} is damaged: {type(error).__name__}: {error}; delete that folder, and it is made anew."
        ) from error


def written_once(name: str, key: Any, cache_dir: str | Path | None, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `write` unless an earlier call did it.

    Args:
        name: of the folder; its parent's name is a hash of the key.
        key: JSON values that say all that the contents depend on, but for the limit of pixels, which is added here.
        cache_dir: as in `cache_images`.
        write: fills an empty folder; what it wrote is renamed into place when it returns.
    """
    home = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "unet_diffusion"
    home /= hashlib.sha256(json.dumps([key, pixel_limit()], sort_keys=True).encode()).hexdigest()[:32]
    folder = home / name
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock"):
            if not folder.is_dir():
                remove_leftovers(home)
                with written_aside(folder) as aside:
                    aside.mkdir()
                    write(aside)
    return folder


def report_broken(cache: ImageCache, name: str, max_broken: float) -> None:
    """Warns of each image that was left out; ValueError if they are more than the share `max_broken`."""
    total = len(cache) + len(cache.broken)
    if len(cache.broken) > max_broken * total:
        raise ValueError(
            f"{len(cache.broken)} of the {total} images of {name} cannot be used, more than max_broken={max_broken} "
            f"allows; repair or remove them, or raise max_broken. {' '.join(cache.broken[:SHOWN])}"
        )
    for sentence in cache.broken[:SHOWN]:
        logger.warning("left out of %s: %s", name, sentence)
    if len(cache.broken) > SHOWN:
        logger.warning("left out of %s: %d more images", name, len(cache.broken) - SHOWN)


class ImageWriter:
    """Writes the files of an `ImageCache`, one image after the other; use it in a `with`.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.sizes: list[tuple[int, ...]] = []
        self.labels: list[int] = []
        self.first: np.ndarray | None = None

    def __enter__(self) -> "ImageWriter":
        self.file = open(self.folder / "pixels.bin", "wb")  # noqa: SIM115  (closed by __exit__)
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def check(self, image: np.ndarray) -> None:
        """Raises ValueError unless an image (H, W, C) has the channels and the dtype of those before."""
        if self.first is None:
            return
        if image.shape[2] != self.first.shape[2]:
            raise ValueError(
                f"it has {image.shape[2]} channels, the images before {self.first.shape[2]}; "
                "channels=1 or 3 converts them."
            )
        if image.dtype != self.first.dtype:
            raise ValueError(f"its pixels are {image.dtype}, those of the images before {self.first.dtype}.")

    def append(self, image: np.ndarray, label: int | None = None) -> None:
        """Adds an image that `check` passed."""
        self.first = image if self.first is None else self.first
        self.file.write(np.ascontiguousarray(image.transpose(2, 0, 1)).data)
        self.sizes.append(image.shape[:2])
        self.labels.append(NO_LABEL if label is None else label)

    def leave_out(self, row: int, problem: ValueError) -> None:
        """Notes that a row cannot be used."""
        self.broken.append(f"row {row}: {problem}")

    def finish(self, name: str, class_names: tuple[str, ...] | None = None) -> None:
        """Writes what is known when all images are; ValueError if there is none."""
        if self.first is None:
            total = len(self.broken)
            raise ValueError(f"{name} has no usable image among {total}. {' '.join(self.broken[:SHOWN])}".rstrip())
        np.save(self.folder / "sizes.npy", np.array(self.sizes, dtype=np.int64))
        np.save(self.folder / "labels.npy", np.array(self.labels, dtype=np.int64))
        info = {
            "name": name,
            "dtype": self.first.dtype.name,
            "channels": self.first.shape[2],
            "class_names": class_names,
            "broken": self.broken,
        }
        (self.folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")


def each_row(dataset: datasets.Dataset, prepare: Callable[[dict[str, Any]], T]) -> Iterator[T | ValueError]:
    """What `prepare` makes of each row, in order, or the ValueError that it raised; several threads at once."""

    def prepare_all(rows: list[dict[str, Any]]) -> list[T | ValueError]:
        results: list[T | ValueError] = []
        for row in rows:
            try:
                results.append(prepare(row))
            except ValueError as error:
                results.append(error)
        return results

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoders and resizing release the interpreter's lock
        for columns in dataset.iter(batch_size=ROWS_AT_ONCE):
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            tasks = [rows[start : start + ROWS_A_TASK] for start in range(0, len(rows), ROWS_A_TASK)]
            yield from chain.from_iterable(threads.map(prepare_all, tasks))


def _write(dataset: datasets.Dataset, preparation: Preparation, name: str, folder: Path) -> None:
    read, names = image_reader(dataset), class_names(dataset)

    def prepare(row: dict[str, Any]) -> tuple[np.ndarray, int | None]:
        label = row.get("label")
        if label is not None and names is not None and not NO_LABEL <= label < len(names):
            raise ValueError(f"its label is {label}, but the classes are 0 to {len(names) - 1}, and -1 for none.")
        return preparation(decode_image(read(row["image"]))), label

    with ImageWriter(folder) as writer:
        for row, prepared in enumerate(each_row(dataset, prepare)):
            if isinstance(prepared, ValueError):
                writer.leave_out(row, prepared)
                continue
            image, label = prepared
            if preparation.image_size is None and preparation.crop == "center" and writer.first is not None:
                _check_same_size(image, writer.first, row)  # a random crop is cut later, from any size
            try:
                writer.check(image)
            except ValueError as problem:
                writer.leave_out(row, problem)
            else:
                writer.append(image, label)
        writer.finish(name, names)


def _check_same_size(image: np.ndarray, first: np.ndarray, row: int) -> None:
    if image.shape[:2] != first.shape[:2]:
        sizes = ["x".join(map(str, each.shape[1::-1])) for each in (image, first)]
        raise ValueError(
            f"row {row} has {sizes[0]} pixels, the rows before {sizes[1]}; give image_size to resize them, or "
            "crop_size to train on pieces of one size."
        )
