"""Names of sources: their kinds, the files in a folder, and paths in a column of a data set."""

import glob
import os
import re
from pathlib import Path

from unet_diffusion.data.annotations import refuse_annotations
from unet_diffusion.data.config import SourceOptions
from unet_diffusion.files import readable

DIGITS = "mnist-5000"
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
MOST_EXAMPLES = 5  # files or rows in a message
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".j2k", ".bmp", ".gif", ".webp",
    ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".npy",
})
# fmt: on
SPLIT_FOLDERS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test", "testing"})


def images_of_split(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """Returns the folder of a split, and the image files in it; a folder without splits is its own split "train".

    Links are followed, but no folder is entered twice.

    Raises:
        ValueError: the folder has no such split or no image, or cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be listed: {error.strerror}; its images would be missed, so make it readable, "
            "or move it away."
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


def stored_path(file: Path) -> str:
    """Returns a path as text for a column: a path that is not UTF-8 becomes a URL, which keeps its bytes."""
    return str(file) if readable(str(file)) == str(file) else file.absolute().as_uri()


def check_text(source: str) -> None:
    """Raises a ValueError unless a source's name is UTF-8 text, since tables, caches and model cards contain it."""
    if readable(source) != source:
        raise ValueError(
            f"data is {readable(source)}, but its name must be UTF-8 text; rename it, or give a link to it."
        )


def check_only_split(source: str, split: str) -> None:
    """Raises a ValueError for any split but "train", the only split of a source that names none."""
    if split != "train":
        raise ValueError(
            f"split is {split!r}, but {source} names no splits, so its only split is 'train'; "
            "give the files or folder of that split as data."
        )


def is_hub_name(source: str) -> bool:
    """Returns whether a source that is not on this machine may be a data set on the Hugging Face Hub."""
    suffixes = (*FILE_READERS, *IMAGE_SUFFIXES)
    return HUB_NAME.fullmatch(source) is not None and not source.lower().endswith(suffixes)


def unknown_source(source: str, reason: str) -> ValueError:
    """Returns the error for a source that cannot be found."""
    return ValueError(
        f"data is {source!r}: {reason}. Give {DIGITS!r}, a folder of images, Parquet, Arrow or tar files, "
        "a save_to_disk folder, or the name of a data set on the Hub."
    )


def check_folder(name: str, folder: Path, why: str = "") -> None:
    """Raises a ValueError unless an option names a folder that exists."""
    if not folder.is_dir():
        raise ValueError(f"{name} is {folder}, which is not a folder{why}.")


def check_masks(folder: Path) -> None:
    """Raises a ValueError unless the folder of masks exists; a file of polygons is called that."""
    if folder.is_file():
        refuse_annotations(folder)
    check_folder("masks", folder)


def check_outside(output: Path, *sources: str | None) -> None:
    """Raises a ValueError for an output in a folder of the data, whose images the run's own would join."""
    for source in sources:
        folder = Path(source or "").expanduser()
        if source and folder.is_dir() and output.expanduser().resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"output is {output}, in the folder {source} of the data; choose one outside of it.")


def check_sources(options: SourceOptions) -> None:
    """Raises a ValueError unless the files and folders that options name exist, and have names of UTF-8 text.

    This imports nothing slow. A name that may be a data set on the Hub is left for `open_source` to find.
    """
    masks = getattr(options, "masks", None)
    affixes = [getattr(options, name, None) for name in ("image_suffix", "mask_prefix", "mask_suffix")]
    for source in (options.data, getattr(options, "validation_data", None)):
        if source is None or source == DIGITS:
            continue
        check_text(source)
        path = os.path.expanduser(source)
        if masks is not None or any(affixes):
            check_folder("data", Path(path), "; masks and mask_suffix are for folders of images")
        elif not (is_hub_name(source) or os.path.exists(path) or any(glob.iglob(path, recursive=True))):
            raise unknown_source(source, "there is no such file or folder")
    for folder in (masks, getattr(options, "validation_masks", None)):
        if folder is not None:
            check_masks(Path(folder).expanduser())
