"""Connected parts of one value, in maps that are read block by block since they may be larger than memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

EDGES = ((0, 1), (1, 0))  # rows down and columns to the right; the other neighbours are the opposites
NEIGHBOURS = (*EDGES, (1, 1), (1, -1))
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Parts:
    """Connected parts of a map (H, W).

    Attributes:
        labels: integers (H, W), 0 for pixels in no part; a part that lies in several blocks has several labels.
        numbers: the number of each label's part, 0..n; that of label 0 is 0.
        sizes: the sizes of the parts, in pixels; that of part 0 is 0.
    """

    labels: Any
    numbers: np.ndarray
    sizes: np.ndarray

    def __getitem__(self, window: Any) -> np.ndarray:
        return self.numbers[self.labels[window]]


def blocks(shape: tuple[int, int], side: int) -> Iterator[Window]:
    """Yields the blocks of `side` pixels that cover a map (H, W), row by row; the last ones may be smaller."""
    for top in range(0, shape[0], side):
        for left in range(0, shape[1], side):
            yield slice(top, min(top + side, shape[0])), slice(left, min(left + side, shape[1]))


def grown(window: Window, by: int, shape: tuple[int, int]) -> tuple[Window, Window]:
    """Returns a window with `by` more pixels on each side, cut to the map (H, W), and the window's place in it."""
    larger = [slice(max(side.start - by, 0), min(side.stop + by, end)) for side, end in zip(window, shape)]
    inner = [slice(side.start - more.start, side.stop - more.start) for side, more in zip(window, larger)]
    return (larger[0], larger[1]), (inner[0], inner[1])


def steps(shape: tuple[int, ...], neighbours: tuple[tuple[int, int], ...]) -> Iterator[tuple[Window, Window]]:
    """Yields the windows of all pixels that have a neighbour in a direction, and of these neighbours."""
    rows, columns = shape
    for down, right in neighbours:
        left, right = max(-right, 0), max(right, 0)
        yield (
            (slice(0, rows - down), slice(left, columns - right)),
            (slice(down, rows), slice(right, columns - left)),
        )


def connected_parts(
    read: Callable[[Window], np.ndarray], shape: tuple[int, int], side: int, labels: Any, corners: bool = False
) -> Parts:
    """Finds the connected parts of one value, each block on its own, and joins them where blocks meet.

    Args:
        read: returns the values in a window, integers or bool; pixels of value 0 are in no part.
        shape: the shape of the map (H, W).
        side: of the blocks, in pixels.
        labels: array (H, W) of zeros, to which windows of labels are assigned.
        corners: whether pixels that touch only at a corner are connected too.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components as components_of_graph
    from skimage.measure import label

    sizes, pairs = [np.zeros(1, dtype=np.int64)], [np.zeros((2, 0), dtype=np.int64)]
    count = 0
    for block in blocks(shape, side):
        values = read(block)
        found = label(values, background=0, connectivity=2 if corners else 1)
        sizes.append(np.bincount(found.ravel())[1:])
        labels[block] = np.where(found > 0, found + count, 0)
        count += len(sizes[-1])
        if values.shape == shape:
            break
        window, _ = grown(block, 1, shape)  # later blocks have no labels yet
        values, found = read(window), np.asarray(labels[window])
        for first, second in steps(values.shape, NEIGHBOURS if corners else EDGES):
            one, other = found[first], found[second]
            meet = (one != other) & (one > 0) & (other > 0) & (values[first] == values[second])
            pairs.append(np.unique(np.stack([one[meet], other[meet]]).astype(np.int64), axis=1))
    one, other = np.concatenate(pairs, axis=1)
    graph = csr_array((np.ones(len(one), dtype=bool), (one, other)), shape=(count + 1, count + 1))
    numbers = components_of_graph(graph, directed=False)[1]  # in the order of the labels, so 0 stays 0
    return Parts(labels, numbers, np.bincount(numbers, np.concatenate(sizes)).astype(np.int64))
