"""The rows of a source as an endless sequence, shuffled again in every epoch, starting at any place.

Places count the rows over all epochs. Which row lies at a place depends on the seed and the place alone.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, IterableDataset

from unet_diffusion.data.columns import class_names
from unet_diffusion.data.sources import damaged
from unet_diffusion.data.tables import RowGroups
from unet_diffusion.randomness import keyed_permutation

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PIECES = 10  # of row groups that are mixed, or more


class ShuffledRows(Protocol):
    """The rows of a source, with an undecoded column `image` and, if there are classes, a column `label`."""

    @property
    def dataset(self) -> Dataset | IterableDataset:
        """Returns the rows in their own order."""
        ...

    def after(self, start: int) -> Iterator[Callable[[], Row]]:
        """Yields endlessly, for each place from `start` on, a function that reads its row."""
        ...


@dataclass(frozen=True)
class IndexedRows:
    """Rows that can be read one by one; an epoch is a permutation of all of them.

    Args:
        dataset: the rows.
        name: the name of the source, for messages.
        seed: the seed of the run.
    """

    dataset: Dataset
    name: str
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def after(self, start: int) -> Iterator[Callable[[], Row]]:
        """Yields a function that reads the row at each place; nothing before `start` is read."""
        epoch, first = divmod(start, len(self))
        while True:
            order = keyed_permutation(len(self), self.seed, "order", epoch)
            for index in order[first:].numpy():
                yield partial(self._read, int(index))
            epoch, first = epoch + 1, 0

    def _read(self, index: int) -> Row:
        with named_damage(self.name):
            return self.dataset[index]


@dataclass(frozen=True)
class RowsOfGroups:
    """Rows of Parquet files, whose row groups can be read one by one.

    An epoch consists of windows of about `shuffle_buffer` rows. Each window holds ten or more pieces of row groups from
    all over the files, and is shuffled. One window at a time is in memory.

    Args:
        dataset: the rows as a stream, for their columns.
        groups: the rows.
        name: of the source, for messages.
        seed: of the run.
        shuffle_buffer: number of rows of a window.
    """

    dataset: IterableDataset
    groups: RowGroups
    name: str
    seed: int
    shuffle_buffer: int

    def __len__(self) -> int:
        return len(self.groups)

    def after(self, start: int) -> Iterator[Callable[[], Row]]:
        """Yields a function that reads the row at each place; windows before that of `start` are not read."""
        epoch, first = divmod(start, len(self))
        while True:
            for number, pieces in enumerate(self._windows(epoch)):
                window = _Window(self.groups, pieces, self.name)
                order = keyed_permutation(len(window), self.seed, "window", epoch, number)
                for index in order[first:].tolist():
                    yield partial(window.row, index)
                first = max(0, first - len(window))
            epoch += 1

    def _windows(self, epoch: int) -> "list[list[Piece]]":
        step = max(1, self.shuffle_buffer // PIECES)
        pieces = [
            Piece(number, first, min(first + step, group.size))
            for number, group in enumerate(self.groups.groups)
            for first in range(0, group.size, step)
        ]
        order = keyed_permutation(len(pieces), self.seed, "order", epoch).numpy()
        count = min(max(1, len(self) // self.shuffle_buffer), len(pieces))
        return [[pieces[index] for index in part] for part in np.array_split(order, count)]


@dataclass(frozen=True, order=True)
class Piece:
    """The rows from `first` to `end`, without `end` itself, of row group `group`."""

    group: int
    first: int
    end: int


class _Window:
    """Pieces of row groups, which are read when one of their rows is first needed."""

    def __init__(self, groups: RowGroups, pieces: list[Piece], name: str) -> None:
        self.groups, self.pieces, self.name = groups, sorted(pieces), name

    def __len__(self) -> int:
        return sum(piece.end - piece.first for piece in self.pieces)

    def row(self, index: int) -> Row:
        """Returns a row of the window."""
        return self._rows[index]

    @cached_property
    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        with named_damage(self.name):
            for group, pieces in groupby(self.pieces, key=lambda piece: piece.group):
                wanted = {row for piece in pieces for row in range(piece.first, piece.end)}
                rows += self.groups.read(group, wanted)
        return rows


@dataclass(frozen=True)
class BufferedRows:
    """Rows that can only be read in order, such as those of tar files; each is drawn from a buffer of rows.

    The files are shuffled too. A warning tells if the buffer hardly mixes the classes.

    Args:
        dataset: the rows.
        name: of the source, for messages.
        seed: of the run.
        shuffle_buffer: number of rows of the buffer.
    """

    dataset: IterableDataset
    name: str
    seed: int
    shuffle_buffer: int

    def after(self, start: int) -> Iterator[Callable[[], Row]]:
        """Yields a function that returns the row at each place.

        To find the row of `start`, the first epoch is read to count its rows, and then the epoch of `start` is read up
        to there.
        """
        if start:
            logger.warning("%s has no index, so that its rows are read again up to the place to resume at", self.name)
        shuffled = self.dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        epoch, skipped = 0, start  # rows of the epoch that lie before the place to start at
        labels: list[int | None] = []
        while True:
            shuffled.set_epoch(epoch)
            length = 0
            for length, row in enumerate(rows_of(shuffled, self.name), start=1):
                if epoch == 0 and length <= self.shuffle_buffer // 2:  # drawn from the first rows of the buffer
                    labels.append(row.get("label"))
                    if length == self.shuffle_buffer // 2:
                        self._judge(labels)
                if length > skipped:
                    yield partial(_same, row)
            if not length:
                raise ValueError(f"{self.name} has no rows.")
            epoch, skipped = (epoch + skipped // length, skipped % length) if skipped >= length else (epoch + 1, 0)

    def _judge(self, labels: list[int | None]) -> None:
        """Warns if the first rows hold less than half of the classes that as many rows in random order would."""
        classes = len(class_names(self.dataset) or ())
        found = len({*labels} - {None, -1})
        if classes and 0 < found < classes * (1 - (1 - 1 / classes) ** len(labels)) / 2:
            logger.warning(
                "the first %d rows of %s hold %d of its %d classes, as if they were sorted. It has no index, so that "
                "only the %d rows of the buffer are mixed: store it as a folder of images, Parquet or Arrow, or raise "
                "shuffle_buffer.",
                *(len(labels), self.name, found, classes, self.shuffle_buffer),
            )


def _same(row: Row) -> Row:
    return row


def rows_of(dataset: Dataset | IterableDataset, name: str) -> Iterator[Row]:
    """Yields the rows in their order, which does not depend on whether a worker process reads them."""
    with named_damage(name):
        for columns in dataset.iter(batch_size=1):
            yield {column: values[0] for column, values in columns.items()}


@contextmanager
def named_damage(name: str) -> Iterator[None]:
    """Replaces any error while rows are read by a ValueError that names the source."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each library raises its own errors on damaged files
        raise damaged(name, error) from error
