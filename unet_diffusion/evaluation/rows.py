"""Sets of images or features that are read in parts, so that they need not fit into memory."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor


class Rows(Protocol):
    """A tensor (N, ...), or any object like it with a shape, a length, and `rows[first:end]`."""

    @property
    def shape(self) -> Sequence[int]:
        """Returns the number of rows, then the shape of a row."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, part: Any, /) -> Tensor: ...


def parts(rows: Rows, size: int) -> Iterator[Tensor]:
    """Yields the rows in order, `size` at a time."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
