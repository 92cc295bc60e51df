"""Where images with masks come from: columns of a data set, or folders of files, paired by their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features

from unet_diffusion.data.annotations import refuse_annotations
from unet_diffusion.data.columns import (
    find_image_column,
    groups_of,
    note_on_groups,
    stated_column,
    undecoded,
    with_groups,
)
from unet_diffusion.data.config import Data, InMemory
from unet_diffusion.data.folders import check_folder, check_masks, check_text, stored_path
from unet_diffusion.data.labels import listing
from unet_diffusion.data.masked.layouts import Layout, find_layout, holds_table
from unet_diffusion.data.masked.matching import match
from unet_diffusion.data.masked.memory import masked_rows
from unet_diffusion.data.masked.pairing import Affixes
from unet_diffusion.data.memory import as_source
from unet_diffusion.data.sources import of_files, open_all_columns


@dataclass(frozen=True)
class MaskedSource:
    """The rows of a source of images with masks, and facts about its files.

    Attributes:
        rows: undecoded columns `image`, `mask` and perhaps `instances`; if an image has no mask, the cell is empty.
        notes: sentences for the summary of the data, such as "34 files were left out: 34 .heic".
        orphans: masks without an image.
        class_names: the classes of masks with a file for each class, the background first; else empty.
    """

    rows: Dataset
    notes: tuple[str, ...] = ()
    orphans: tuple[Path, ...] = ()
    class_names: tuple[str, ...] = ()


def open_masked_source(
    source: Data,
    split: str = "train",
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    instances_column: str | None = None,
    masks: Data | None = None,
    mask_suffix: str | None = None,
    mask_prefix: str | None = None,
    image_suffix: str | None = None,
    masks_per_image: str = "one",
    class_files: Sequence[str] | None = None,
    group_column: str | None = None,
    cache_dir: str | Path | None = None,
) -> MaskedSource:
    """Opens images with masks as a data set with undecoded columns `image`, `mask` and perhaps `instances`.

    Args:
        source: as `open_source` takes it; a folder of images if `masks` or an affix of names is given. A folder without
            tables may also hold folders with usual names, such as `images` and `masks`.
        split: name of the split; for folders, the name of a subfolder of each.
        image_column: as in `open_source`.
        mask_column: by default the column `mask`, or else the only other one of type Image.
        instances_column: column of instance maps; none by default.
        masks: folder of masks. They have the names of their images except for the ending (`a/1.jpg` and `a/1.png`), or
            else names that differ where those of the images do (`pair` in `unet_diffusion.data.masked.pairing`).
        mask_suffix: end of the names of masks before the ending (`1.jpg` and `1_mask.png`); without `masks`, masks lie
            beside their images.
        mask_prefix: beginning of the names of masks (`1.jpg` and `mask_1.png`).
        image_suffix: end of the names of images before the ending (`1_0000.png` and `1.png`).
        masks_per_image: "one"; "objects" or "classes" if each image has a file for each of them. The column `mask` then
            holds lists: of the objects in the order of their names, or of the classes above 0 in their order, with None
            for classes without a file.
        class_files: with "classes", the names of the classes above 0 in order, as they appear in the part of a mask's
            name beyond the image's; by default those that occur, sorted.
        group_column: as in `open_with_notes`; it adds the column `group`.
        cache_dir: as in `open_source`.

    Raises:
        ValueError: the source, the split or a column does not exist; two files have the same name; the names do not
            tell which mask belongs to which image; or there are polygons instead of masks.
    """
    source, masks = as_source(source), None if masks is None else as_source(masks, "masks")
    affixes = Affixes(image_suffix or "", mask_prefix or "", mask_suffix or "")
    if isinstance(masks, InMemory):
        if group_column is not None:
            raise ValueError(
                f"group_column is {group_column!r}, but images and masks in memory have no columns; give a Dataset."
            )
        return MaskedSource(masked_rows(source, split, masks))
    in_folders = masks is not None or bool(affixes)
    folder = Path(source).expanduser()
    if folder.is_file():
        refuse_annotations(folder)
    stated = {"image": image_column, "mask": mask_column, "instances": instances_column}
    if in_folders or (not any(stated.values()) and folder.is_dir() and not holds_table(folder, split)):
        if mask_column is not None or instances_column is not None:
            raise ValueError(
                "mask_column and instances_column are for data sets with columns, but masks are in folders."
            )
        layout = _find_layout(folder, split, masks, affixes)
        found = _open_folders(layout, masks_per_image, class_files)
        every_column = found.rows
    else:
        if masks_per_image != "one":
            raise ValueError(
                f"masks_per_image is {masks_per_image!r}, but {source} has columns; it is for folders of images and "
                "masks."
            )
        opened = open_all_columns(source, split, False, None if cache_dir is None else str(cache_dir))
        every_column = opened.rows
        assert isinstance(every_column, Dataset)
        found = MaskedSource(_select_columns(every_column, stated, str(source)), opened.notes)
    if group_column is None:
        return found
    return _grouped(found, groups_of(every_column, group_column, str(source)), group_column)


def _find_layout(folder: Path, split: str, masks: str | None, affixes: Affixes) -> Layout:
    check_text(str(folder))
    check_folder("data", folder, "; masks and mask_suffix are for folders of images")
    mask_folder = None if masks is None else Path(masks).expanduser()
    if mask_folder is not None:
        check_masks(mask_folder)
    return find_layout(folder, split, mask_folder, affixes)


def _select_columns(rows: Dataset, stated: Mapping[str, str | None], source: str) -> Dataset:
    """Returns the undecoded columns `image`, `mask` and, if stated, `instances`."""
    image = find_image_column(rows.features, stated["image"], source)
    columns = {"image": image, "mask": _mask_column(rows.features, image, stated["mask"], source)}
    if stated["instances"] is not None:
        columns["instances"] = stated_column(rows.features, "instances_column", stated["instances"], source)
        if columns["instances"] in (image, columns["mask"]):
            raise ValueError(
                f"instances_column is {stated['instances']!r}, but that is the column of the images or masks; for "
                "masks that are instance maps give mask_encoding='instances' alone."
            )
    rows = rows.select_columns(list(columns.values()))
    for name, column in columns.items():
        rows = undecoded(rows, column, f"{name}_column")
    return rows.rename_columns({old: new for new, old in columns.items() if old != new})


def _grouped(source: MaskedSource, groups: list[str], column: str) -> MaskedSource:
    return replace(source, rows=with_groups(source.rows, groups), notes=(*source.notes, note_on_groups(groups, column)))


def _mask_column(features: Features, image: str, stated: str | None, source: str) -> str:
    if stated is not None or "mask" in features:
        return stated_column(features, "mask_column", stated or "mask", source)
    others = [name for name, kind in features.items() if isinstance(kind, datasets.Image) and name != image]
    if len(others) != 1:
        raise ValueError(
            f"{source} has no column of masks, or several; name it by mask_column, or for folders of files give masks "
            f"(a folder) or mask_suffix. {listing(features)}"
        )
    return others[0]


def _open_folders(layout: Layout, per_image: str, classes: Sequence[str] | None) -> MaskedSource:
    matched = match(layout, per_image, classes)
    class_names = ("background", *matched.classes) if matched.classes else ()
    rows = _rows(layout.images, matched.files, several=per_image != "one")
    return MaskedSource(rows, (*layout.notes, *matched.notes), matched.orphans, class_names)


def _rows(images: dict[str, Path], files: dict[str, list[Path | None]], several: bool) -> Dataset:
    """Returns the rows; a mask is one image, or a list of them if an image has several files."""
    value = datasets.Image(decode=False)
    masks = [[_stored(file) for file in files.get(image, [])] for image in images]
    columns: dict[str, list[Any]] = {
        "image": [_stored(file) for file in images.values()],
        "mask": masks if several else [found[0] if found else None for found in masks],
    }
    features = Features({"image": value, "mask": datasets.List(value) if several else value})
    used = [file for image in images for file in (images[image], *files.get(image, [])) if file is not None]
    return of_files(columns, features, used)


def _stored(file: Path | None) -> dict[str, Any] | None:
    return None if file is None else {"bytes": None, "path": stored_path(file)}
