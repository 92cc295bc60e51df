"""Files that are whole or absent, and checks of the places where they are written.

A reader sees the old file or the new one, never half of one.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PREFIX = ".writing-"
MOST_BYTES = 200  # of a name, before a prefix is added
INDEX = "model_index.json"  # a folder that has it counts as a whole pipeline


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` when the block ends without an exception.

    The suffix stays, since libraries choose the format by it. The path can be a file or a folder: an existing file is
    replaced, but an existing folder is not. After an exception the temporary path is removed.

    Raises:
        OSError: the path could not be written, for example because the disk is full; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    remove(aside)  # left by a killed process with the same ID, which is common in containers
    try:
        with named_errors(path):
            yield aside
            flush_to_disk(aside)
            os.replace(aside, path)
            flush_to_disk(path.parent, recursive=False)
    finally:
        with suppress(OSError):
            remove(aside)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` for what only the making of `path` needs; it is removed at the end."""
    folder = _aside(path)
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        with suppress(OSError):
            remove(folder)


def _aside(path: Path) -> Path:
    return path.with_name(f"{PREFIX}{os.getpid()}-{_shortened(path.name)}")


def _shortened(name: str) -> str:
    """Shortens a name so that it stays within 255 bytes, the limit of file systems, with a prefix; keeps the suffix."""
    content = os.fsencode(name)
    return name if len(content) <= MOST_BYTES else hashlib.sha256(content).hexdigest() + Path(name).suffix


@contextmanager
def merged_into(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, whose files replace those of `folder` when the block ends without an exception.

    Each file is replaced at once. `model_index.json` is removed before the first file is replaced and written last,
    since a folder that has it counts as a whole pipeline.

    Raises:
        OSError: a file could not be written, for example because the disk is full. The files of `folder` are then as
            they were; if it was the replacing that failed, some are new, and there is no `model_index.json`.
    """
    with named_errors(folder), tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as name:
        aside = Path(name)
        yield aside
        flush_to_disk(aside)
        found = (path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
        files = sorted(found, key=lambda file: (file == Path(INDEX), file))  # the index is written last
        if Path(INDEX) in files:
            (folder / INDEX).unlink(missing_ok=True)
        for file in files:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if file == Path(INDEX):
                for changed in {(folder / each).parent for each in files}:
                    flush_to_disk(changed, recursive=False)
            os.replace(aside / file, target)
        flush_to_disk(folder, recursive=False)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Adds `path` to errors that name no file, such as those of a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def remove(path: Path) -> None:
    """Deletes a file, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(folder: Path) -> None:
    """Deletes a folder, which a reader sees whole or not at all."""
    aside = folder.with_name(f"{PREFIX}{os.getpid()}-removed-{folder.name}")
    remove(aside)
    os.replace(folder, aside)
    remove(aside)


def remove_leftovers(folder: Path, alone: bool = False) -> None:
    """Deletes files that killed processes left half written in `folder`.

    What living processes write there stays, unless this one is `alone`: then no other may be writing there.
    """
    for leftover in list(folder.glob(f"{PREFIX}*")):
        if alone or not _is_being_written(leftover.name):
            remove(leftover)


def remove_leftovers_of(*paths: Path, alone: bool = False) -> None:
    """Deletes versions of these files that killed processes left half written, as `remove_leftovers` does."""
    for folder in {path.parent for path in paths if path.parent.is_dir()}:
        ends = tuple(f"-{_shortened(path.name)}" for path in paths if path.parent == folder)
        for name in os.listdir(folder):
            if name.startswith(PREFIX) and name.endswith(ends) and (alone or not _is_being_written(name)):
                remove(folder / name)


def _is_being_written(name: str) -> bool:
    """Returns whether the name of a temporary file has the number of a living process other than this one."""
    import psutil  # here, since most modules only write files

    process, named, _ = name.removeprefix(PREFIX).partition("-")
    return bool(named) and process.isdecimal() and int(process) != os.getpid() and psutil.pid_exists(int(process))


def flush_to_disk(path: Path, recursive: bool = True) -> None:
    """Waits until the operating system has stored a file, or a folder with its contents."""
    if recursive and path.is_dir():
        for child in path.iterdir():
            flush_to_disk(child)
    if path.is_dir() and os.name == "nt":  # Windows cannot flush folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes writable files only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file to a temporary path and renames it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file via a temporary path; values that JSON lacks, such as paths, are written as text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def readable(name: str) -> str:
    """Returns the name of a file as text that can be written, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def check_output(folder: Path) -> None:
    """Raises a ValueError unless a folder can be written to, or created if it does not exist yet.

    Its name must be UTF-8 text, since model cards contain it.
    """
    if readable(str(folder)) != str(folder):
        raise ValueError(f"output is {readable(str(folder))}, but its name must be UTF-8 text; choose another.")
    for place in (folder, *folder.absolute().parents):
        if os.path.lexists(place):
            break
    if not place.is_dir():
        raise ValueError(f"output is {folder}, but {place} is not a folder; choose another.")
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place):
            pass  # permissions alone do not tell: root has all of them, even if nothing can be written
    except OSError as error:
        raise ValueError(
            f"output is {folder}, but {place} cannot be written to; change its rights, or choose another."
        ) from error


def check_absent(*files: Path, overwrite: bool) -> None:
    """Raises a ValueError for the first of the files that exists, unless they may be overwritten."""
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists already; set overwrite, or choose another output.")
