"""The masks of each image of a layout: one, or a file for each object or each class."""

import filecmp
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.data.annotations import refuse_annotations
from unet_diffusion.data.folders import IMAGE_SUFFIXES, MOST_EXAMPLES
from unet_diffusion.data.masked.layouts import Layout
from unet_diffusion.data.masked.pairing import (
    NEARLY_ALL,
    class_parts,
    first,
    group,
    guess_affixes,
    kinds_of_masks,
    natural,
    pair,
    shifted,
    stated_parts,
)

Files = dict[str, list[Path | None]]  # the masks of each image, by its name
Found = dict[str, list[str | None]]  # the same, with the names of the masks
Groups = dict[str, dict[str, str]]  # as `group` returns them


@dataclass(frozen=True)
class Matched:
    """The masks of each image.

    Attributes:
        files: by the name of the image. Files of objects are in the order of their names. Files of classes are in the
            order of the classes, with None for files that an image lacks.
        notes: how names were paired, as sentences.
        orphans: masks without an image.
        classes: names of the classes above 0, if the files are classes.
    """

    files: Files
    notes: tuple[str, ...]
    orphans: tuple[Path, ...]
    classes: tuple[str, ...] = ()


def match(layout: Layout, per_image: str, classes: Sequence[str] | None) -> Matched:
    """Finds the masks of each image.

    Args:
        layout: the files and their names.
        per_image: as `MaskedOptions.masks_per_image`.
        classes: names of the classes above 0 in their order; by default those of the files.

    Raises:
        ValueError: no mask belongs to an image, or the names do not tell which mask does.
    """
    names: list[str] = []
    if per_image == "one":
        pairs, way = _one_each(layout)
        found: Found = {image: [mask] for image, mask in pairs.items()}
    else:
        way = f"by their names; the files of an image are its {per_image}"
        groups = group(layout.images, layout.masks)
        if not groups:
            raise _unpaired(layout)
        found = {image: list(masks) for image, masks in groups.items()}
        if per_image == "classes":
            found, names = _of_classes(groups, classes)
    files: Files = {image: [layout.masks[name] if name else None for name in masks] for image, masks in found.items()}
    _refuse_copies(layout, files)
    used = {name for masks in found.values() for name in masks}
    orphans = tuple(layout.masks[name] for name in sorted(layout.masks.keys() - used))
    notes = [_told(layout, files, way)]
    if names:
        notes.append(f"the classes are the background and {', '.join(names)}, as the files of an image are called.")
    return Matched(files, tuple(notes), orphans, tuple(names))


def _one_each(layout: Layout) -> tuple[dict[str, str], str]:
    """Returns the mask of each image by name, and the way in which the pairs were found."""
    _refuse_shifted(layout)
    pairs, way = pair(layout.images, layout.masks)
    return (pairs, way) if pairs else (_single(layout), "by the beginning of their names, or by their folders")


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
        raise _unpaired(layout)
    several = next((image for image, masks in groups.items() if len(masks) > 1), None)
    if several is not None:
        files = [layout.masks[mask].relative_to(layout.places[1]) for mask in groups[several]]
        masks = ", ".join(map(str, files[:MOST_EXAMPLES]))
        raise ValueError(
            f"{layout.images[several].name} has {len(groups[several])} masks in {layout.places[1]}: {masks}. If each "
            "is one object, give masks_per_image='objects'; if each is one class, masks_per_image='classes'; to use "
            "one of them alone, state it by mask_suffix, or by masks, the folder in which it lies."
        )
    return {image: mask for image, masks in groups.items() for mask in masks}


def _of_classes(groups: Groups, stated: Sequence[str] | None) -> tuple[Found, list[str]]:
    """Returns the masks of each image in the order of the classes (None without a file), and the classes."""
    extras = {extra for masks in groups.values() for extra in masks.values()}
    parts = class_parts(extras) if stated is None else stated_parts(extras, stated)
    occurring = sorted(set(parts.values()), key=natural)
    classes = occurring if stated is None else list(stated)
    unknown = [name for name in occurring if name not in classes]
    if unknown:
        raise ValueError(
            f"masks of the classes {', '.join(unknown)} were found, but the classes are the background and "
            f"{', '.join(classes)}; class_names must be the background and then the names that the files have: "
            f"{', '.join(occurring)}."
        )
    if stated is None:
        _ask_for_objects(groups, parts)
    found: Found = {}
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


def _ask_for_objects(groups: Groups, parts: dict[str, str]) -> None:
    """Raises a ValueError if the classes look like objects: they are numbers, or each occurs in one image only."""
    counts = Counter(parts[extra] for masks in groups.values() for extra in masks.values())
    if all(name.isdecimal() or not name for name in counts) or (len(groups) > 1 and max(counts.values()) == 1):
        raise ValueError(
            f"with masks_per_image='classes', the classes would be {first(counts)}, by what the names of masks have "
            "beyond those of images. If these are objects, give masks_per_image='objects'; if they are classes, name "
            "them by class_names, the background first."
        )


def _unpaired(layout: Layout) -> ValueError:
    """Returns the error if no mask belongs to an image, with the options that would help if the names tell."""
    refuse_annotations(layout.places[1])
    image_names, mask_names = list(layout.images), list(layout.masks)
    without = f", without {layout.affixes}" if layout.affixes else ""
    ending, kinds = _suffix_with_ending(layout), None if layout.affixes else kinds_of_masks(image_names, mask_names)
    guess = None if layout.affixes else guess_affixes(image_names, mask_names)
    if ending:
        advice = f"mask_suffix stands before the ending; give mask_suffix={ending!r}."
    elif kinds:
        image_suffix = f"image_suffix={kinds[0]!r} and " if kinds[0] else ""
        advice = (
            f"Each image seems to have {len(kinds[1])} masks; give {image_suffix}one mask_suffix of "
            f"{', '.join(map(repr, kinds[1]))}, or else masks_per_image to merge them."
        )
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
    """Returns the stated suffix without a file ending, if it has one and no name has the suffix."""
    stated = Path("a" + layout.affixes.mask_suffix)
    return stated.stem[1:] if not layout.masks and stated.suffix.lower() in IMAGE_SUFFIXES else ""


def _told(layout: Layout, files: Files, way: str) -> str:
    image, masks = next(iter(files.items()))
    shown = ", ".join(mask.name for mask in masks[:MOST_EXAMPLES] if mask is not None)
    without = f", without {layout.affixes}" if layout.affixes else ""
    return f"images are paired with masks {way}{without}: {layout.images[image].name} with {shown}."


def _refuse_copies(layout: Layout, files: Files) -> None:
    """Raises a ValueError if the first masks are the images, or copies of them beside polygons or in nested folders."""
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
