"""A table of results that is whole at any time: lines are added as images are finished, and sorted at the end."""

import csv
import io
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from unet_diffusion.commands.record import AT_WORK, Record, Result, append, sha256
from unet_diffusion.files import named_errors, readable, written_aside

FORMULA = ("=", "+", "-", "@")  # cells that begin so are computed when a spreadsheet opens the file


class Table:
    """A CSV file with the lines of each image, beside the record that they come from.

    Its columns are the file, the output, those of the command, and the error of an image that failed.

    Args:
        path: the path of the file.
        columns: the header.
        ending: the ending of the output that each line names.
        record: the record of the command.
    """

    def __init__(self, path: Path, columns: Sequence[str], ending: str, record: Record) -> None:
        self.path, self.columns, self.ending, self.record = path, columns, ending, record
        self.lock, self._descriptor = threading.Lock(), -1

    def check(self, overwrite: bool) -> None:
        """Raises a ValueError for a table that was changed since the command wrote it, unless it may be overwritten."""
        if overwrite or not os.path.lexists(self.path):
            return
        if not self.record.existed or self.path.is_symlink():
            raise ValueError(f"{self.path} exists already; set overwrite, or choose another output.")
        if self.record.table not in (AT_WORK, sha256(self.path.read_bytes())):
            raise ValueError(f"{self.path} was changed after it was written; move it, or set overwrite.")

    def write(self, results: Iterable[Result]) -> None:
        """Writes the lines of these results, in their order."""
        with written_aside(self.path) as aside, open(aside, "wb") as file:
            file.write(_lines([self.columns]))
            for result in results:
                file.write(self._lines_of(result))

    def open(self) -> None:
        """Opens the file for more lines."""
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self.path, flags)

    def add(self, result: Result) -> None:
        """Adds the lines of an image."""
        with self.lock, named_errors(self.path):
            append(self._descriptor, self._lines_of(result))

    def close(self) -> None:
        """Closes the file."""
        with self.lock:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lines_of(self, result: Result) -> bytes:
        file = readable(result.source)
        if result.error:
            return _lines([(file, *[""] * (len(self.columns) - 2), result.error)])
        output = readable(result.image + self.ending)
        output = f"./{output}" if output.startswith(FORMULA) else output
        return _lines([(file, output, *row, "") for row in result.rows])


def _lines(rows: Iterable[Sequence[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
