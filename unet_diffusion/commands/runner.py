"""Works through many image files: reads ahead, computes in order, writes behind, and goes on after a stop."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from unet_diffusion.commands.inputs import Inputs
from unet_diffusion.commands.output_names import output_names, without_suffix
from unet_diffusion.commands.overlap import Ahead, Behind, Room
from unet_diffusion.commands.record import Record, Result, sha256, state_of
from unet_diffusion.commands.table import Table
from unet_diffusion.files import readable
from unet_diffusion.images.axes import counted
from unet_diffusion.images.fetching import read_bytes
from unet_diffusion.saved_index import INDEX, saved_components

logger = logging.getLogger(__name__)

MOST_LISTED = 100  # failures in a message
SUMMARY = "summary/"  # stands for an image in the record of files of all images; no image has such a name
Rows = tuple[tuple[str, ...], ...]
ProgressBar = Callable[..., AbstractContextManager]

OF_NAMES = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")  # in errors of PyTorch


@dataclass(frozen=True)
class Summary:
    """Files that are made from one output of every image, once all of these are written.

    Attributes:
        outputs: the names of the files in the folder.
        ending: the ending of the output of an image that they are made from.
        make: returns their contents by name, possibly none, for the results of all images in the folder that have this
            output.
    """

    outputs: tuple[str, ...]
    ending: str
    make: Callable[[list[Result]], dict[str, bytes]]


@dataclass(frozen=True)
class Work:
    """The work of a command on an image.

    Attributes:
        command: the name of the command, and of its record.
        made_by: the `digest` of the run and the options.
        endings: the endings of all outputs that an image may have.
        wanted: the endings of the outputs that it gets.
        read: yields the image in a file that was read, `{"bytes", "path"}`, as a tensor or any object with `nbytes`;
            called ahead, in another thread.
        compute: returns a result for an image and a key for random numbers, which depends only on the image's place;
            called on the main thread, for one image after the other.
        encode: returns the contents of the outputs, in the order of `wanted`, and lines for a table, for an image and
            its result; called in another thread.
        table: name and columns of a table of the images, or None.
        summary: files of all images together, or None.
    """

    command: str
    made_by: str
    endings: tuple[str, ...]
    wanted: tuple[str, ...]
    read: Callable[[dict[str, Any]], Iterable[Any]]
    compute: Callable[[Any, str], Any]
    encode: Callable[[Any, Any], tuple[list[bytes], Rows]]
    table: tuple[str, tuple[str, ...]] | None = None
    summary: Summary | None = None


def work_through(inputs: Inputs, folder: Path, work: Work, overwrite: bool, progress_bar: ProgressBar) -> None:
    """Makes the outputs of all inputs in a folder, except those that are already there as this work makes them.

    An image that fails is noted, and the work goes on with the others. Results are the same as for one image after the
    other.

    Raises:
        RuntimeError: after the last image, if some failed; it names them.
        KeyboardInterrupt: after Ctrl-C; finished outputs are kept. OSError: a file could not be written, for example
        because the disk is full.
    """
    for note in inputs.notes():
        logger.warning("%s", note)
    names = output_names(inputs.paths, inputs.places, work.endings)
    keys = map(without_suffix, inputs.places)
    items = [_Item(i, path, name, key) for i, (path, name, key) in enumerate(zip(inputs.paths, names, keys))]
    record = Record(folder, work.command)
    table = None if work.table is None else Table(folder / work.table[0], work.table[1], work.wanted[0], record)
    with record.opened(*([table.path] if table is not None else [])):
        if table is not None:
            table.check(overwrite)
        if work.summary is not None and work.summary.ending in work.wanted:
            record.check_free(Result(SUMMARY), work.summary.outputs, overwrite)
        job = _Job(work, items, record, table, overwrite)
        job.run(progress_bar)
    failures = [*inputs.missing, *(job.failures[index] for index in sorted(job.failures))]
    if failures:
        more = f"\nand {len(failures) - MOST_LISTED} more" if len(failures) > MOST_LISTED else ""
        listed = "\n".join(failures[:MOST_LISTED]) + more
        count = len(items) + len(inputs.missing)
        raise RuntimeError(f"{len(failures)} of {count} inputs failed, the others are in {folder}:\n{listed}")


@dataclass(frozen=True)
class _Item:
    index: int
    path: Path
    name: str  # of its outputs
    key: str  # of its random numbers


@dataclass(frozen=True)
class _Read:
    """An input that was read."""

    result: Result
    image: Any  # None if the outputs are there already
    size: int = 0  # bytes that it takes of the room


class _Job:
    """One call of a command."""

    def __init__(self, work: Work, items: list[_Item], record: Record, table: Table | None, overwrite: bool) -> None:
        self.work, self.items, self.record, self.table, self.overwrite = work, items, record, table, overwrite
        self.room = Room()
        self.failures: dict[int, str] = {}
        self.is_whole: set[int] = set()  # items whose outputs are there, if the input has not changed
        self.failed: dict[int, Result] = {}
        self.inputs = {str(item.path) for item in items}
        self.names = {item.name for item in items}

    def _others(self) -> list[Result]:
        """Returns results of earlier calls that are still there, unless their inputs are among these or moved."""
        return [
            result
            for name, result in self.record.results.items()
            if name != SUMMARY and result.source not in self.inputs and not result.error
            if name not in self.names or os.path.exists(result.source)
            if (self.record.folder / (name + self.work.wanted[0])).exists()
        ]

    def run(self, progress_bar: ProgressBar) -> None:
        """Works through all items that are not finished."""
        todo = [item for item in self.items if not self._is_finished(item)]
        self._warn_of_others(todo)
        left = {item.index for item in todo}
        self._write_table([item for item in self.items if item.index not in left])
        if self.table is not None:
            self.table.open()
        ahead, behind = Ahead(self._prepare, todo, self.room), Behind()
        try:
            with progress_bar(total=len(todo)) as progress, behind, ahead:
                for item, read in ahead:
                    if read is not None:
                        self._compute(item, read, behind)
                    progress.update()
        except KeyboardInterrupt:
            if not behind.is_done:  # Ctrl-C was pressed again
                raise
            self._end()
            finished = sum(self._is_finished(item) for item in self.items)
            raise KeyboardInterrupt(
                f"{finished} of {len(self.items)} images are finished, and the same command goes on"
            ) from None
        finally:
            if self.table is not None:
                self.table.close()
        self._end()

    def _is_finished(self, item: _Item) -> bool:
        if not self.record.is_whole(item.name, self.work.wanted, self.work.made_by):
            return False
        self.is_whole.add(item.index)
        before = self.record.results[item.name]
        try:
            return before.source == str(item.path) and before.state == state_of(item.path)
        except OSError:
            return False

    def _warn_of_others(self, todo: list[_Item]) -> None:
        before = (self.record.results.get(item.name) for item in todo)
        count = sum(each is not None and each.made_by not in ("", self.work.made_by) for each in before)
        if count:
            logger.warning("%d images were made by another run or with other options, and are made again", count)

    def _prepare(self, item: _Item) -> _Read | None:
        """Reads an input, ahead of the network; returns None if there is nothing to compute."""
        try:
            read = self._read(item)
        except (ValueError, OSError, ImportError, MemoryError) as error:
            self._fail(item, error)
            return None
        if read.image is not None:
            return replace(read, size=self.room.enter(read.image.nbytes))
        if self.table is not None:
            self.table.add(read.result)
        self.record.add(read.result)
        return None

    def _read(self, item: _Item) -> _Read:
        try:
            state = state_of(item.path)  # first, so that the next call notices a change from now on
        except OSError as error:
            raise ValueError(f"{item.path} cannot be read: {error.strerror}; check the path and its rights.") from error
        data, _ = read_bytes(item.path)
        result = Result(item.name, str(item.path), state, sha256(data), self.work.made_by)
        if item.index in self.is_whole and (before := self.record.results[item.name]).content == result.content:
            return _Read(replace(before, source=result.source, state=state), None)
        outputs = [item.name + ending for ending in self.work.wanted]
        before = self.record.results.get(item.name, Result(item.name))
        for output in (*outputs, *before.outputs):
            if str(self.record.folder.absolute() / output) in self.inputs:
                raise ValueError(f"{self.record.folder / output} would replace an input; choose another output.")
        self.record.check_free(result, outputs, self.overwrite)
        (image,) = self.work.read({"bytes": data, "path": str(item.path)})
        return _Read(result, image)

    def _compute(self, item: _Item, read: _Read, behind: Behind) -> None:
        assert read.image is not None
        try:
            computed = self.work.compute(read.image, item.key)
        except (ValueError, ImportError, MemoryError, RuntimeError) as error:
            self.room.leave(read.size)
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            self._fail(item, error)
        else:
            behind.do(partial(self._finish, item, read, computed))

    def _finish(self, item: _Item, read: _Read, computed: Any) -> None:
        """Writes the outputs of an image, behind the network."""
        try:
            assert read.image is not None
            contents, rows = self.work.encode(read.image, computed)
            files = {item.name + ending: content for ending, content in zip(self.work.wanted, contents)}
            result = self.record.write(replace(read.result, rows=rows), files)
            if self.table is not None:
                self.table.add(result)
            self.record.add(result)
        except (ValueError, ImportError, MemoryError, RuntimeError, OSError) as error:
            of_system = isinstance(error, (RuntimeError, OSError)) and not is_out_of_memory(error)
            if of_system and getattr(error, "errno", None) not in OF_NAMES:
                raise
            self._fail(item, error)
        finally:
            self.room.leave(read.size)

    def _fail(self, item: _Item, error: Exception) -> None:
        reason = reason_of(error)
        sentence = reason if readable(str(item.path)) in reason else readable(f"{item.path}: {reason}")
        self.failures[item.index] = sentence
        logger.warning("%s", sentence)
        result = self.failed[item.index] = self.record.note_failure(item.name, str(item.path), reason)
        if self.table is not None:
            self.table.add(result)

    def _end(self) -> None:
        self._warn_of_rows(self._write_table(self.items))
        self._write_summary()
        self.record.end([item.name for item in self.items], None if self.table is None else self.table.path)

    def _write_summary(self) -> None:
        """Writes the files of all images, or updates those that an earlier call has written."""
        summary = self.work.summary
        if summary is None:
            return
        if summary.ending not in self.work.wanted:
            there = [name for name in summary.outputs if os.path.lexists(self.record.folder / name)]
            if not there or not all(map(self.record.is_own, there)):
                return
        own = (self.record.results.get(item.name) for item in self.items)
        found = [*self._others(), *(result for result in own if result and result.source in self.inputs)]
        results = [result for result in found if not result.error and self.record.is_own(result.image + summary.ending)]
        contents = summary.make(results)
        made = Result(SUMMARY, content=sha256(b"".join(contents.values())))
        self.record.add(self.record.write(made, contents))

    def _write_table(self, items: list[_Item]) -> list[Result]:
        """Writes the rows of images of earlier calls and of these items; returns the results of the former."""
        if self.table is None:
            return []
        found = ((item, self.failed.get(item.index) or self.record.results.get(item.name)) for item in items)
        others = self._others()
        self.table.write([*others, *(result for item, result in found if result and result.source == str(item.path))])
        return others

    def _warn_of_rows(self, others: list[Result]) -> None:
        if others:
            assert self.table is not None
            logger.warning(
                "%s keeps %s of %s not among these inputs, such as %s, which other options or another run may have "
                "made; remove their outputs to drop the rows",
                self.table.path,
                counted(sum(len(result.rows) for result in others), "row"),
                counted(len(others), "image"),
                readable(others[0].source),
            )


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether there was not enough memory, also if PyTorch reports this by a RuntimeError."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def reason_of(error: Exception) -> str:
    """Returns the reason why an image failed, as text that can be written."""
    if isinstance(error, OSError) and error.strerror:
        return f"its output could not be written: {error.strerror}"
    said = readable(str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error))
    return f"out of memory: {said}".rstrip(": ") if is_out_of_memory(error) else said


def digest(run: Path, **options: Any) -> str:
    """Returns a hash of the content of a run and of the options, which determine the outputs of an image."""
    files = [run / INDEX]
    for component in sorted(saved_components(run)):
        files += sorted(path for path in (run / component).glob("*") if path.is_file())
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[path.relative_to(run).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sha256(json.dumps([hashes, options], sort_keys=True).encode())[:32]
