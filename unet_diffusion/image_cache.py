"""Pictures decoded once and kept as a memory-mapped file, so that reading one is a copy of its pixels."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
from filelock import FileLock

from unet_diffusion.atomic import remove_leftovers, written_aside
from unet_diffusion.pixels import DTypeName, decode_image
from unet_diffusion.resizing import Preparation
from unet_diffusion.sources import class_names, picture_reader

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files below; a change makes old caches unread
NO_LABEL = -1
ROWS_AT_ONCE = 256  # read and decoded in parallel; bounds the memory
ROWS_A_TASK = 16  # of one thread: handing over small pictures one by one takes longer than decoding them
SHOWN = 10  # broken pictures named one by one


class ImageCache:
    """The usable pictures of one source, (C, H, W) each, all of one dtype and number of channels.

    Args:
        folder: written by `cache_images`. It holds `pixels.bin`, all values one picture after the other, `sizes.npy`
            (N, 2), `labels.npy` (N,) and `info.json`.
    """

    def __init__(self, folder: Path) -> None:
        info = json.loads((folder / "info.json").read_text())
        self.folder = folder
        self.fingerprint = folder.parent.name
        self.dtype: DTypeName = info["dtype"]
        self.channels: int = info["channels"]
        self.class_names: tuple[str, ...] | None = None if info["class_names"] is None else tuple(info["class_names"])
        self.broken: list[str] = info["broken"]  # a sentence for each picture that was left out
        self.labels = np.load(folder / "labels.npy")  # int64 (N,)
        self.sizes = np.load(folder / "sizes.npy")  # int64 (N, 2): height and width
        self.ends = np.cumsum(self.sizes.prod(axis=1) * self.channels)  # int64 (N,): where each picture ends, in values
        self.values = np.memmap(folder / "pixels.bin", dtype=self.dtype, mode="r", shape=(int(self.ends[-1]),))

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> Any:
        return ImageCache, (self.folder,)  # a worker process maps the file again instead of receiving a copy of it

    def picture(self, index: int) -> np.ndarray:
        """Picture (C, H, W) as a read-only view of the file."""
        height, width = self.sizes[index]
        size = self.channels * height * width
        return self.values[self.ends[index] - size : self.ends[index]].reshape(self.channels, height, width)


def cache_images(
    dataset: datasets.Dataset, preparation: Preparation, name: str, max_broken: float, cache_dir: str | Path | None
) -> ImageCache:
    """Decodes and prepares all pictures of a source, or opens what an earlier call wrote.

    Processes that call it at once wait for the one that decodes. The folder's name is a hash of the source's
    fingerprint and the preparation, so that a change of either is never overlooked.

    Args:
        dataset: from `open_source`.
        preparation: what is done to every picture before it is stored.
        name: of the source, for messages.
        max_broken: share of the pictures that may be unusable; each is named in a warning.
        cache_dir: parent of the folder; by default `unet_diffusion` in the cache of `datasets`.

    Raises:
        ValueError: if more pictures are broken, if none is usable, or if sizes differ and nothing is resized.
    """
    key = json.dumps([FORMAT, dataset._fingerprint, asdict(preparation)], sort_keys=True)
    home = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "unet_diffusion"
    home /= hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = home / "pictures"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "lock"):
            if not folder.is_dir():
                remove_leftovers(home)
                with written_aside(folder) as aside:
                    aside.mkdir()
                    _write(dataset, preparation, name, aside)
    cache = ImageCache(folder)
    total = len(cache) + len(cache.broken)
    if len(cache.broken) > max_broken * total:
        raise ValueError(
            f"{len(cache.broken)} of the {total} pictures of {name} cannot be used, more than max_broken={max_broken} "
            f"allows; repair or remove them, or raise max_broken. {' '.join(cache.broken[:SHOWN])}"
        )
    for sentence in cache.broken[:SHOWN]:
        logger.warning("left out of %s: %s", name, sentence)
    if len(cache.broken) > SHOWN:
        logger.warning("left out of %s: %d more pictures", name, len(cache.broken) - SHOWN)
    return cache


def _write(dataset: datasets.Dataset, preparation: Preparation, name: str, folder: Path) -> None:
    broken: list[str] = []
    sizes: list[tuple[int, ...]] = []
    labels: list[int] = []
    first: np.ndarray | None = None
    with open(folder / "pixels.bin", "wb") as file:
        for row, (picture, label) in enumerate(_decoded(dataset, preparation)):
            if isinstance(picture, np.ndarray):
                first = picture if first is None else first
                picture = _same_kind(picture, first, preparation, row)
            if isinstance(picture, ValueError):
                broken.append(f"row {row}: {picture}")
                continue
            _append(file, picture)
            sizes.append(picture.shape[:2])
            labels.append(NO_LABEL if label is None else label)
    if first is None:
        raise ValueError(f"{name} has no usable picture among {len(dataset)}. {' '.join(broken[:SHOWN])}".rstrip())
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64))
    np.save(folder / "labels.npy", np.array(labels, dtype=np.int64))
    info = {
        "name": name,
        "dtype": first.dtype.name,
        "channels": first.shape[2],
        "class_names": class_names(dataset),
        "broken": broken,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")


def _decoded(
    dataset: datasets.Dataset, preparation: Preparation
) -> Iterator[tuple[np.ndarray | ValueError, int | None]]:
    """Pictures (H, W, C) or what is wrong with them, and their labels, in order."""
    read = picture_reader(dataset)

    def prepare(value: Any) -> np.ndarray | ValueError:
        try:
            return preparation(decode_image(read(value)))
        except ValueError as error:
            return error

    def prepare_all(values: list[Any]) -> list[np.ndarray | ValueError]:
        return [prepare(value) for value in values]

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # decoders and resizing release the interpreter's lock
        for rows in dataset.iter(batch_size=ROWS_AT_ONCE):
            values = rows["image"]
            tasks = [values[start : start + ROWS_A_TASK] for start in range(0, len(values), ROWS_A_TASK)]
            pictures = chain.from_iterable(threads.map(prepare_all, tasks))
            yield from zip(pictures, rows.get("label", [None] * len(values)))


def _same_kind(picture: np.ndarray, first: np.ndarray, preparation: Preparation, row: int) -> np.ndarray | ValueError:
    if preparation.image_size is None and picture.shape[:2] != first.shape[:2]:
        sizes = ["x".join(map(str, each.shape[1::-1])) for each in (picture, first)]
        raise ValueError(
            f"row {row} has {sizes[0]} pixels, the rows before {sizes[1]}; give image_size to resize them."
        )
    if picture.shape[2] != first.shape[2]:
        return ValueError(
            f"it has {picture.shape[2]} channels, the pictures before {first.shape[2]}; channels=1 or 3 converts them."
        )
    if picture.dtype != first.dtype:
        return ValueError(f"its pixels are {picture.dtype}, those of the pictures before {first.dtype}.")
    return picture


def _append(file: BinaryIO, picture: np.ndarray) -> None:
    file.write(np.ascontiguousarray(np.moveaxis(picture, 2, 0)).data)
