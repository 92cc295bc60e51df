"""Where images with masks come from: columns of a data set, or folders of files, paired by their names."""

import filecmp
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features

from unet_diffusion.data.annotations import refuse_annotations
from unet_diffusion.data.folders import (
    IMAGE_SUFFIXES,
    MOST_EXAMPLES,
    check_folder,
    check_masks,
    check_text,
    stored_path,
)
from unet_diffusion.data.masked.layouts import Layout, find_layout, holds_table
from unet_diffusion.data.masked.pairing import (
    NEARLY_ALL,
    Affixes,
    class_parts,
    first,
    group,
    guess_affixes,
    natural,
    pair,
    shifted,
)
from unet_diffusion.data.sources import find_image_column, listing, of_files, open_all_columns, stated_column, undecoded


@dataclass(frozen=True)
class MaskedSource:
    """The rows of a source of images with masks, and what was understood about its files.

    Attributes:
        rows: undecoded columns `image`, `mask` and perhaps `instances`; the mask of an image without one is empty.
        notes: sentences for the summary of the data, such as "34 files were left out: 34 .heic".
        orphans: masks without an image.
        class_names: of masks with a file for each class, the background first; else empty.
    """

    rows: Dataset
    notes: tuple[str, ...] = ()
    orphans: tuple[Path, ...] = ()
    class_names: tuple[str, ...] = ()


def open_masked_source(
    source: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    mask_column: str | None = None,
    instances_column: str | None = None,
    masks: str | Path | None = None,
    mask_suffix: str | None = None,
    mask_prefix: str | None = None,
    image_suffix: str | None = None,
    masks_per_image: str = "one",
    class_files: Collection[str] | None = None,
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
        masks: folder of masks, which have the names of their images except for the ending (`a/1.jpg` and `a/1.png`), or
            else names that differ where those of the images do (`pair` in `unet_diffusion.data.masked.pairing`).
        mask_suffix: end of the names of masks before the ending (`1.jpg` and `1_mask.png`); without `masks`, masks lie
            beside their images.
        mask_prefix: beginning of the names of masks (`1.jpg` and `mask_1.png`).
        image_suffix: end of the names of images before the ending (`1_0000.png` and `1.png`).
        masks_per_image: "one"; "objects" or "classes" if each image has a file for each of them. The column `mask` then
            holds lists, of the objects in the order of their names, or of the classes above 0 in their order, None
            for those without a file.
        class_files: with "classes", the names of the classes above 0 in their order, by what names of masks have beyond
            those of images; by default those that occur, sorted.
        cache_dir: as in `open_source`.

    Raises:
        ValueError: the source, the split or a column does not exist; two files have the same name; names do not tell
            which mask belongs to which image; or there are polygons instead of masks.
    """
    affixes = Affixes(image_suffix or "", mask_prefix or "", mask_suffix or "")
    folder = Path(source).expanduser()
    in_folders = masks is not None or bool(affixes)
    columns_stated = (image_column, mask_column, instances_column) != (None, None, None)
    if in_folders or (not columns_stated and folder.is_dir() and not holds_table(folder, split)):
        if mask_column is not None or instances_column is not None:
            raise ValueError(
                "mask_column and instances_column are for data sets with columns, but masks are in folders."
            )
        check_text(str(folder))
        check_folder("data", folder, "; masks and mask_suffix are for folders of images")
        mask_folder = None if masks is None else Path(masks).expanduser()
        if mask_folder is not None:
            check_masks(mask_folder)
        return _open_folders(find_layout(folder, split, mask_folder, affixes), masks_per_image, class_files)
    if masks_per_image != "one":
        raise ValueError(
            f"masks_per_image is {masks_per_image!r}, but {source} has columns; it is for folders of images and masks."
        )
    source_of_columns = open_all_columns(str(source), split, False, None if cache_dir is None else str(cache_dir))
    opened = source_of_columns.rows
    assert isinstance(opened, Dataset)
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
    return MaskedSource(renamed, source_of_columns.notes)


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


def _open_folders(layout: Layout, per_image: str, classes: Collection[str] | None) -> MaskedSource:
    if per_image == "one":
        pairs, way = pair(layout.images, layout.masks)
        _refuse_shifted(layout)
        if not pairs:
            pairs, way = _single(layout), "by the beginning of their names, or by their folders"
        found: dict[str, list[str | None]] = {image: [mask] for image, mask in pairs.items()}
        names: list[str] = []
    else:
        groups = group(layout.images, layout.masks)
        if not groups:
            raise unpaired(layout)
        way = f"by the names; the files of an image are its {per_image}"
        found, names = _of_classes(groups, classes) if per_image == "classes" else (_of_objects(groups), [])
    files = {image: [layout.masks[mask] if mask else None for mask in masks] for image, masks in found.items()}
    used = {mask for masks in found.values() for mask in masks}
    orphans = tuple(layout.masks[name] for name in sorted(layout.masks.keys() - used))
    pairs_told = _told(layout, files, way)
    _refuse_copies(layout, files)
    rows = _rows(layout.images, files, per_image)
    told = [f"the classes are the files of each image: {', '.join(names)}."] if names else []
    return MaskedSource(rows, (*layout.notes, pairs_told, *told), orphans, ("background", *names) if names else ())


def _refuse_shifted(layout: Layout) -> None:
    if shifted(layout.images, layout.masks):
        (image,), (mask,) = layout.images.keys() - layout.masks.keys(), layout.masks.keys() - layout.images.keys()
        raise ValueError(
            f"only image {image} has no mask and only mask {mask} has no image, the first of one row and the last of "
            "the other, so that one may count from 0 and the other from 1. Rename the files of one if so; if the names "
            f"are right, move {layout.images[image]} and {layout.masks[mask]} away."
        )


def _single(layout: Layout) -> dict[str, str]:
    """Returns the pairs by `group`; raises a ValueError if there are none, or several masks of one image."""
    groups = group(layout.images, layout.masks)
    least = NEARLY_ALL * min(len(layout.images), len(layout.masks))
    if not groups or len(groups) < least and sum(map(len, groups.values())) < least:
        raise unpaired(layout)
    several = next((image for image, masks in groups.items() if len(masks) > 1), None)
    if several is not None:
        masks = ", ".join(layout.masks[mask].name for mask in list(groups[several])[:MOST_EXAMPLES])
        raise ValueError(
            f"{layout.images[several].name} has {len(groups[several])} masks in {layout.places[1]}: {masks}. If each "
            "is one object, give masks_per_image='objects'; if each is one class, masks_per_image='classes'; to use "
            "one of them alone, give the mask_suffix that it has."
        )
    return {image: mask for image, masks in groups.items() for mask in masks}


def _of_objects(groups: dict[str, dict[str, str]]) -> dict[str, list[str | None]]:
    return {image: list(masks) for image, masks in groups.items()}


def _of_classes(
    groups: dict[str, dict[str, str]], stated: Collection[str] | None
) -> tuple[dict[str, list[str | None]], list[str]]:
    """Returns the masks of each image in the order of the classes, None for those without a file, and the classes."""
    parts = class_parts(extra for masks in groups.values() for extra in masks.values())
    occurring = sorted(set(parts.values()), key=natural)
    classes = occurring if stated is None else list(stated)
    unknown = [name for name in occurring if name not in classes]
    if unknown:
        raise ValueError(
            f"masks of the classes {', '.join(unknown)} were found, but the classes are the background and "
            f"{', '.join(classes)}; class_names must be the background and then the names that the files have: "
            f"{', '.join(occurring)}."
        )
    if stated is None and all(name.isdecimal() or not name for name in occurring):
        raise ValueError(
            f"with masks_per_image='classes', the classes would be {', '.join(map(repr, occurring[:MOST_EXAMPLES]))}, "
            "by what names of masks have beyond those of images. Numbers are rather objects: give "
            "masks_per_image='objects', or state these classes by class_names, the background first."
        )
    found: dict[str, list[str | None]] = {}
    for image, masks in groups.items():
        ordered: list[str | None] = [None] * len(classes)
        for mask, extra in masks.items():
            place = classes.index(parts[extra])
            if ordered[place] is not None:
                raise ValueError(
                    f"{ordered[place]} and {mask} are both masks of the class {parts[extra]} for the image {image}; "
                    "remove or rename one."
                )
            ordered[place] = mask
        found[image] = ordered
    return found, classes


def unpaired(layout: Layout) -> ValueError:
    """Returns the error for masks of which none belongs to an image, with the options that settle it if names do."""
    refuse_annotations(layout.places[1])
    image_names, mask_names = list(layout.images), list(layout.masks)
    without = f", without {layout.affixes}" if layout.affixes else ""
    ending = _suffix_with_ending(layout)
    guess = None if layout.affixes else guess_affixes(image_names, mask_names)
    if ending:
        advice = f"mask_suffix stands before the ending; give mask_suffix={ending!r}."
    elif guess:
        advice = f"Names suggest {guess}; give that if it is right."
    else:
        advice = (
            "They must be equal except for the ending; what else names have is stated by image_suffix, mask_suffix and "
            "mask_prefix."
        )
    return ValueError(
        f"no image of {layout.places[0]} has a mask in {layout.places[1]}: the first names are {first(image_names)} "
        f"and {first(mask_names)}{without}. {advice}"
    )


def _suffix_with_ending(layout: Layout) -> str:
    """Returns the stated suffix without the ending of a file, if it has one and no name has the suffix."""
    stated = Path("a" + layout.affixes.mask_suffix)
    return stated.stem[1:] if not layout.masks and stated.suffix.lower() in IMAGE_SUFFIXES else ""


def _told(layout: Layout, files: dict[str, list[Path | None]], way: str) -> str:
    image, masks = next(iter(files.items()))
    shown = ", ".join(mask.name for mask in masks[:MOST_EXAMPLES] if mask is not None)
    without = f", without {layout.affixes}" if layout.affixes else ""
    return f"images are paired with masks {way}{without}: {layout.images[image].name} with {shown}."


def _refuse_copies(layout: Layout, files: dict[str, list[Path | None]]) -> None:
    """Raises a ValueError if the first masks are the images themselves, or copies beside polygons or one in another."""
    couples = [(layout.images[image], mask) for image, masks in list(files.items())[:MOST_EXAMPLES] for mask in masks]
    if not all(mask is not None and _is_copy(image, mask) for image, mask in couples):
        return
    refuse_annotations(layout.places[1])
    image, mask = couples[0]
    one, other = (place.resolve() for place in layout.places)
    if one in (other, *other.parents) or other in one.parents or image.resolve() == (mask or image).resolve():
        raise ValueError(f"{mask} is the image {image} or a copy of it, but masks must be files of their own.")


def _is_copy(image: Path, mask: Path) -> bool:
    try:
        return filecmp.cmp(image, mask, shallow=False)
    except OSError:  # unreadable files are named when they are decoded
        return False


def _rows(images: dict[str, Path], files: dict[str, list[Path | None]], per_image: str) -> Dataset:
    """Returns the rows; a mask is one image, or for several files of an image a list of them."""
    value = datasets.Image(decode=False)
    several = per_image != "one"
    masks = [[_stored(file) for file in files.get(image, [])] for image in images]
    columns: dict[str, list[Any]] = {
        "image": [_stored(file) for file in images.values()],
        "mask": masks if several else [found[0] if found else None for found in masks],
    }
    features = Features({"image": value, "mask": datasets.List(value) if several else value})
    used = [file for image in images for file in (images[image], *files.get(image, [])) if file is not None]
    rows = of_files(columns, features, used)
    key = [rows._fingerprint, per_image, columns["mask"]]  # since other pairs may come of the same files
    return Dataset(rows.data, info=rows.info, fingerprint=datasets.fingerprint.Hasher.hash(key))


def _stored(file: Path | None) -> dict[str, Any] | None:
    return None if file is None else {"bytes": None, "path": stored_path(file)}
