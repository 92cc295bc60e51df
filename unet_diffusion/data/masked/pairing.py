"""Which mask belongs to which image: found from the names of the files alone.

A *name* is the path of a file below its folder, without the ending and without the prefix or suffix that the user
states. Nothing here reads a file.
"""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from unet_diffusion.data.folders import MOST_EXAMPLES
from unet_diffusion.files import readable

Key = tuple[str, ...]
Keyed = Callable[[Collection[str]], dict[Key, str] | None]

ENDING = re.compile(r"(\.ome(?=\.tiff?$))?\.[^./]+$", re.IGNORECASE)
TOKEN = re.compile(r"[0-9]+|[^\W\d_]+|.", re.DOTALL)  # runs of digits, runs of letters, single other characters
SEPARATORS = " _-./"  # between the name of an image and the rest of its mask's name
NEARLY_ALL = 0.9  # share of the names that must find a partner by the part that differs
SAME_NAME = "of the same name"
LIKE_MASKS = re.compile(r"mask|label|seg|gt|truth|annot|manual|target", re.IGNORECASE)


@dataclass(frozen=True)
class Affixes:
    """The parts of names beyond what an image and its mask share; the fields are named like the options."""

    image_suffix: str = ""
    mask_prefix: str = ""
    mask_suffix: str = ""

    def __bool__(self) -> bool:
        return bool(self.image_suffix or self.mask_prefix or self.mask_suffix)

    def __str__(self) -> str:
        """The options as a user gives them."""
        given = [f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if getattr(self, field.name)]
        return " and ".join(given)

    def of_image(self, name: str) -> str | None:
        """Returns the name of an image without the suffix; None if the name does not end in the suffix."""
        return _without(name, "", self.image_suffix)

    def of_mask(self, name: str) -> str | None:
        """Returns the name of a mask without the prefix and suffix; None if it lacks one."""
        return _without(name, self.mask_prefix, self.mask_suffix)


def _without(name: str, prefix: str, suffix: str) -> str | None:
    folder, separator, last = name.rpartition("/")
    rest = last[len(prefix) : len(last) - len(suffix)]
    return folder + separator + rest if rest and last == prefix + rest + suffix else None


def name_of(path: Path) -> str:
    """Returns a relative path without its ending; `.ome.tif` is one ending, and equal letters get one encoding."""
    return ENDING.sub("", unicodedata.normalize("NFC", readable(path.as_posix())))


def by_name(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Returns files by their names; raises a ValueError if two have the same."""
    found: dict[str, Path] = {}
    for name, file in named:
        if name in found:
            raise ValueError(
                f"{found[name]} and {file} have the same name except for the ending; remove or rename one."
            )
        found[name] = file
    return found


@functools.lru_cache(maxsize=1 << 17)
def _tokens(name: str) -> Key:
    return tuple(TOKEN.findall(name))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a key that sorts names with numbers by their value: 2 before 10."""
    return [(0, int(token), token) if _is_number(token) else (1, 0, token) for token in _tokens(name)]


def pair(images: Collection[str], masks: Collection[str]) -> tuple[dict[str, str], str]:
    """Finds the one mask of each image.

    There are four ways, tried in this order. The names are equal; they are equal apart from capital letters and spaces
    at the ends; the file names without their folders are equal; or the parts are equal in which the images differ from
    each other, and the masks from each other (`21_training` and `21_manual1`). A later way is taken only if it pairs
    all images that an earlier way pairs, and more.

    Returns:
        The mask of each image that has one, by name, and the way, as words for a sentence.
    """
    equal = {name: name for name in images if name in masks}
    best, best_way = equal, SAME_NAME
    if len(best) == min(len(images), len(masks)):
        return best, best_way
    ways: dict[str, Callable[[], dict[str, str]]] = {
        "of the same name apart from capital letters and spaces": lambda: _partners(_alike(images), _alike(masks)),
        "by the names of the files, without folders": lambda: _partners(_by_file(images), _by_file(masks)),
        "by the part of their names that differs": lambda: _by_difference(images, masks),
    }
    for way, find in ways.items():
        found = find()
        if len(found) > len(best) and all(found.get(image) == mask for image, mask in equal.items()):
            best, best_way = found, way
    return best, best_way


def _partners(images: dict[Key, str] | None, masks: dict[Key, str] | None) -> dict[str, str]:
    return {images[key]: masks[key] for key in images if key in masks} if images and masks else {}


def _by_file(names: Collection[str]) -> dict[Key, str] | None:
    """Returns names by file name alone; None if two are the same."""
    return _unique({name: (name.rpartition("/")[2],) for name in names})


def _alike(names: Collection[str]) -> dict[Key, str] | None:
    """Returns names by their lower-case form without spaces at the ends; None if two are then the same."""
    return _unique({name: tuple(part.strip().casefold() for part in name.split("/")) for name in names})


def _unique(keys: Mapping[str, Key]) -> dict[Key, str] | None:
    found = {key: name for name, key in keys.items()}
    return found if len(found) == len(keys) else None


def _by_difference(images: Collection[str], masks: Collection[str]) -> dict[str, str]:
    if not _starts_agree(images, masks):
        return {}
    for keyed in (_distinct, _distinct_loosely, _distinct_files, _distinct_files_loosely):
        pairs = _partners(keyed(images), keyed(masks))
        # names without a partner lie on one side: numbers from 0 do not pair with numbers from 1
        most = max(len(images), len(masks))
        if len(pairs) == min(len(images), len(masks)) and len(pairs) >= NEARLY_ALL * most:
            return pairs
    return {}


def _starts_agree(images: Collection[str], masks: Collection[str]) -> bool:
    """Returns whether the dropped starts have no other numbers (p1_001 is not p2_001); lone names must share a word."""
    starts = [common_ends(names)[0] for names in (images, masks)]
    numbers = [[int(token) for token in start if _is_number(token)] for start in starts]
    if len(images) == len(masks) == 1:
        words = [{token.casefold() for token in start if token.isalpha()} for start in starts]
        return bool(set(numbers[0]) & set(numbers[1]) if all(numbers) else words[0] & words[1])
    return not all(numbers) or numbers[0] == numbers[1]


def _distinct(names: Collection[str]) -> dict[Key, str] | None:
    return _unique(distinct_parts(names))


def _distinct_loosely(names: Collection[str]) -> dict[Key, str] | None:
    """Treats 001 as 1, and ignores case."""
    parts = distinct_parts(names)
    loose = {name: tuple(str(int(t)) if _is_number(t) else t.casefold() for t in part) for name, part in parts.items()}
    return _unique(loose)


def _distinct_files(names: Collection[str]) -> dict[Key, str] | None:
    return _of_files(names, _distinct)


def _distinct_files_loosely(names: Collection[str]) -> dict[Key, str] | None:
    return _of_files(names, _distinct_loosely)


def _of_files(names: Collection[str], keyed: Keyed) -> dict[Key, str] | None:
    files = _by_file(names)
    found = None if files is None else keyed([file for (file,) in files])
    return None if files is None or found is None else {key: files[file,] for key, file in found.items()}


def distinct_parts(names: Collection[str]) -> dict[str, Key]:
    """Returns each name's tokens without those that all names begin or end with; numbers are never cut."""
    start, end = common_ends(names)
    tokens = {name: _tokens(name) for name in names}
    return {name: found[len(start) : len(found) - len(end)] for name, found in tokens.items()}


def common_ends(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the tokens that all names begin with, and the tokens that all names end with."""
    tokens = [_tokens(name) for name in names]
    start = _common(tokens)
    end = _common([found[: len(start) - 1 if start else None : -1] for found in tokens])
    return start, end[::-1]


def _common(sequences: list[Key]) -> list[str]:
    same = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences))
    return [tokens[0] for tokens in same]


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()


def shifted(images: Collection[str], masks: Collection[str]) -> bool:
    """Returns whether equal names are probably neighbours: images count from 0 and masks from 1, or the reverse."""
    numbers = []
    for names, others in ((images, masks), (masks, images)):
        ordered = sorted(names, key=natural)
        alone = [place for place, name in enumerate(ordered) if name not in others]
        if len(alone) != 1 or len(ordered) < 3 or not any(map(_is_number, _tokens(ordered[alone[0]]))):
            return False
        numbers.append((alone[0] == 0, alone[0] == len(ordered) - 1))
    return numbers in ([(True, False), (False, True)], [(False, True), (True, False)])


def group(images: Collection[str], masks: Collection[str]) -> dict[str, dict[str, str]]:
    """Finds all masks of each image.

    A mask belongs to an image in one of three cases. Its name begins with the image's name (`id000` and `id000-2`, but
    not `id0`); it lies in the image's folder (`id000/2` for `id000`; or for `id000/photo`, if that is the only image of
    the folder); or it has the image's name in another folder (`cell/id000`).

    Returns:
        For each image with masks, the part of each mask's name beyond the image's name, in natural order.
    """
    whole = {_tokens(name): name for name in images}
    files = {_tokens(file): name for (file,), name in (_by_file(images) or {}).items()}
    counts = Counter(name.rpartition("/")[0] for name in images)
    alone = {name.rpartition("/")[0]: name for name in images if counts[name.rpartition("/")[0]] == 1}
    alone.pop("", None)
    found: dict[str, dict[str, str]] = {}
    for mask in sorted(masks, key=natural):
        folder, _, file = mask.rpartition("/")
        image, length = _longest(whole, _tokens(mask))
        extra = mask[length:]
        if image is None:
            image, extra = alone.get(folder), file
        if image is None:
            image, length = _longest(files, _tokens(file))
            extra = f"{folder}/{file[length:]}"
        if image is not None:
            found.setdefault(image, {})[mask] = extra.strip(SEPARATORS)
    return found


def _longest(images: Mapping[Key, str], tokens: Key) -> tuple[str | None, int]:
    """Returns the image whose tokens are the longest start of `tokens`, and its length in characters."""
    for count in range(len(tokens), 0, -1):
        key = tokens[:count]
        if key in images:
            return images[key], len("".join(key))
    return None, 0


def class_parts(extras: Iterable[str]) -> dict[str, str]:
    """Returns the class name for each text, the part of a mask's name beyond that of its image.

    Common beginnings and ends are left out: `class_cell` and `class_dirt` are the classes `cell` and `dirt`.
    """
    distinct = sorted(set(extras))
    parts = {extra: "".join(part).strip(SEPARATORS) for extra, part in distinct_parts(distinct).items()}
    kept = len(distinct) > 1 and all(parts.values()) and len(set(parts.values())) == len(parts)
    return {extra: parts[extra] if kept else extra for extra in distinct}


def stated_parts(extras: Iterable[str], classes: Collection[str]) -> dict[str, str]:
    """Returns the class for each text, the part of a mask's name beyond that of its image: the longest in the text.

    Texts that contain no class are named as `class_parts` does.
    """
    others = class_parts(extras)

    def named(extra: str) -> str:
        within = [name for name in classes if re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", extra)]
        return max(within, key=len, default=others[extra])

    return {extra: named(extra) for extra in others}


def guess_affixes(images: Collection[str], masks: Collection[str]) -> Affixes | None:
    """Returns affixes with which all files would find a partner of the same name; None if there are none."""
    image_files, mask_files = ({name.rpartition("/")[2] for name in names} for names in (images, masks))
    ends = ["".join(common_ends(files)[1]) for files in (image_files, mask_files)]
    starts = ["".join(common_ends(files)[0]) for files in (image_files, mask_files)]
    prefixes = {"", starts[1], starts[1].removesuffix(starts[0])}
    guesses = [Affixes(*each) for each in itertools.product({"", ends[0]}, prefixes, {"", ends[1]})]
    for guess in sorted(guesses, key=lambda guess: (len(str(guess)), str(guess))):
        with_mask = {guess.of_image(name) for name in image_files} & {guess.of_mask(name) for name in mask_files}
        if guess and len(with_mask - {None}) == min(len(images), len(masks)):
            return guess
    return None


def kinds_of_masks(images: Collection[str], masks: Collection[str]) -> tuple[str, list[str]] | None:
    """Returns the suffix of images and those of masks, if each image has masks of several kinds; None if not.

    For example, `a_photo` with `a_classes`, `a_colours` and `a_objects`.
    """
    end = "".join(common_ends({name.rpartition("/")[2] for name in images})[1])
    groups = group({name.removesuffix(end) for name in images}, masks)
    rests = {
        mask: mask.rpartition("/")[2].removeprefix(base.rpartition("/")[2]) for base in groups for mask in groups[base]
    }
    counts = Counter(rests.values())
    kinds = sorted(kind for kind, count in counts.items() if count >= NEARLY_ALL * len(images))
    if len(kinds) < 2 or sum(counts[kind] for kind in kinds) < NEARLY_ALL * len(masks):
        return None
    shared = "".join(_common([_tokens(rest) for rest in (end, *kinds)]))  # numbers that all files have
    shared = shared.rstrip(SEPARATORS)
    return end.removeprefix(shared), [kind.removeprefix(shared) for kind in kinds]


def guess_in_one_folder(names: Collection[str]) -> Affixes | None:
    """Returns affixes that tell masks from images in one folder, as for `a` and `a_mask`, or `a_img` and `a_mask`.

    None if the names suggest none.
    """
    bases: dict[str, set[str]] = {}  # of each end: the names without it
    for name in names:
        tokens = _tokens(name)
        for count in range(1, len(tokens) + 1):
            base, end = "".join(tokens[:count]), "".join(tokens[count:])
            if end == "" or not end.isdigit():
                bases.setdefault(end, set()).add(base)
    plain = bases.pop("", set())
    beside = {end: len(found & plain) for end, found in bases.items()}
    best = max(beside, key=lambda end: (beside[end], bool(LIKE_MASKS.search(end)), -len(end)), default="")
    if beside.get(best, 0) * 2 >= NEARLY_ALL * len(names):
        return Affixes(mask_suffix=best)
    halves = [end for end, found in bases.items() if 2 * len(found) >= NEARLY_ALL * len(names) and len(found) > 1]
    couples = [(a, b) for a, b in itertools.permutations(halves, 2) if len(bases[a] & bases[b]) * 2 >= len(names) - 1]
    likely = [(a, b) for a, b in couples if LIKE_MASKS.search(b) and not LIKE_MASKS.search(a)]
    if not likely:
        return None
    image_end, mask_end = max(likely, key=lambda couple: len("".join(couple)))
    return Affixes(image_suffix=image_end, mask_suffix=mask_end)


def first(names: Collection[str]) -> str:
    """Returns the first names as text."""
    return ", ".join(sorted(names, key=natural)[:MOST_EXAMPLES]) or "none"
