"""Where images with masks come from: columns of a data set, two folders, or one folder with a suffix."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features

from unet_diffusion.data.folders import MOST_EXAMPLES, check_folder, check_text, images_of_split, stored_path
from unet_diffusion.data.sources import (
    find_image_column,
    groups_of,
    listing,
    of_files,
    open_all_columns,
    stated_column,
    undecoded,
    with_groups,
)
from unet_diffusion.files import readable


@dataclass(frozen=True)
class MaskedSource:
    """The rows of a source of images with masks, and what was understood about its files.

    Attributes:
        rows: undecoded columns `image`, `mask` and perhaps `instances`; the mask of an image without one is empty.
        notes: sentences for the summary of the data, such as "34 files were left out: 34 .heic".
        orphans: masks without an image.
    """

    rows: Dataset
    notes: tuple[str, ...] = ()
    orphans: tuple[Path, ...] = ()


def open_masked_source(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    instances_column: str | None = None,
    masks: str | Path | None = None,
    mask_suffix: str | None = None,
    group_column: str | None = None,
    cache_dir: str | Path | None = None,
) -> MaskedSource:
    """Opens images with masks as a data set with undecoded columns `image`, `mask` and perhaps `instances`.

    Args:
        source: as `open_source` takes it; a folder of images if `masks` or `mask_suffix` is given.
        split: name of the split; for folders, the name of a subfolder of each.
        image_column: as in `open_source`.
        mask_column: by default the column `mask`, or else the only other one of type Image.
        instances_column: column of instance maps; none by default.
        masks: folder of masks, which have the names of their images except for the ending (`a/1.jpg` and `a/1.png`).
        mask_suffix: end of the names of masks before the ending (`1.jpg` and `1_mask.png`); without `masks`, masks lie
            beside their images.
        group_column: as in `open_with_notes`; it adds the column `group`.
        cache_dir: as in `open_source`.

    Raises:
        ValueError: the source, the split or a column does not exist, or two files have the same name.
    """
    if masks is not None or mask_suffix is not None:
        if mask_column is not None or instances_column is not None:
            raise ValueError(
                "mask_column and instances_column are for data sets with columns, but masks are in folders."
            )
        paired = _open_folders(Path(source).expanduser(), split, masks, mask_suffix or "")
        return paired if group_column is None else _grouped(paired, groups_of(paired.rows, group_column, str(source)))
    source_of_columns = open_all_columns(str(source), split, False, None if cache_dir is None else str(cache_dir))
    opened = source_of_columns.rows
    assert isinstance(opened, Dataset)
    groups = None if group_column is None else groups_of(opened, group_column, str(source))
    image = find_image_column(opened.features, image_column, str(source))
    columns = {"image": image, "mask": _mask_column(opened.features, image, mask_column, str(source))}
    if instances_column is not None:
        columns["instances"] = stated_column(opened.features, "instances_column", instances_column, str(source))
        if instances_column in (image, columns["mask"]):
            raise ValueError(
                f"instances_column is {instances_column!r}, but that is the column of the images or masks; for masks "
                "that are instance maps give mask_encoding='instances' alone."
            )
    opened = opened.select_columns(list(columns.values()))
    for name, column in columns.items():
        opened = undecoded(opened, column, f"{name}_column")
    renamed = opened.rename_columns({old: new for new, old in columns.items() if old != new})
    found = MaskedSource(renamed, source_of_columns.notes)
    return found if groups is None else _grouped(found, groups)


def _grouped(source: MaskedSource, groups: list[str]) -> MaskedSource:
    return replace(source, rows=with_groups(source.rows, groups))


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


def _open_folders(folder: Path, split: str, masks: str | Path | None, suffix: str) -> MaskedSource:
    check_text(str(folder))
    check_folder("data", folder, "; masks and mask_suffix are for folders of images")
    mask_folder = folder if masks is None else Path(masks).expanduser()
    check_folder("masks", mask_folder)
    home, files = images_of_split(folder, split)
    mask_home, mask_files = (home, files) if masks is None else images_of_split(mask_folder, split)
    if masks is None:
        files = [file for file in files if not file.stem.endswith(suffix)]
    images = _by_name(files, home, "")
    found = _by_name([file for file in mask_files if file.stem.endswith(suffix)], mask_home, suffix)
    if not images.keys() & found.keys():
        raise ValueError(
            f"no image of {home} has a mask in {mask_home}: the first names are "
            f"{', '.join(sorted(images)[:MOST_EXAMPLES]) or 'none'} and "
            f"{', '.join(sorted(found)[:MOST_EXAMPLES]) or 'none'}"
            f"{f', without the suffix {suffix!r}' if suffix else ''}; they must be equal except for the ending."
        )
    orphans = tuple(found[name] for name in sorted(found.keys() - images.keys()))
    rows: dict[str, list[Any]] = {
        "image": [{"bytes": None, "path": stored_path(images[name])} for name in images],
        "mask": [{"bytes": None, "path": stored_path(found[name])} if name in found else None for name in images],
    }
    features = Features({"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)})
    used = [*images.values(), *(found[name] for name in images if name in found)]
    return MaskedSource(of_files(rows, features, used), orphans=orphans)


def _by_name(files: list[Path], home: Path, suffix: str) -> dict[str, Path]:
    """Returns the files by their path below `home`, without the ending and the suffix."""
    named: dict[str, Path] = {}
    for file in files:
        name = readable(file.relative_to(home).with_suffix("").as_posix()).removesuffix(suffix)
        if name in named:
            raise ValueError(
                f"{named[name]} and {file} have the same name except for the ending; remove or rename one."
            )
        named[name] = file
    return named
