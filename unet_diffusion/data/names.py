"""What names of folders, files and columns tell: that they hold images, masks of other images, or a split."""

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

AnyPath = TypeVar("AnyPath", str, Path)

# fmt: off
MASK_WORDS = frozenset({
    "mask", "masks", "label", "labels", "annotation", "annotations", "annot", "gt", "groundtruth",
    "segmentation", "segmentations", "seg", "matte",
})
IMAGE_WORDS = frozenset({
    "image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "frame", "frames",
    "scan", "scans", "jpeg", "jpg", "png", "raw", "input", "inputs",
})
# fmt: on
OTHER_MASK_WORDS = frozenset({"ground", "truth", "class", "classes", "object", "objects"})  # of SegmentationClass
MASK_SUFFIX = re.compile(r"[_-](mask|masks|label|labels|gt|seg|segmentation|annotation|matte)$", re.IGNORECASE)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SPLIT_FOLDERS = {  # usual names of subfolders, and the split that each name means
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_WORDS = {**SPLIT_FOLDERS, "tr": "train", "ts": "test"}  # in names such as "train_images" and "imagesTs"
WORDS_BESIDE_SPLITS = frozenset({"set", "data", "folder"})  # beside those for images


def looks_like_masks(name: str) -> bool:
    """Returns whether the name of a column or folder, such as "seg.png", suggests that it holds masks."""
    return MASK_WORDS.intersection(_words(name)) != frozenset()


def check_no_masks_among(home: Path, files: list[Path]) -> None:
    """Raises a ValueError if images look like masks of others, by their folder's name ("masks") or their own.

    Otherwise noise prediction would learn from masks as well.
    """
    _check_mask_suffix(home, files)
    parents = {file.parent for file in files}
    siblings: dict[Path, set[str]] = {}
    for parent in parents:
        for folder in (parent, *parent.parents):
            if folder == home:
                break
            siblings.setdefault(folder.parent, set()).add(folder.name)
    clashes = [clash for folder in sorted(siblings) for clash in _clashes(folder, sorted(siblings[folder]), parents)]
    if not clashes:
        return
    images, masks = clashes[0]
    if len({place for place, _ in clashes}) > 1:
        advice = "Copy the images into a folder of their own to learn from them alone."
    elif images == masks.parent:
        advice = f"Move {masks.name} out of that folder, or rename it to learn from its images as well."
    else:
        advice = f"Give data {images}, and for segmentation also masks {masks}. If they are classes, give label_column "
        advice += "'label'."
    raise ValueError(f"data is {home}, but {masks} looks like masks of the images in {images}. {advice}")


def _clashes(folder: Path, names: list[str], with_images: Collection[Path]) -> list[tuple[Path, Path]]:
    """Returns pairs of folders that look like images and their masks, among the subfolders with these names."""
    masks = [name for name in names if looks_like_masks(name)]
    found = [(folder, folder / mask) for mask in masks if folder in with_images and not _subject(mask)]
    for image in (name for name in names if name not in masks):
        is_named = bool(_subject(image) or IMAGE_WORDS.intersection(_words(image)))
        found += [(folder / image, folder / mask) for mask in masks if is_named and _subject(mask) == _subject(image)]
    return found


def _subject(name: str) -> list[str]:
    """Returns the words of a name apart from those for images and masks: "train_masks" and "train" are about train."""
    return [word for word in _words(name) if word not in MASK_WORDS | IMAGE_WORDS | OTHER_MASK_WORDS]


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORD.findall(name)]


def _check_mask_suffix(home: Path, files: list[Path]) -> None:
    stems = {(file.parent, file.stem) for file in files}
    suffixes: Counter[str] = Counter()
    for folder, stem in stems:
        base, suffix = _split_suffix(stem)
        if suffix and (folder, base) in stems:
            suffixes[suffix] += 1
    for suffix, count in suffixes.most_common(1):
        if count > len(files) / 4:
            raise ValueError(
                f"data is {home}, where {count} of {len(files)} images look like masks of the others: their names end "
                f"in {suffix}. For segmentation give mask_suffix {suffix!r}; otherwise move them out of that folder."
            )


def _split_suffix(stem: str) -> tuple[str, str]:
    """Returns a name without its mask suffix, and the suffix, such as "_mask"; the suffix is empty if it has none."""
    match = MASK_SUFFIX.search(stem)
    return (stem, "") if match is None else (stem[: match.start()], match.group())


def masks_among(home: str | Path, files: Sequence[AnyPath]) -> list[AnyPath]:
    """Returns the files that look like masks of others: `a_mask.png` beside `a.png`, or `masks/a.png` and `a.jpg`.

    The files lie below `home`. Paths are compared as text, since there may be a hundred thousand.
    """
    depth, names_masks = len(os.fspath(home)), lru_cache(maxsize=None)(looks_like_masks)
    stems = [_folder_and_stem(os.fspath(file)) for file in files]
    here = set(stems)
    in_masks = {folder: any(map(names_masks, folder[depth:].split(os.sep))) for folder, _ in here}
    of_images = {stem for folder, stem in here if not in_masks[folder]}

    def is_mask(folder: str, stem: str) -> bool:
        base, suffix = _split_suffix(stem)
        return (suffix != "" and (folder, base) in here) or (in_masks[folder] and base in of_images)

    return [file for file, stem in zip(files, stems) if is_mask(*stem)]


def _folder_and_stem(file: str) -> tuple[str, str]:
    folder, _, name = file.rpartition(os.sep)
    dot = name.rfind(".")
    return folder, name[:dot] if 0 < dot < len(name) - 1 else name


def check_no_splits_among(home: Path, names: Sequence[str]) -> None:
    """Raises a ValueError if subfolders have names that contain splits, such as "train_images" and "test_images".

    Subfolders that are named exactly like splits are fine: one of them is opened.
    """
    splits = {name: split for name in names if (split := _split_in(name)) is not None}
    if len(set(splits.values())) > 1:
        first = min(splits, key=lambda name: splits[name] != "train")
        raise ValueError(
            f"data is {home}, whose subfolders {' and '.join(splits)} look like splits, which would be mixed. Give "
            f"data {home / first}. If they are classes, give label_column 'label'."
        )


def _split_in(name: str) -> str | None:
    """Returns the split in a name, if the name has no other words except those for images."""
    words = [word for word in _words(name) if not word.isdigit() and word not in IMAGE_WORDS | WORDS_BESIDE_SPLITS]
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None
