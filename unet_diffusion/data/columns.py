"""The columns of an opened source: which one holds the images, what is in it, the classes, and the groups of rows."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value

from unet_diffusion.data.folders import counted
from unet_diffusion.data.labels import listing
from unet_diffusion.data.names import looks_like_masks

T = TypeVar("T", Dataset, IterableDataset, Dataset | IterableDataset)

FOLDER = "folder"  # value of `group_column`: the images of one folder are a group


def class_names(dataset: Dataset | IterableDataset) -> tuple[str, ...] | None:
    """Returns the names of the classes of an opened source, or None."""
    label = (dataset.features or {}).get("label")
    return tuple(label.names) if isinstance(label, ClassLabel) else None


def image_reader(dataset: Dataset | IterableDataset, column: str = "image") -> Callable[[Any], Any]:
    """Returns a function that turns values of an image column into input for `decode_image`.

    In rows, the values of array columns are nested lists without a dtype, which is taken from the features.
    """
    dtype = _array_dtype(dataset.features[column])
    return (lambda value: value) if dtype is None else (lambda value: np.asarray(value, dtype=dtype))


def find_image_column(features: Features, stated: str | None, source: str) -> str:
    """Returns the stated column, else `image`, else the only image column that is not named like masks.

    Raises:
        ValueError: there is no such column, or several.
    """
    if stated is not None:
        return stated_column(features, "image_column", stated, source)
    if "image" in features:
        return "image"
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if len(found) > 1:
        found = [name for name in found if not looks_like_masks(name)]
    if len(found) != 1:
        raise ValueError(
            f"{source} has no single column of images; name it by image_column, and for segmentation the column of "
            f"masks by mask_column. {listing(features)}"
        )
    return found[0]


def stated_column(features: Features, option: str, name: str, source: str) -> str:
    """Returns the name of a column; raises a ValueError if the source does not have it."""
    if name not in features:
        raise ValueError(f"{option} is {name!r}, but {source} has no such column. {listing(features)}")
    return name


def undecoded(dataset: T, column: str, option: str) -> T:
    """Returns the data set with a column left as bytes, paths or arrays; raises a ValueError if it holds no images."""
    kind = dataset.features[column]
    if _holds_images(kind):
        return dataset.cast_column(column, datasets.Image(decode=False))
    if _array_dtype(kind) is None and kind != Value("binary"):
        raise ValueError(
            f"{option} is {column!r}, which holds no images{_fix_of_no_images(kind)}, or name another column. "
            f"{listing(dataset.features)}"
        )
    return dataset


def _fix_of_no_images(kind: Any) -> str:
    if kind in (Value("string"), Value("large_string")):
        return (
            " but text; if these are paths, give a folder whose metadata.csv has them in a column file_name (or in "
            "Python cast the column to datasets.Image())"
        )
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        return " but flat lists; store arrays (H, W) or (H, W, C), or image files"
    return f" but {kind.dtype if isinstance(kind, Value) else type(kind).__name__}; store arrays or image files"


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def _array_dtype(feature: Any) -> str | None:
    """Returns the dtype of a column of arrays (H, W) or (H, W, C); None for other columns."""
    if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
        return feature.dtype
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    is_number = isinstance(feature, Value) and re.match("bool|u?int|float", feature.dtype) is not None
    return feature.dtype if depth in (2, 3) and is_number else None


def groups_of(rows: Dataset, column: str, source: str) -> list[str]:
    """Returns the name of each row's group: the value of a column, or for "folder" the folder of its image.

    Raises:
        ValueError: there is no such column; it holds anything but text, numbers and dates, or has empty values; or
            "folder" is given for images that are not files of a folder.
    """
    if column == FOLDER and column not in rows.features:
        return _folders_of(rows, source)
    kind = rows.features[stated_column(rows.features, "group_column", column, source)]
    dtype = getattr(kind, "dtype", type(kind).__name__)
    readable_kind = isinstance(kind, ClassLabel) or (isinstance(kind, Value) and not dtype.endswith("binary"))
    values = rows[column][:] if readable_kind else [None]
    if any(value is None or value != value for value in values):  # NaN is no group either
        raise ValueError(
            f"group_column is {column!r}, of type {dtype}, but must hold text, numbers or dates, and no empty values."
        )
    return [str(value) for value in values]


def _folders_of(rows: Dataset, source: str) -> list[str]:
    folder = Path(source).expanduser()
    if folder.is_dir() and isinstance(rows.features.get("image"), datasets.Image):
        images = undecoded(rows.select_columns(["image"]), "image", "image_column")
        if images[0]["image"]["bytes"] is None:
            return [os.path.relpath(os.path.dirname(image["path"]), folder) for image in images["image"]]
    raise ValueError(f"group_column is {FOLDER!r}, but {source} is not a folder of images; name a column.")


def note_on_groups(groups: list[str], column: str) -> str:
    """Returns a note that says how many groups there are, and how large they are."""
    sizes = Counter(groups).values()
    least, most = min(sizes), max(sizes)
    of = f"{least} to {most} images" if least < most else counted(most, "image")
    return f"the images are grouped by {column}: {counted(len(sizes), 'group')} of {of}"


def with_groups(rows: Dataset, groups: list[str]) -> Dataset:
    """Returns the data set with the groups of its rows as the column `group`."""
    return rows.add_column("group", groups, feature=Value("string"))
