"""Writing files so that a reader sees the old one or the new one, never half of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = ".writing-"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what is written there takes the place of `path` when the block ends well.

    The suffix stays, since libraries choose the format by it. A file and a folder both work; an existing file is
    replaced, an existing folder is an error of the caller's. After an exception the temporary is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{PREFIX}{os.getpid()}-{path.name}")
    try:
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
        flush_to_disk(path.parent, recursive=False)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


@contextmanager
def merged_into(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder; when the block ends well its files replace those of `folder`, each at once."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as name:
        aside = Path(name)
        yield aside
        flush_to_disk(aside)
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process was writing under `folder`; call it only while nobody else writes there."""
    for leftover in folder.rglob(f"{PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def flush_to_disk(path: Path, recursive: bool = True) -> None:
    """Waits until the operating system has stored a file, or a folder with all that is in it."""
    if recursive and path.is_dir():
        for child in path.iterdir():
            flush_to_disk(child)
    if path.is_dir() and os.name == "nt":  # Windows has no handle to flush for a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
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
