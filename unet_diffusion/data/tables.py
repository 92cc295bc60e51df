"""Local Parquet and Arrow files, whose rows can be read without those before them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

ROWS_AT_ONCE = 64  # rows taken out of a row group; bounds the memory


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: the file, the group's number in it, and the number of first rows that are used."""

    file: str
    number: int
    size: int


@dataclass(frozen=True)
class RowGroups:
    """The rows of Parquet files, read one row group at a time.

    Attributes:
        groups: all row groups that are used, in the order of the files.
        columns: the names of columns in the files, by their names in the rows.
    """

    groups: tuple[RowGroup, ...]
    columns: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(group.size for group in self.groups)

    def first(self, count: int) -> "RowGroups":
        """Returns only the first rows."""
        kept, left = [], count
        for group in self.groups:
            if left > 0:
                kept.append(replace(group, size=min(group.size, left)))
            left -= group.size
        return replace(self, groups=tuple(kept))

    def read(self, group: int, wanted: Collection[int]) -> Iterator[dict[str, Any]]:
        """Yields the rows of a row group that are wanted by number, in ascending order."""
        place, first = self.groups[group], 0
        with pyarrow.parquet.ParquetFile(place.file) as file:
            for batch in file.iter_batches(
                ROWS_AT_ONCE, row_groups=[place.number], columns=list(self.columns.values())
            ):
                inside = [row for row in range(len(batch)) if first + row in wanted]
                first += len(batch)
                for row in batch.take(pyarrow.array(inside, pyarrow.int64())).to_pylist():
                    yield {name: row[column] for name, column in self.columns.items()}


def row_groups(files: Sequence[str], rows: IterableDataset) -> RowGroups | None:
    """Returns the row groups of the Parquet files of a stream; None if a file is damaged, or has other columns."""
    found: list[RowGroup] = []
    for file in files:
        try:
            metadata = pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError):
            return None
        if rows.features is None or not metadata.schema.to_arrow_schema().equals(rows.features.arrow_schema):
            return None
        sizes = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
        found += [RowGroup(file, number, size) for number, size in enumerate(sizes) if size]
    return RowGroups(tuple(found))


def mapped(files: Sequence[str], rows: IterableDataset) -> Dataset | None:
    """Returns the rows of the Arrow files of a stream, mapped into memory.

    Returns None if a file is damaged, has other columns, or is in Arrow's other format, which `datasets` does not map.
    """
    try:
        parts = [Dataset.from_file(file) for file in files]
        for part in parts:
            part.data.validate(full=True)  # since a false offset would lead outside the file
    except (pyarrow.ArrowException, OSError):
        return None
    if any(part.features != rows.features for part in parts):
        return None
    return datasets.concatenate_datasets(parts)
