"""Images that are read while training, for sets too large to be stored."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from unet_diffusion.data.cache import check_like_first, too_many_broken
from unet_diffusion.data.columns import class_names, image_reader
from unet_diffusion.data.crops import crop_and_flip
from unet_diffusion.data.shuffled_rows import Row, ShuffledRows, rows_of
from unet_diffusion.images.decoding import decode
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.randomness import keyed_generator

logger = logging.getLogger(__name__)

FEWEST_ROWS_JUDGED = 100  # the share of broken images is taken relative to at least this many


class StreamingImages(TorchIterableDataset):
    """One process's share of an endless stream of prepared images, in the order of `ShuffledRows`.

    All processes share one stream: each decodes only the rows at its own places, `batch_size` in a row. So every image
    is seen once an epoch, however the rows are spread over files. Processes, batch size and accumulation can be traded
    against each other without changing the images of a step. (If the files were divided among the processes, files with
    fewer rows would be seen more often.) The worker processes of a data loader take its batches in turn.

    A broken image is named in a warning, and the next usable one takes its place. So places in the stream are rows of
    the source, and skipping needs no decoding.

    Args:
        rows: the undecoded images, from `sets.shuffled`.
        preparation: conversion of every image before it is cut.
        size: height and width of the items.
        pixel_range: maps the stored values to [-1, 1].
        channels: number of channels of the prepared images.
        name: of the source, for messages.
        fingerprint: the fingerprint of the source and the preparation.
        seed: the seed of the run.
        flip: mirror each image left to right with probability 1/2.
        max_broken: share of broken images above which the stream stops.
        process_index: this process, counted from 0.
        num_processes: number of processes.

    Attributes:
        start: places of the stream to skip, over all epochs and processes; set it to resume.
        batch_size: consecutive places that belong to one process.
    """

    def __init__(
        self,
        rows: ShuffledRows,
        preparation: Preparation,
        size: tuple[int, int],
        pixel_range: PixelRange,
        *,
        channels: int,
        name: str,
        fingerprint: str,
        seed: int,
        flip: bool,
        max_broken: float,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.rows = rows
        self.class_names = class_names(rows.dataset)
        self.height, self.width = size
        self.channels = channels
        self.preparation = preparation
        self.pixel_range = pixel_range
        self.name = name
        self.fingerprint = fingerprint
        self.seed = seed
        self.flip = flip
        self.max_broken = max_broken
        self.process_index = process_index
        self.num_processes = num_processes
        self.start = 0
        self.batch_size = 1
        self._read = image_reader(rows.dataset)

    def ids(self) -> list[str]:
        """Returns no content hashes, since the images are known only once they are read."""
        return []

    def contents(self) -> list[str]:
        """Returns the fingerprint of the stream, since the contents of its images are not known."""
        return [self.fingerprint]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields items `{"image": Tensor (C, H, W) of the stored dtype, "label": int, -1 where there is none}`."""
        worker = get_worker_info()
        workers, mine = (1, 0) if worker is None else (worker.num_workers, worker.id)
        waiting: list[int] = []  # places of this process that have no image yet
        first = self.start // (self.batch_size * self.num_processes)  # batch of each process
        decoded = broken = 0
        for place, read in enumerate(self.rows.after(self.start), start=self.start):
            batch, process = divmod(place // self.batch_size, self.num_processes)
            if process == self.process_index and (batch - first) % workers == mine:
                waiting.append(place)
            if not waiting:
                continue
            decoded += 1
            row = read()
            try:
                stored = self._usable(row["image"])
            except ValueError as error:
                broken += 1
                logger.warning("left out of %s: %s", self.name, error)
                if broken > self.max_broken * max(decoded, FEWEST_ROWS_JUDGED):
                    raise ValueError(too_many_broken(broken, decoded, self.name, self.max_broken)) from error
                continue
            for each in waiting:
                generator = keyed_generator(self.seed, "augment", each)
                image = crop_and_flip(stored, (self.height, self.width), generator, flip=self.flip)
                yield {"image": torch.from_numpy(image), "label": self._label(row)}
            waiting.clear()

    def _usable(self, value: Any) -> np.ndarray:
        """Returns the prepared image (C, H, W); raises a ValueError if it cannot be used."""
        image = self.preparation(decode(self._read(value), axes=self.preparation.axes))
        check_like_first(image, self.channels, self.pixel_range.dtype)
        return np.moveaxis(image, 2, 0)

    def _label(self, row: Row) -> int:
        """Returns the class of a row, or `NO_LABEL`."""
        label = NO_LABEL if row.get("label") is None else int(row["label"])
        if self.class_names is not None and not NO_LABEL <= label < len(self.class_names):
            raise ValueError(
                f"a label of {self.name} is {label}, but there are {len(self.class_names)} classes, counted from 0; "
                "correct the labels, or the names of the classes."
            )
        return label


def first_usable(dataset: Dataset | IterableDataset, preparation: Preparation, name: str) -> np.ndarray:
    """Returns the first image (H, W, C) that can be decoded; the others must have its channels and dtype."""
    read = image_reader(dataset)
    problem = "it has no rows"
    for row in rows_of(dataset, name):
        try:
            return preparation(decode(read(row["image"]), axes=preparation.axes))
        except ValueError as error:
            problem = str(error)
    raise ValueError(f"{name} has no usable image: {problem}")
