"""Folders of images: which files they hold, and how a column of a data set names them."""

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features

from unet_diffusion.files import readable

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".j2k", ".bmp", ".gif", ".webp",
    ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".npy",
})
# fmt: on
SPLIT_FOLDERS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})


def find_images(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder of the split, which is the folder itself where it has no splits, and the image files in it.

    Links are followed, but no folder is entered twice.

    Raises:
        ValueError: no such split, no image, or a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be listed: {error.strerror}; its images would be missed, so give it the rights "
            "to be read, or take it away."
        ) from error

    try:
        subfolders = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        refuse(error)
    if split in subfolders:
        folder = folder / split
    elif SPLIT_FOLDERS.intersection(subfolders):
        raise ValueError(f"split is {split!r}, but {folder} has the subfolders {', '.join(subfolders)}.")
    else:
        check_only_split(str(folder), split)

    files = []
    entered = {os.path.realpath(folder)}
    for parent, names, found in os.walk(folder, followlinks=True, onerror=refuse):
        names[:] = sorted(name for name in names if not name.startswith((".", "__MACOSX")))
        real = {name: os.path.realpath(Path(parent, name)) for name in names}
        names[:] = [name for name in names if real[name] not in entered]  # a link to a folder above is a loop
        entered.update(real.values())
        paths = (Path(parent, name) for name in sorted(found) if not name.startswith("."))
        files += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"{folder} has no image: no file ends in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return folder, files


def of_files(columns: dict[str, list[Any]], features: Features, files: list[Path]) -> Dataset:
    """A data set of paths, whose fingerprint changes with the size, the time or the right to read of any file."""
    rows = Dataset.from_dict(columns, features=features)
    fingerprint = datasets.fingerprint.Hasher.hash([_state(file) for file in files])
    return Dataset(rows.data, info=rows.info, fingerprint=fingerprint)


def _state(file: Path) -> tuple[Any, ...]:
    try:
        state = file.stat()
    except OSError as error:  # a link to nothing: the image is named as one that cannot be read
        return stored_path(file), error.errno
    return stored_path(file), state.st_size, state.st_mtime_ns, os.access(file, os.R_OK)


def stored_path(file: Path) -> str:
    """A path as columns hold it, which is text: that of a name in no encoding as a URL, which keeps its bytes."""
    return str(file) if readable(str(file)) == str(file) else file.absolute().as_uri()


def check_text(source: str) -> None:
    """Raises a ValueError for the name of a source that is no text, since tables, caches and model cards tell it."""
    if readable(source) != source:
        raise ValueError(f"data is {readable(source)}, a name that is no UTF-8 text; rename it, or give a link to it.")


def check_only_split(source: str, split: str) -> None:
    """Raises a ValueError for another split than "train", the only one of a source that names none."""
    if split != "train":
        raise ValueError(
            f"split is {split!r}, but {source} has no named splits, so its only one is 'train'; "
            "give the files or folder of that split as data."
        )
