"""Which files in folders are images and which are masks, each with the name by which they are paired."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from unet_diffusion.data.annotations import CELLPOSE, is_cellpose_pickle, refuse_annotations
from unet_diffusion.data.folders import IMAGE_SUFFIXES, METADATA, images_of_split, is_cache, tables_in
from unet_diffusion.data.masked.pairing import LIKE_MASKS, Affixes, by_name, first, guess_in_one_folder, name_of

# fmt: off
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "imagestr"})
MASK_FOLDERS = frozenset({
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "labelstr",
    "gt", "ground_truth", "groundtruth", "segmentation", "segmentations", "1st_manual",
})
# fmt: on


@dataclass(frozen=True)
class Layout:
    """The images and the masks of a split, by name.

    Attributes:
        images: the file of each image, by name.
        masks: the file of each mask, by name.
        places: folders of the images and of the masks, for messages.
        affixes: the parts of names, as the user states them, beyond what an image and its mask share.
        notes: sentences about what was understood.
    """

    images: dict[str, Path]
    masks: dict[str, Path]
    places: tuple[Path, Path]
    affixes: Affixes = Affixes()
    notes: tuple[str, ...] = ()


def holds_table(folder: Path, split: str) -> bool:
    """Returns whether a folder holds tables, shards or metadata, which tell images from masks themselves."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    of_split = [place for place in _subfolders(folder) if place.name.lower() == split.lower()]
    if any((place / name).is_file() for place in (folder, *of_split) for name in METADATA):
        return True
    return bool(tables_in(folder))


def find_layout(folder: Path, split: str, masks: Path | None, affixes: Affixes) -> Layout:
    """Finds the images and the masks of a split.

    They lie in two folders; or in one folder, where affixes tell them apart; or in a folder that has, itself or in its
    subfolders, folders with usual names such as `images` and `masks`.

    Args:
        folder: of the images, or of both.
        split: a subfolder of each folder, if they have splits.
        masks: folder of the masks, if they have one of their own.
        affixes: the affixes of the names.

    Raises:
        ValueError: nothing tells masks from images, a folder has no image, or there are polygons instead of masks.
    """
    if masks is not None and masks.resolve() != folder.resolve():
        return _two_folders(folder, masks, split, affixes)
    usual = _usual_folders(folder, split, affixes)
    if usual is not None:
        return usual
    if affixes:
        return _one_folder(folder, split, affixes)
    if not any(path.parent == folder for path in _likely_masks(folder)):
        refuse_annotations(folder)
    raise _unclear(folder, split, stated=masks is not None)


def _two_folders(folder: Path, masks: Path, split: str, affixes: Affixes) -> Layout:
    notes: list[str] = []
    if _inside(masks, folder):
        candidates = _children(folder, IMAGE_FOLDERS)
        if len(candidates) == 1 and not _inside(masks, candidates[0]):
            layout = _two_folders(candidates[0], masks, split, affixes)
            return replace(layout, notes=(f"the images are those in {candidates[0]}.", *layout.notes))
    home, files = _images_of_split(folder, split, notes)
    mask_home, mask_files = _images_of_split(masks, split, notes)
    if _inside(masks, folder):
        home, files = _outside(home, files, mask_home)
        notes.append(f"files in {masks} are masks; the images are the other files of {folder}.")
    elif _inside(folder, masks):
        mask_home, mask_files = _outside(mask_home, mask_files, home)
        notes.append(f"files in {folder} are images; the masks are the other files of {masks}.")
    images = _named(_below(home, files), home, affixes.of_image, affixes, notes)
    by_mask = _named(_below(mask_home, mask_files), mask_home, affixes.of_mask, affixes, notes)
    return Layout(images, by_mask, (home, mask_home), affixes, tuple(dict.fromkeys(notes)))


def _one_folder(folder: Path, split: str, affixes: Affixes) -> Layout:
    """Tells masks from images by the affixes; if a name has the affixes of both, the longer ones decide."""
    notes: list[str] = []
    home, files = _images_of_split(folder, split, notes)
    of_masks = len(affixes.mask_prefix + affixes.mask_suffix)
    images: list[Path] = []
    masks: list[Path] = []
    others: list[Path] = []
    for file in files:
        name = name_of(file.relative_to(home))
        is_image = bool(affixes.image_suffix) and affixes.of_image(name) is not None
        is_mask = bool(of_masks) and affixes.of_mask(name) is not None
        if is_image and is_mask:
            is_image, is_mask = len(affixes.image_suffix) > of_masks, len(affixes.image_suffix) <= of_masks
        neither = others if affixes.image_suffix and of_masks else masks if affixes.image_suffix else images
        (images if is_image else masks if is_mask else neither).append(file)
    if others:
        notes.append(_left_out(others, home, affixes))
    by_image = _named(_below(home, images), home, affixes.of_image, affixes, notes)
    by_mask = _named(_below(home, masks), home, affixes.of_mask, affixes, notes)
    return Layout(by_image, by_mask, (home, home), affixes, tuple(notes))


def _usual_folders(folder: Path, split: str, affixes: Affixes) -> Layout | None:
    """Finds folders of images and of masks with usual names; raises a ValueError if there are several of one kind."""
    images, masks = _children(folder, IMAGE_FOLDERS), _children(folder, MASK_FOLDERS)
    if len(images) == 1 and len(masks) == 1:
        layout = _two_folders(images[0], masks[0], split, affixes)
        return replace(layout, notes=(_recognised(images[0], masks[0]), *layout.notes))
    if images and masks:
        raise _several(folder, [path.name for path in images], [path.name for path in masks])
    notes: list[str] = []
    home, files = _images_of_split(folder, split, notes)
    found: dict[str, list[tuple[Path, Path]]] = {}  # of each usual name: paths without that folder, and files
    for file in files:
        path = file.relative_to(home)
        usual = [part for part in path.parts[:-1] if _usual(part) in IMAGE_FOLDERS | MASK_FOLDERS]
        if usual:
            rest = list(path.parts)
            rest.remove(usual[-1])
            found.setdefault(usual[-1], []).append((Path(*rest), file))
    image_folders = sorted(name for name in found if _usual(name) in IMAGE_FOLDERS)
    mask_folders = sorted(name for name in found if _usual(name) in MASK_FOLDERS)
    if not (image_folders and mask_folders):
        return None
    if len(image_folders) > 1 or len(mask_folders) > 1:
        raise _several(home, image_folders, mask_folders)
    image_folder, mask_folder = image_folders[0], mask_folders[0]
    others = len(files) - len(found[image_folder]) - len(found[mask_folder])
    if others:
        notes.append(f"{others} files of {home} lie neither in a folder {image_folder} nor {mask_folder}: left out.")
    flat = all(home / name in file.parents for name in (image_folder, mask_folder) for _, file in found[name])
    places = (home / image_folder, home / mask_folder) if flat else (home, home)
    told = _recognised(*places) if flat else f"images lie in folders {image_folder}, masks in folders {mask_folder}."
    by_image = _named(found[image_folder], places[0], affixes.of_image, affixes, notes)
    by_mask = _named(found[mask_folder], places[1], affixes.of_mask, affixes, notes)
    return Layout(by_image, by_mask, places, affixes, (told, *notes))


def _recognised(images: Path, masks: Path) -> str:
    return f"the images are those in {images}, the masks those in {masks}."


def _several(home: Path, images: list[str], masks: list[str]) -> ValueError:
    kinds = [kind for kind, names in (("images", images), ("masks", masks)) if len(names) > 1]
    return ValueError(
        f"{home} has several folders of {' and of '.join(kinds)}: {', '.join(sorted(images))} and "
        f"{', '.join(sorted(masks))}. Choose one of each, such as data='{home / images[0]}' and "
        f"masks='{home / masks[0]}'."
    )


def _unclear(folder: Path, split: str, stated: bool) -> ValueError:
    """Returns the error that asks where the masks are, with suggestions from the names.

    `stated` means that the user gave this folder for the images and for the masks.
    """
    home, files = _images_of_split(folder, split, [])
    by_ending = _same_name_but_for_ending(home, files)
    likely = _likely_masks(home)
    guess = guess_in_one_folder({name_of(path) for path, _ in _below(home, files)})
    if guess:
        advice = f"Names suggest that masks lie beside their images: if so, give {guess}."
    elif by_ending:
        advice = by_ending
    elif likely:
        advice = f"If the masks are those in {' or '.join(map(str, likely))}, give masks='{likely[0]}'."
    else:
        advice = (
            "Give masks, the folder of the masks, or mask_suffix (or mask_prefix, image_suffix), by which the names of "
            "masks beside their images differ. For images alone, doctor has the option plain."
        )
    start = f"masks is {folder}, the folder of the images" if stated else f"{folder} has images, but no masks are named"
    return ValueError(f"{start}: the first names are {first([str(path) for path, _ in _below(home, files)])}. {advice}")


def _likely_masks(home: Path) -> list[Path]:
    """Returns folders in or beside that of the images that are named like masks: `masks`, or `train_masks`."""
    within = [path for path in _subfolders(home) if LIKE_MASKS.search(path.name)]
    beside = [path for path in _subfolders(home.parent) if path != home and LIKE_MASKS.search(path.name)]
    beside = [path for path in beside if _usual(path.name) in MASK_FOLDERS or home.name in path.name]
    return [path for path in within + beside if _holds_image(path)]


def _same_name_but_for_ending(home: Path, files: list[Path]) -> str:
    endings: dict[str, list[Path]] = {}
    for file in files:
        endings.setdefault(name_of(file.relative_to(home)), []).append(file)
    couple = next((found for found in endings.values() if len(found) == 2), None)
    if couple is None or 2 * len(endings) != len(files):
        return ""
    a, b = (file.name for file in couple)
    return f"If {a} and {b} are an image and its mask, move the masks to a folder of their own and give it as masks."


def _images_of_split(folder: Path, split: str, notes: list[str]) -> tuple[Path, list[Path]]:
    """Lists the images as `images_of_split` does, without pickles of Cellpose; an error names polygons."""
    if not _holds_image(folder):
        refuse_annotations(folder)
    found = images_of_split(folder, split)
    home, files = found.home, found.files
    notes.extend(found.notes)
    readable = [file for file in files if not is_cellpose_pickle(file)]
    pickles = sorted(set(files).difference(readable))
    if not readable:
        raise ValueError(f"{pickles[0]} cannot be read: {CELLPOSE}.")
    if pickles:
        notes.append(f"{len(pickles)} files such as {pickles[0].name} are left out: {CELLPOSE}.")
    return home, readable


def _below(home: Path, files: list[Path]) -> list[tuple[Path, Path]]:
    return [(file.relative_to(home), file) for file in files]


def _named(
    files: list[tuple[Path, Path]], home: Path, strip: Callable[[str], str | None], affixes: Affixes, notes: list[str]
) -> dict[str, Path]:
    """Returns files by their paths without affixes and ending; files without an affix are left out, with a note."""
    names = [(strip(name_of(path)), file) for path, file in files]
    kept = [(name, file) for name, file in names if name is not None]
    others = [file for name, file in names if name is None]
    if others and kept:
        notes.append(_left_out(others, home, affixes))
    return by_name(kept)


def _left_out(files: list[Path], home: Path, affixes: Affixes) -> str:
    examples = first([file.name for file in files])
    return f"{len(files)} files of {home} are left out, since their names do not fit {affixes}: {examples}."


def _children(folder: Path, names: frozenset[str]) -> list[Path]:
    """Returns the subfolders that have one of the names, in any case, and hold an image."""
    return [entry for entry in _subfolders(folder) if _usual(entry.name) in names and _holds_image(entry)]


def _usual(name: str) -> str:
    return re.sub("[ -]", "_", name.casefold())


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # `images_of_split` reports it if the folder holds images
        return []


def _holds_image(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in _walk(folder))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder, followlinks=False):
        names[:] = [name for name in names if not is_cache(Path(parent, name))]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _inside(inner: Path, outer: Path) -> bool:
    return inner.resolve().is_relative_to(outer.resolve())


def _outside(home: Path, files: list[Path], other: Path) -> tuple[Path, list[Path]]:
    """Returns the files that are not inside another folder, and the folder that these files share."""
    within = {parent: _inside(parent, other) for parent in {file.parent for file in files}}
    kept = [file for file in files if not within[file.parent]]
    if not kept:
        raise ValueError(f"all images of {home} lie in {other}; images and masks need folders of their own.")
    return Path(os.path.commonpath([file.parent for file in kept])), kept
