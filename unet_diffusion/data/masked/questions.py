"""Questions about the values of masks: ambiguous values are refused, and the error names the option that settles it."""

from collections.abc import Sequence

import numpy as np

from unet_diffusion.checks import Question
from unet_diffusion.data.masked.seen import SeenMasks, highest_of_run
from unet_diffusion.images.masks import COLOURED, WHITE, Colour, colour_key, describe_keys, key_colour
from unet_diffusion.images.no_class import IGNORE_INDEX

FEWEST_OBJECTS = 4  # from this n on, the values 1..n of a mask may number its objects; fewer are more often classes
MANY_CLASSES = 64  # more are probably instance numbers or soft edges, unless the user states otherwise
MOST_LISTED = 20  # colours in a table of a message
NEARLY_ALL = 0.9  # of the masks
RARE = 0.01  # share of the pixels, below which a value may be a shade of a soft edge
FEWEST_SHADES = 3  # of a soft edge
ROUNDING = 8  # largest difference of a channel between a shade and the line between the two colours it blends
VOC_OUTLINE: Colour = (224, 224, 192)  # around the objects of Pascal VOC


def ask_about_values(seen: SeenMasks, num_classes: int | None) -> None:
    """Raises a Question that asks what the grey values of masks mean, unless they are plainly class indices."""
    _ask_about_one_and_255(seen)
    ask_about_lossy(seen, "indices")
    _ask_about_objects(seen)
    found = seen.keys
    present = [key for key in found if key != IGNORE_INDEX]
    if len(found) == 2 and len(present) == 1:
        raise Question(
            f"all masks together hold only {describe_keys(found)}. mask_encoding='binary' makes {found[0]} class 0 and "
            "255 class 1; with 'indices', 255 is ignored, which leaves one class."
        )
    highest = max(present, default=0)
    absent = highest + 1 - len(present)
    few = len(present) > 1 and (absent >= len(present) or (len(found) == 2 and highest > 1))
    stated = num_classes is not None and (highest < num_classes or num_classes != len(found))
    renumbered = num_classes == len(present) and highest >= len(present)  # as 1, 2 and 3 of three classes
    if renumbered or (not stated and (few or highest >= MANY_CLASSES)):
        raise Question(_what_values_mean(seen))


def ask_about_binary(num_classes: int | None) -> None:
    """Raises a Question if masks of 0 and 255 are to have more than two classes."""
    if num_classes is not None and num_classes > 2:
        raise Question(
            f"masks hold 0 and 255 alone, but {num_classes} classes are stated. mask_encoding='binary' makes 255 "
            "class 1; with 'indices', 255 is ignored."
        )


def ask_about_white_first(seen: SeenMasks) -> None:
    """Raises a Question if the masks are black-and-white palette images whose index 0 is white."""
    if seen.palette == {0: WHITE, 1: (0, 0, 0)}:
        raise Question(
            "masks are palette images in which index 0 is white and index 1 black. mask_encoding='binary' makes white "
            "class 1, as in other black-and-white masks; 'indices' makes black class 1."
        )


def ask_about_test_values(seen: SeenMasks, num_classes: int) -> None:
    """Raises a Question if grey values of masks for a trained network may mean several things."""
    if num_classes == 2:
        _ask_about_one_and_255(seen)
    ask_about_lossy(seen, "indices")


def ask_about_lossy(seen: SeenMasks, encoding: str) -> None:
    """Raises a Question if file compression changed the values of masks that `encoding` would take as they are."""
    if not seen.formats:
        return
    formats, count = " and ".join(seen.formats), sum(map(bool, seen.lossy))
    threshold = default_threshold(max(seen.keys)) if encoding == "indices" else 128
    split = "" if threshold is None else f" (values of {threshold} and more are class 1)"
    raise Question(
        f"{count} of {len(seen.counts)} masks are {formats} files, whose compression changes values: the masks hold "
        f"{describe_keys(seen.keys)}. If there are two classes, mask_encoding='binary' splits at half{split}; else "
        f"export the masks again as PNG from what they were drawn with. mask_encoding={encoding!r} takes the values as "
        "they are."
    )


def ask_about_colours(seen: SeenMasks) -> None:
    """Raises a Question if lossy files changed colours, or if most colours are blends of others, as at soft edges."""
    ask_about_lossy(seen, "palette")
    found, main = seen.keys, shades_between(seen)
    if len(found) <= MANY_CLASSES and main is None:
        return
    if main is None:
        seems = "more than masks usually have; soft edges and JPEG blend colours, and colours may also number objects"
    else:
        seems = f"most of them blends of {describe_keys(main)}, as soft edges or JPEG leave them"
    binary = ""
    if main is None or len(main) == 2:
        binary = (
            "If there are two classes, mask_encoding='binary' splits at half (brightness 128 of 255), and with "
            "mask_threshold=1 every colour but black is class 1. "
        )
    raise Question(
        f"masks hold {len(found)} different colours, {seems}. {binary}If each colour is a class, give "
        "mask_encoding='palette' or mask_colours; else export the masks without soft edges."
    )


def ask_about_order(found: Sequence[int], num_classes: int | None, class_names: Sequence[str] | None) -> None:
    """Raises a Question if classes are named or counted, but nothing tells which colour is which class."""
    count = num_classes if class_names is None else len(class_names)
    black_first = len(found) == 2 and 0 in found
    if count is None or (count == len(found) and (class_names is None or black_first)):
        return
    given = f"num_classes is {count}" if class_names is None else f"class_names are {', '.join(class_names)}"
    if count < len(found) and class_names is None:
        return  # refused with the number of colours
    ordered = sorted(found, key=by_colour)
    table = " ".join(f'"{_hex(key)}" {label}' for label, key in enumerate(ordered[:MOST_LISTED]))
    more = " ..." if len(ordered) > MOST_LISTED else ""
    raise Question(
        f"masks hold {len(found)} colours, and {given}, but nothing says which colour is which class. Give "
        f"mask_colours, with the right class of each: --mask-colours {table}{more}"
    )


def ask_about_mixed_masks(seen: SeenMasks, threshold: int) -> None:
    """Raises a Question if some masks lie below the threshold as a whole, though they are not empty."""
    largest = list(seen.largest_of_exact())
    below = sorted({value for value in largest if 0 < value < threshold})
    if below and any(value >= threshold for value in largest):
        count = sum(0 < value < threshold for value in largest)
        raise Question(
            f"mask_encoding is 'binary', which splits at {threshold}, but {count} of {len(seen.counts)} masks hold no "
            f"value above {describe_keys(below[-1:])}, while others do. If every value above 0 is class 1, give "
            f"mask_threshold=1; if those masks are empty, give mask_threshold={threshold}."
        )


def ask_about_shared_numbers(numbered: Sequence[tuple[int, int]], name: str) -> None:
    """Raises a Question if no instance map has a second object, and in most of them the first is in several pieces.

    Args:
        numbered: of each map, the number of objects, and of those in several separate pieces.
        name: of the set.
    """
    with_objects = [(count, split) for count, split in numbered if count]
    split = sum(split for _, split in with_objects)
    if with_objects and max(count for count, _ in with_objects) == 1 and split > len(with_objects) / 2:
        raise Question(
            f"the run learnt from instance maps, but each mask of {name} has a single value above 0, in {split} of "
            f"{len(with_objects)} masks in several separate pieces. If the value is that of all objects, give "
            "mask_encoding='binary'; if each mask shows one object, give mask_encoding='instances'."
        )


def by_colour(key: int) -> tuple[int, int, int]:
    """Returns the sort key of a mask's key: red, green and blue; values of more than 8 bits stay in their order."""
    return key_colour(key) if key >= COLOURED or key <= IGNORE_INDEX else (key, 0, 0)


def outline_key(found: Sequence[int]) -> int | None:
    """Returns the key of Pascal VOC's outline, if the other colours are of Pascal VOC too."""
    outline = colour_key(VOC_OUTLINE)
    others = [key for key in found if key != outline]
    if outline not in found or not any(key >= COLOURED for key in others):
        return None
    return outline if _of_voc(others) else None


def default_threshold(largest: int) -> int | None:
    """Returns half of the range of values: 128 for 8 bits, 32768 for 16; None where the range is unclear."""
    if largest < 128:
        return max(1, (largest + 1) // 2)
    if largest <= 255:
        return 128
    return 32768 if largest >= 32768 else None


def shades_between(seen: SeenMasks) -> list[int] | None:
    """Returns the main colours or values if all others are rare and lie between two of them; else None."""
    totals = seen.totals
    least = RARE * sum(totals.values())
    main = sorted({key for key, count in totals.items() if count >= least} | {key for key, _ in totals.most_common(2)})
    others = [key for key in totals if key not in main]
    if len(others) < FEWEST_SHADES or (seen.coloured and _of_voc(list(totals))):
        return None
    ends = np.array([_channels(key) for key in main], dtype=float)
    return main if all(_is_blend(np.array(_channels(key), dtype=float), ends) for key in others) else None


def _ask_about_one_and_255(seen: SeenMasks) -> None:
    """Asks about masks of 0 and 1 mixed with masks of 0 and 255."""
    if seen.keys != [0, 1, IGNORE_INDEX]:
        return
    ones = sum(1 in counts for counts in seen.counts)
    full = sum(set(counts) == {0, IGNORE_INDEX} for counts in seen.counts)
    if full and not any(1 in counts and IGNORE_INDEX in counts for counts in seen.counts):
        raise Question(
            f"there are {ones} masks of 0 and 1, and {full} of 0 and 255. If 1 and 255 are the same class, give "
            "mask_encoding='binary' and mask_threshold=1; if 255 is to be ignored, give mask_encoding='indices'."
        )


def _ask_about_objects(seen: SeenMasks) -> None:
    """Asks about masks whose values look like numbers of objects, as Cellpose and others write them."""
    counts = counts_of_objects(seen)
    if len(counts) > 1:
        raise Question(
            f"the values of masks look like numbers of objects: each mask holds 1 to some n, up to {max(counts)}, each "
            "value in one piece. Give mask_encoding='instances' if each number is one object, or 'indices' if it is a "
            "class."
        )


def counts_of_objects(seen: SeenMasks) -> set[int]:
    """Returns every n for which some mask holds exactly 1..n, if nearly all masks look like numbers of objects."""
    highest = [highest_of_run(counts) for counts in seen.counts]
    many = [looks for run, looks in zip(highest, seen.objects) if run is not None and run >= FEWEST_OBJECTS]
    filled = [run for run in highest if run != 0]
    runs = [run for run in filled if run is not None]
    if many and sum(many) >= NEARLY_ALL * len(many) and len(runs) >= NEARLY_ALL * len(filled):
        return set(runs)
    return set()


def _what_values_mean(seen: SeenMasks) -> str:
    """Returns the text of the question about the meaning of grey values."""
    found = seen.keys
    classes = max(key for key in found if key != IGNORE_INDEX) + 1
    threshold, full = default_threshold(found[-1]), 65535 if found[-1] > 255 else max(found[-1], 1)
    options, last = [], ""
    if len(found) > MANY_CLASSES or shades_between(seen) is not None:
        last = " If more classes have soft edges, export the masks again, and resize them by nearest neighbour."
        half = "" if threshold is None else f" ({threshold} of {255 if threshold == 128 else full})"
        options.append(
            f"'binary' splits at half{half}, if there are two classes, with values in between as soft edges or JPEG "
            "leave them"
        )
    elif len(found) == 2:
        options.append(f"'binary' makes {found[0]} class 0 and {found[1]} class 1")
    elif seen.two_valued:
        options.append("'binary' with mask_threshold=1 makes every value above 0 class 1")
    options += [
        f"'palette' makes each value a class ({len(found)} classes)",
        f"'indices' keeps {classes} classes",
        "'instances' if each value is one object",
    ]
    return (
        f"masks hold {describe_keys(found)}, which would be {classes} classes. State their meaning by mask_encoding: "
        f"{', '.join(options)}.{last or each_of_values(found)}"
    )


def each_of_values(found: Sequence[int]) -> str:
    """Returns a sentence that shows how to state the class of each value; empty if there are too many values."""
    if len(found) > MOST_LISTED or found[-1] > IGNORE_INDEX:
        return ""
    table = " ".join(f'"{_hex(key)}" {key if key == IGNORE_INDEX else label}' for label, key in enumerate(found))
    return f" To choose the class of each value yourself (255: ignored), change the numbers of: --mask-colours {table}"


def _channels(key: int) -> tuple[int, int, int]:
    return key_colour(key) if key >= COLOURED else (key, key, key)


def _is_blend(shade: np.ndarray, ends: np.ndarray) -> bool:
    """Returns whether a colour (3,) lies near a line between two of the others (N, 3)."""
    for place, first in enumerate(ends):
        lines = ends[place + 1 :] - first
        lengths = (lines**2).sum(axis=1).clip(min=1)
        shares = ((shade - first) @ lines.T / lengths).clip(0, 1)
        if (np.abs(first + shares[:, None] * lines - shade).max(axis=1) <= ROUNDING).any():
            return True
    return False


def _of_voc(found: Sequence[int]) -> bool:
    """Returns whether all keys are colours of Pascal VOC's palette, apart from the outline."""
    return {key for key in found if key >= COLOURED} <= VOC_KEYS


def _voc_colour(label: int) -> Colour:
    """Returns the colour of a class in the palette of Pascal VOC: three bits of the label for each bit of a channel."""
    bits = [sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)]
    return bits[0], bits[1], bits[2]


VOC_KEYS = {colour_key(_voc_colour(label)) for label in range(256)} | {colour_key(VOC_OUTLINE)}


def _hex(key: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*key_colour(min(key, IGNORE_INDEX) if key < COLOURED else key))
