"""The record of the outputs of a command in a folder, with which the command goes on when it is given again.

It is a file of JSON lines, `COMMAND.jsonl`. Each line holds everything about one image. A line is written before the
outputs of the image, and again when they are whole, so that after a kill every output in the folder is known. The last
line of an image counts.
"""

import hashlib
import itertools
import json
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unet_diffusion.files import named_errors, remove_leftovers_of, written_aside

State = tuple[int, ...]

AT_WORK = "at work"  # stands in place of the sha256 of a table
RECORDS = frozenset(f"{command}.jsonl" for command in ("sample", "segment", "upscale"))


@dataclass(frozen=True)
class Result:
    """The outputs made from one image, or the reason why it failed.

    Attributes:
        image: the name of the image's outputs.
        source: absolute path of the input; empty for an image that was generated.
        state: the state of the input: size, times of change and inode number; equal if it certainly has not changed.
        content: sha256 of the input's bytes; it decides if the state differs, since files may be touched or copied.
        made_by: digest of the run and the options.
        outputs: sha256 of each output, by its path below the folder, including outputs of an older state that are still
            there.
        whole: size and time of change of each output of this state, once all are written.
        rows: lines of a table, without the file and the output.
        error: the reason why the image failed; empty if it did not.
    """

    image: str
    source: str = ""
    state: State = ()
    content: str = ""
    made_by: str = ""
    outputs: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, State] = field(default_factory=dict)
    rows: tuple[tuple[str, ...], ...] = ()
    error: str = ""


KINDS = {each.name: str for each in fields(Result)} | {"state": list, "rows": list, "outputs": dict, "whole": dict}


class Record:
    """The results of a command in a folder.

    Args:
        folder: the folder of the outputs.
        command: the name of the command, and of the file.

    Raises:
        ValueError: the file is a link, or holds a line that this class has not written.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.path = folder, record_path(folder, command)
        self._place = str(folder)  # since pathlib is slow for many
        self.lock = threading.RLock()
        self._descriptor = -1
        self._real_folders: set[Path] = set()
        self._read()

    def _read(self) -> None:
        self.results: dict[str, Result] = {}
        self.made: dict[str, set[str]] = {}  # every sha256 that an output had
        self.owners: dict[str, str] = {}  # the image from which an output was last made
        self.table = AT_WORK  # or the sha256 of the table that the last call left
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link, but must be a file that the command writes; remove the link.")
        self._seen = self._state()
        content = self.path.read_bytes() if self.existed else b""
        self.whole_length = content.rfind(b"\n") + 1  # without a line cut off by a kill
        for number, line in enumerate(content[: self.whole_length].splitlines(), start=1):
            try:
                values = json.loads(line)
                is_table = values.keys() == {"table"}
                self.table = values["table"] if is_table else AT_WORK
                if not is_table:
                    self._keep(_result(values))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of {self.path} is not one that the command writes; remove the line, and its image "
                    "is made again."
                ) from error

    @property
    def existed(self) -> bool:
        """Returns whether there was a record before this call."""
        return self._seen is not None

    def _state(self) -> State | None:
        return state_of(self.path) if self.path.exists() else None

    def _keep(self, result: Result) -> None:
        self.results[result.image] = result
        for output, digest in result.outputs.items():
            self.made.setdefault(output, set()).add(digest)
            owner = self.owners.get(output, result.image)
            if owner != result.image:  # it was replaced
                before = self.results[owner]
                left = {name: digest for name, digest in before.outputs.items() if name != output}
                self.results[owner] = replace(before, outputs=left)
            self.owners[output] = result.image

    @contextmanager
    def opened(self, *others: Path) -> Iterator["Record"]:
        """Opens the file for more lines; removes half-written files of a killed process, also those of `others`.

        Raises:
            RuntimeError: another process is writing here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is writing in {self.folder}; choose another output.") from None
        try:
            if self._state() != self._seen:  # another process was still writing when it was read
                self._read()
            self._remove_leftovers(others)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self.path, flags, 0o666)
            os.ftruncate(self._descriptor, self.whole_length)
            if self.table != AT_WORK:
                self._append({"table": AT_WORK})
            yield self
        finally:
            with self.lock:
                if self._descriptor >= 0:
                    os.close(self._descriptor)
                self._descriptor = -1
            lock.release()

    def _remove_leftovers(self, others: Iterable[Path]) -> None:
        cut = [result for result in self.results.values() if not result.whole]
        paths = [self.folder / output for result in cut for output in result.outputs]
        for path in paths:
            self._check_inside(path.parent)
        remove_leftovers_of(*paths, self.path, *others, alone=True)  # as the lock ensures

    def add(self, result: Result, to_disk: bool = False) -> None:
        """Writes a line; with `to_disk`, waits until it is on disk."""
        self._append(asdict(result), to_disk)
        with self.lock:
            self._keep(result)

    def note_failure(self, name: str, source: str, error: str) -> Result:
        """Records that an image failed, and returns its result; its outputs of an earlier call may still be there.

        Nothing is written if the outputs belong to another input.
        """
        before, error = self.results.get(name, Result(name)), " ".join(error.split())
        if before.outputs and _is_of_another(before, source):
            return Result(name, source, error=error)
        result = replace(before, source=source, made_by="", rows=(), error=error)
        self.add(result)
        return result

    def _append(self, values: dict[str, Any], to_disk: bool = False) -> None:
        with self.lock, named_errors(self.path):
            append(self._descriptor, _line(values))
            if to_disk:
                os.fsync(self._descriptor)

    def is_whole(self, name: str, endings: Iterable[str], made_by: str) -> bool:
        """Returns whether an image's outputs are there, unchanged, as made by this run and these options."""
        result = self.results.get(name)
        if result is None or result.error or result.made_by != made_by:
            return False
        return all(self._is_as_made(result, name + ending) for ending in endings)

    def _is_as_made(self, result: Result, output: str) -> bool:
        path = f"{self._place}{os.sep}{output}"  # since pathlib is slow for many
        try:
            found = os.lstat(path)
        except OSError:
            return False
        if output not in result.whole or not stat.S_ISREG(found.st_mode):
            return False
        same = (found.st_size, found.st_mtime_ns) == result.whole[output]
        return same or sha256(Path(path).read_bytes()) == result.outputs.get(output)

    def is_there(self, result: Result) -> bool:
        """Returns whether an output of an image exists."""
        return any(os.path.lexists(self.folder / output) for output in result.outputs)

    def is_own(self, output: str) -> bool:
        """Returns whether an existing output is unchanged since a call of the command made it."""
        path = self.folder / output
        if path.is_symlink() or not path.is_file() or output not in self.made:
            return False
        return sha256(path.read_bytes()) in self.made[output]

    def check_free(self, result: Result, outputs: Iterable[str], overwrite: bool) -> None:
        """Raises a ValueError for an output that lies outside the folder or, unless `overwrite`, is not our own.

        An output of another input is not replaced either, as long as that input exists.
        """
        for output in outputs:
            path = self.folder / output
            self._check_inside(path.parent)
            if overwrite or not os.path.lexists(path):
                continue
            if not self.is_own(output):
                raise ValueError(f"{path} exists already; set overwrite, or choose another output.")
            owner = self.results[self.owners[output]]
            if owner.content != result.content and _is_of_another(owner, result.source):
                raise ValueError(f"{path} holds the result of {owner.source}; set overwrite, or choose another output.")

    def _check_inside(self, folder: Path) -> None:
        if folder in self._real_folders:
            return
        real, home = os.path.realpath(folder), os.path.realpath(self.folder)
        if os.path.commonpath([real, home]) != home:
            raise ValueError(
                f"{folder} is a link out of the output {self.folder}; remove it, or choose another output."
            )
        self._real_folders.add(folder)

    def write(self, result: Result, files: Mapping[str, bytes]) -> Result:
        """Writes the outputs of an image, given as contents by path; returns the result with their states.

        Other outputs of the image are kept if they have the same state. Otherwise they are removed, unless the user has
        edited them. `add` has to be called next.
        """
        before = self.results.get(result.image, Result(result.image))
        others = {output: digest for output, digest in before.outputs.items() if self._is_other(result, output, files)}
        is_same = (before.made_by, before.content) == (result.made_by, result.content)
        kept = [output for output in others if is_same and self._is_as_made(before, output)]
        made = {output: sha256(content) for output, content in files.items()}
        self.add(replace(result, outputs=others | made, whole={}), to_disk=True)
        for output in others.keys() - kept:
            self._remove(output)
        for output, content in files.items():
            self._check_inside((self.folder / output).parent)
            with written_aside(self.folder / output) as aside:
                aside.write_bytes(content)
        whole = {}
        for output in (*kept, *files):
            found = os.stat(self.folder / output)
            whole[output] = (found.st_size, found.st_mtime_ns)
        others = {output: digest for output, digest in others.items() if os.path.lexists(self.folder / output)}
        return replace(result, outputs=others | made, whole=whole)

    def _is_other(self, result: Result, output: str, files: Mapping[str, bytes]) -> bool:
        """Returns whether an earlier output of the image is still there, and is not one of the new files."""
        return output not in files and self.owners[output] == result.image and os.path.lexists(self.folder / output)

    def _remove(self, output: str) -> None:
        """Removes an output unless the user has edited it."""
        path = self.folder / output
        self._check_inside(path.parent)
        if self.is_own(output):
            with named_errors(path):
                path.unlink()

    def end(self, order: Iterable[str], table: Path | None = None) -> None:
        """Rewrites the file with one line per image: first images of other calls, then the named ones, in order."""
        names = dict.fromkeys(order)
        others = [name for name in self.results if name not in names]
        kept = [self.results[name] for name in (*others, *names) if name in self.results]
        with written_aside(self.path) as aside, open(aside, "wb") as file:
            for result in kept:
                for output, digest in self._former(result):
                    file.write(_line({"image": result.image, "outputs": {output: digest}}))
                file.write(_line(asdict(result)))
            if table is not None:
                file.write(_line({"table": sha256(table.read_bytes())}))

    def _former(self, result: Result) -> Iterator[tuple[str, str]]:
        """Yields the outputs, with sha256, that a failed image may still have from before."""
        if result.error or not result.whole:
            for output, digest in result.outputs.items():
                yield from ((output, former) for former in sorted(self.made[output] - {digest}))


def record_path(folder: Path, command: str) -> Path:
    """Returns the file of a command's record in a folder."""
    return folder / f"{command}.jsonl"


def _is_of_another(result: Result, source: str) -> bool:
    """Returns whether a result was made from another input than `source`, and that input still exists."""
    return result.source != source and os.path.exists(result.source)


def append(descriptor: int, content: bytes) -> None:
    """Writes whole lines at the end of a file; if that fails, for example on a full disk, nothing is written."""
    length = os.fstat(descriptor).st_size
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, length)
        raise


def sha256(content: bytes) -> str:
    """Returns the hash of the content of a file."""
    return hashlib.sha256(content).hexdigest()


def state_of(path: str | Path) -> State:
    """Returns values that change when a file is replaced or written to."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps({key: value for key, value in values.items() if value}).encode() + b"\n"


def _result(values: dict[str, Any]) -> Result:
    """Returns the result that a line of the record holds; a TypeError or ValueError for any other line."""
    for name, value in values.items():
        if not isinstance(value, KINDS[name]):
            raise TypeError(name)
    rows = tuple(map(tuple, values.get("rows", ())))
    texts = [*values.get("outputs", {}).values(), *itertools.chain(*rows)]
    if set(map(type, texts)) - {str}:
        raise TypeError("outputs or rows")
    values["rows"], values["state"] = rows, tuple(values.get("state", ()))
    values["whole"] = {output: tuple(state) for output, state in values.get("whole", {}).items()}
    return Result(**values)
