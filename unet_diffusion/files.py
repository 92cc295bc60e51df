"""Writing files so that a reader sees the old one or the new one, never half of one."""

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
INDEX = "model_index.json"  # a folder with it is taken for a whole pipeline


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes the place of `path` when the block ends well.

    The suffix stays, since libraries choose the format by it. A file and a folder both work; an existing file is
    replaced, an existing folder is an error of the caller's. After an exception the temporary is removed.

    Raises:
        OSError: it could not be written, such as on a full disk; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{PREFIX}{os.getpid()}-{path.name}")
    remove(aside)  # left by a killed process that had our number, as programs in containers do
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
def merged_into(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; when the block ends well its files replace those of `folder`, each at once.

    Its `model_index.json` is gone before the first is replaced, and comes last: a folder with one is a whole pipeline.

    Raises:
        OSError: they could not be written, such as on a full disk; `folder` is as it was.
    """
    with named_errors(folder), tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as name:
        aside = Path(name)
        yield aside
        flush_to_disk(aside)
        files = sorted((path.relative_to(aside) for path in aside.rglob("*") if path.is_file()), key=_index_last)
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


def _index_last(file: Path) -> tuple[bool, Path]:
    return file == Path(INDEX), file


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Adds what was to be written to errors that do not say it, as those of a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_at_once(folder: Path) -> None:
    """Deletes a folder that a reader sees whole or not at all."""
    aside = folder.with_name(f"{PREFIX}{os.getpid()}-removed-{folder.name}")
    remove(aside)
    os.replace(folder, aside)
    remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process was writing under `folder`; call it only while nobody else writes there."""
    for leftover in list(folder.rglob(f"{PREFIX}*")):
        remove(leftover)


def flush_to_disk(path: Path, recursive: bool = True) -> None:
    """Waits until the operating system has stored a file, or a folder with all that is in it."""
    if recursive and path.is_dir():
        for child in path.iterdir():
            flush_to_disk(child)
    if path.is_dir() and os.name == "nt":  # Windows has no handle to flush for a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file aside and renames it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file aside and renames it; what JSON does not know, such as a path, becomes its text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")
