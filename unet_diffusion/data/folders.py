"""Names of sources: their kinds, the files in a folder, and paths in a column of a data set."""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from unet_diffusion.data.annotations import refuse_annotations
from unet_diffusion.data.config import SOURCES, InMemory, SourceOptions
from unet_diffusion.data.names import SPLIT_FOLDERS
from unet_diffusion.files import readable
from unet_diffusion.images.axes import counted
from unet_diffusion.saved_index import read_object

DIGITS = "mnist-5000"
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
MOST_EXAMPLES = 5  # files or rows in a message
MOST_LISTED = 10  # names in a note
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".gif", ".webp",
    ".avif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".npy",
})
# fmt: on
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of an imagefolder of `datasets`
ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".7z", ".rar", ".xz"})
CLASS_FILES = ("labelmap.txt", "class_dict.csv", "_classes.csv")  # names of the classes of masks
ARRAYS = frozenset({".npz", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth"})  # of many images
FROM_ARRAYS = (
    "Convert them to PNG, TIFF or .npy, an image in each, and give their folder; or, in Python, give DataConfig the "
    "images as an array, or with labels as a datasets.Dataset."
)
CACHE = "unet_diffusion"  # the folder, in that of the cache, of decoded images; its subfolders are named by hashes
CACHED = re.compile(r"[0-9a-f]{32}")
UNSEEN = frozenset({"thumbs.db", "desktop.ini", *METADATA, *CLASS_FILES})  # files left out without a note


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder or of one of its splits, and the other files there.

    Attributes:
        home: the folder of the split, or the whole folder if it has no splits.
        files: the image files below `home`, sorted within each folder.
        left_out: number of files that are not images, by their ending in lower case, most frequent first.
        skipped_runs: folders below `home` that hold a run; its previews and curves are not data.
        other_splits: names of the subfolders beside `home`, if `home` is a split.
        metadata: the file that says more about the images: `metadata.jsonl`, `.csv` or `.parquet`.
        other_metadata: such files in subfolders, which are not read.
        loose: number of images that lie beside the folders of the splits and belong to no split.
    """

    home: Path
    files: list[Path]
    left_out: dict[str, int]
    skipped_runs: list[Path]
    other_splits: tuple[str, ...] | None = None
    metadata: Path | None = None
    other_metadata: tuple[Path, ...] = ()
    loose: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Returns what was left out, and which folder is the split, as sentences."""
        notes = []
        if self.other_splits is not None:
            others = f"; other subfolders: {', '.join(self.other_splits)}" if self.other_splits else ""
            notes.append(f"the split is the subfolder {self.home.name}{others}")
        if self.loose:
            notes.append(f"images beside the folders of the splits were left out: {self.loose}")
        if self.left_out:
            count = sum(self.left_out.values())
            notes.append(
                f"{counted(count, 'file')} {'was' if count == 1 else 'were'} left out: {_by_ending(self.left_out)}"
            )
        if self.metadata is None and {".csv", ".jsonl"}.intersection(self.left_out):
            notes.append("to take labels or masks from a table, call it metadata.csv or .jsonl and its paths file_name")
        if self.skipped_runs:
            names = [readable(run.relative_to(self.home).as_posix()) for run in self.skipped_runs]
            notes.append(f"images of runs were left out, in {some(names)}")
        for file in self.other_metadata[:MOST_EXAMPLES]:
            notes.append(f"{file} is not read; give data {file.parent} to use it")
        return tuple(map(readable, notes))


@dataclass
class _Found:
    """All files below a folder."""

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)


def images_of_split(folder: Path, split: str, trust_classes: bool = False) -> ImageFiles:
    """Finds the image files of a split; a folder without splits is its own split "train".

    The subfolders with images are splits if all of them are named like splits ("train", "Test"), or if one has the name
    of a split other than "train". If several are named like splits and others are not, an error asks, unless
    `trust_classes` states that they are classes. Links are followed, but no folder is entered twice, and no cache of
    decoded images.

    Raises:
        ValueError: the folder has no such split or no image, is a run, or cannot be listed; or its splits are unclear.
    """
    if is_run(folder, whole=True):
        raise ValueError(
            f"{folder} is the folder of a run, whose images are previews and curves; give a folder of images, such as "
            "its folder samples."
        )
    found = _find(folder)
    tops = top_folders(folder, found.images)
    home = _home_of_split(folder, split, tops, trust_classes)
    files = found.images if home == folder else [file for file in found.images if file.is_relative_to(home)]
    metadata = _metadata(found.metadata, home, folder)
    left_out = Counter(file.suffix.lower() for file in found.others if file.is_relative_to(home))
    runs = [run for run in found.runs if run.is_relative_to(home)]
    if not files:
        raise _no_image(home, [file for file in found.others if file.is_relative_to(home)], runs)
    if home == folder:
        _refuse_splits_one_level_down(folder, tops, files)
    return ImageFiles(
        home,
        files,
        dict(left_out.most_common()),
        runs,
        None if home == folder else tuple(name for name in tops if name != home.name),
        metadata,
        tuple(file for file in found.metadata if file != metadata and file.is_relative_to(home)),
        0 if home == folder else sum(file.parent == folder for file in found.images),
    )


def is_run(folder: Path, whole: bool = False) -> bool:
    """Returns whether a folder holds a run or a pipeline; with `whole`, its checkpoints alone do not count."""
    has_log = (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()
    is_whole = has_log or (folder / "model_index.json").is_file()
    return is_whole or (not whole and (folder / "checkpoints").is_dir())


def is_cache(folder: Path) -> bool:
    """Returns whether a folder is the one that caches keep decoded images in."""
    return folder.name == CACHE and any(CACHED.fullmatch(entry.name) for entry in folder.glob("*"))


def top_folders(home: Path, files: Iterable[Path]) -> dict[str, int]:
    """Returns the subfolders that lie directly in `home`, sorted, with the number of files below each."""
    parts = (parts_below(home, file) for file in files)
    return dict(sorted(Counter(part[0] for part in parts if len(part) > 1).items()))


def parts_below(home: Path, file: Path) -> tuple[str, ...]:
    """Returns the parts of the path of a file that follow its folder `home`, faster than `relative_to`."""
    return file.parts[len(home.parts) :]


def _find(folder: Path) -> _Found:
    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be listed: {error.strerror}; its images would be missed, so make it readable, "
            "or move it away."
        ) from error

    found = _Found()
    entered = {os.path.realpath(folder)}
    for parent, names, files in os.walk(folder, followlinks=True, onerror=refuse):
        if Path(parent) != folder and is_run(Path(parent)):
            found.runs.append(Path(parent))
            names.clear()
            continue
        names[:] = sorted(name for name in names if not name.startswith((".", "__MACOSX")))
        names[:] = [name for name in names if not is_cache(Path(parent, name))]
        real = {name: os.path.realpath(Path(parent, name)) for name in names}
        names[:] = [name for name in names if real[name] not in entered]  # a link to a folder above is a loop
        entered.update(real.values())
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.images.append(path)
            elif path.name in METADATA:
                found.metadata.append(path)
            elif path.name.lower() not in UNSEEN:
                found.others.append(path)
    return found


def _home_of_split(folder: Path, split: str, tops: Collection[str], trust_classes: bool) -> Path:
    named = [name for name in tops if name.lower() in SPLIT_FOLDERS]
    are_splits = named != [] and len(named) == len(tops)
    for name in sorted(tops, key=lambda name: name != split):  # the exact name first
        if name.lower() == split.lower() and (are_splits or split != "train"):
            return folder / name
    shown = ", ".join(map(readable, tops))
    if are_splits:
        raise ValueError(f"split is {split!r}, but {folder} has the subfolders {shown}; give one of them as split.")
    if len(named) > 1 and not trust_classes:
        raise ValueError(
            f"data is {folder}, whose subfolders are {shown}. Are {' and '.join(named)} splits? Then give data "
            f"{folder / named[0]}, or move the others away. If all are classes, give label_column 'label'."
        )
    check_only_split(str(folder), split)
    return folder


def _refuse_splits_one_level_down(folder: Path, tops: dict[str, int], files: list[Path]) -> None:
    """Raises a ValueError if every subfolder holds only splits, and more than one, or if the only subfolder does."""
    names: set[str] = set()
    for file in files:
        parts = file.relative_to(folder).parts
        if len(parts) < 3 or parts[1].lower() not in SPLIT_FOLDERS:
            return
        names.add(parts[1])
    if len(tops) > 1 and len(names) == 1:
        return
    subfolders = f"subfolder{'s' * (len(tops) > 1)} {', '.join(map(readable, tops))}"
    last = (
        f"; give data {readable(str(folder / next(iter(tops))))}." if len(tops) == 1 else "; give one of these as data."
    )
    raise ValueError(
        f"data is {readable(str(folder))}, but the splits {', '.join(sorted(names))} lie in its {subfolders}, and "
        f"their images would be mixed{last}"
    )


def _no_image(home: Path, others: list[Path], runs: list[Path]) -> ValueError:
    known = ", ".join(sorted(IMAGE_SUFFIXES))
    if others:
        fix = f"Convert them to PNG, TIFF or .npy; images end in {known}."
        table = next((file for file in others if file.suffix.lower() in FILE_READERS), None)
        if table is not None:
            fix = f"To read tables, give data {all_like(table)}."
        elif any("-idx" in file.name or file.suffix.lower() in ARRAYS for file in others):
            fix = FROM_ARRAYS
        elif any(file.suffix.lower() in ARCHIVES for file in others):
            fix = "Unpack them first."
        counts = Counter(file.suffix.lower() for file in others)
        return ValueError(f"{home} has no image that can be read, only {_by_ending(dict(counts.most_common()))}. {fix}")
    if runs:
        return ValueError(f"{home} has no image but those of runs, which are no data: {some([str(r) for r in runs])}.")
    return ValueError(f"{home} has no image: no file ends in {known}.")


def _metadata(found: list[Path], home: Path, folder: Path) -> Path | None:
    """Returns the metadata file of the split's folder, or else that of the whole folder."""
    for place in (home, folder):
        here = [file for file in found if file.parent == place]
        if len(here) > 1:
            raise ValueError(f"{place} has {' and '.join(file.name for file in here)}; keep one of them.")
        if here:
            return here[0]
    return None


def some(names: Sequence[str]) -> str:
    """Returns the first names of a list as text, and the number of the others."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more


def _by_ending(counts: Mapping[str, int]) -> str:
    return some([f"{count} {readable(ending) or 'without an ending'}" for ending, count in counts.items()])


def states_of(files: Iterable[str | Path]) -> list[tuple[Any, ...]]:
    """Returns values that change when any of the files is replaced or rewritten: place, size, times and readability.

    Paths are resolved, since two projects may both have a folder `data`. The change time and the inode number also tell
    files apart whose modification times were set alike.
    """
    real = lru_cache(os.path.realpath)  # of folders; resolving every file takes longer than listing them
    return [_state(str(file), real) for file in files]


def _state(file: str, real: Callable[[str], str]) -> tuple[Any, ...]:
    folder, name = os.path.split(file)
    place = readable(os.path.join(real(folder), name))
    try:
        state = os.stat(file)
    except OSError as error:  # a dangling link: decoding will name it as unreadable
        return place, error.errno
    changed = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    return place, *changed, os.access(file, os.R_OK)


def hash_of(*values: Any) -> str:
    """Returns a hash of lists, dictionaries and texts; it is far faster than that of `datasets`, which pickles them."""
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()[:32]


def all_like(table: Path) -> str:
    """Returns a glob for the files of a table's folder that have its ending."""
    return str(Path(glob.escape(str(table.parent))) / f"*{table.suffix}")


def images_below(folder: Path) -> list[Path]:
    """Returns the images of a folder and of its subfolders, without those of runs and caches."""
    return _find(folder).images


def tables_in(folder: Path) -> list[Path]:
    """Returns the Parquet, Arrow and tar files of a folder or of its subfolder `data`."""
    files = [file for place in (folder, folder / "data") for file in sorted(place.glob("*"))]
    return [file for file in files if file.suffix.lower() in FILE_READERS and file.name not in METADATA]


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
    owner, slash, _ = source.partition("/")
    if slash and Path(owner).exists():  # a local folder; the rest of the path is misspelt
        return False
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
    """Raises a ValueError unless the folder of masks exists; the message says so if it is a file of polygons."""
    if folder.is_file():
        refuse_annotations(folder)
    check_folder("masks", folder)


def check_outside(output: Path, *sources: str | None) -> None:
    """Raises a ValueError for an output inside a folder of the data, where the run's images would join the data."""
    for source in sources:
        folder = Path(source or "").expanduser()
        if source and folder.is_dir() and output.expanduser().resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"output is {output}, in the folder {source} of the data; choose one outside of it.")


def sources_of_run(run: Path) -> tuple[str, ...]:
    """Returns the sources that a run was trained on, as its `config.json` names them; empty for other pipelines."""
    try:
        data = read_object(run / "config.json").get("data")
    except ValueError:  # no such file, or the run is unusable anyway
        return ()
    named = [data.get(name) for name in SOURCES] if isinstance(data, dict) else []
    return tuple(name for name in named if isinstance(name, str))


def check_sources(options: SourceOptions) -> None:
    """Raises a ValueError unless the files and folders that options name exist and their names are UTF-8 text.

    This imports nothing slow. A name that may be a data set on the Hub is left to `open_source`.
    """
    masks = getattr(options, "masks", None)
    affixes = [getattr(options, name, None) for name in ("image_suffix", "mask_prefix", "mask_suffix")]
    for source in (options.data, getattr(options, "validation_data", None)):
        if source is None or source == DIGITS or isinstance(source, InMemory):
            continue
        check_text(source)
        path = os.path.expanduser(source)
        if masks is not None or any(affixes):
            check_folder("data", Path(path), "; masks and mask_suffix are for folders of images")
        elif not (is_hub_name(source) or os.path.exists(path) or any(glob.iglob(path, recursive=True))):
            raise unknown_source(source, "there is no such file or folder")
    for folder in (masks, getattr(options, "validation_masks", None)):
        if folder is not None and not isinstance(folder, InMemory):
            check_masks(Path(folder).expanduser())
