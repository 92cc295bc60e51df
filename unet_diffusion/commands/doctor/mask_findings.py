"""Findings about the masks of a data set."""

from collections import Counter
from collections.abc import Sequence

from unet_diffusion.commands.doctor.findings import Finding, about, asked
from unet_diffusion.commands.doctor.image_findings import unusable_severity
from unet_diffusion.commands.doctor.row_facts import SKETCHED, RowFacts
from unet_diffusion.commands.doctor.understanding import spans
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.meaning import settled_encoding
from unet_diffusion.data.masked.questions import each_of_values
from unet_diffusion.data.masked.reading import SPLIT_OBJECTS
from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.images.masks import Colour, describe_keys
from unet_diffusion.images.no_class import IGNORE_INDEX

UNNUMBERED = 0.05  # share of the pixels of a class; fewer without a number may be gaps between objects
RARE = 0.01  # share of the pixels; a class with less is called rare
SLOPED = 0.05  # share of the changes from pixel to pixel; from here on, a value often lies between two others
LARGE = SKETCHED**2 // 8  # pixels of a sketch; smaller objects show too little
ALIKE = 0.9  # intersection over union from which sketches of masks count as nearly the same
FEWEST_ALIKE = 3  # masks


def agreed_encoding(facts: list[RowFacts], config: MaskedDataConfig) -> MaskEncoding:
    """Finds what the masks' values would mean in training; raises a ValueError if that is unclear."""
    return settled_encoding(config, seen_in(facts))


def seen_in(facts: list[RowFacts]) -> SeenMasks:
    """Returns the values of the masks of rows."""
    masked = [fact for fact in facts if fact.keys]
    palette = {key: colour for fact in masked for key, colour in fact.palette}
    return SeenMasks(
        [dict(fact.keys) for fact in masked],
        palette,
        [fact.lossy for fact in masked],
        [fact.objects for fact in masked],
    )


def mask_findings(
    facts: list[RowFacts],
    name: str,
    config: MaskedDataConfig,
    encoding: MaskEncoding | None,
    learned: bool = True,
) -> list[Finding]:
    """Returns the findings about the masks of one split; without an encoding, the values are not judged.

    Masks that are only measured, not learned, may hold a single class.
    """
    severity = unusable_severity(facts, config)
    found = about(
        severity,
        f"images of {name} that have no mask: {{count}}. Add masks (of zeros for images that show nothing), or move "
        "the images to a folder of their own, which training takes as unlabelled.",
        [fact.name for fact in facts if fact.no_mask],
    )
    broken = [fact for fact in facts if fact.mask_problem is not None]
    problems = [fact.told(fact.mask_problem) for fact in broken if fact.mask_question is None]
    found += about(severity, f"masks of {name} that cannot be used: {{count}}.", problems)
    found += asked("mask", name, [(fact.mask_question, fact.told(fact.mask_problem)) for fact in broken])
    sizes = [
        f"{fact.name}: mask {_size(fact.mask_size)}, image {_size(fact.size)}"
        for fact in facts
        if fact.mask_size != (0, 0) and fact.size not in ((0, 0), fact.mask_size)
    ]
    found += about(
        severity,
        f"masks of {name} of another size than their image: {{count}}. Export them again at the size of the images; to "
        "resize masks, take nearest neighbour, which mixes no classes.",
        sizes,
    )
    found += about(
        "note",
        f"images of {name} that state an EXIF orientation while their masks state none: {{count}}. The masks are taken "
        "as drawn on the upright images, which their sizes cannot confirm; look at some.",
        [fact.name for fact in facts if fact.may_be_turned],
    )
    found += about(
        "warning",
        f"masks of {name} with further frames or pages, of which only the first is read: {{count}}.",
        [f"{fact.name}: {fact.unread_mask_pages} more" for fact in facts if fact.unread_mask_pages],
    )
    found += about(
        "warning",
        f"masks of {name} in which objects overlap: {{count}}. The object with the later name keeps the pixels.",
        [f"{fact.name}: {fact.overlap} pixels" for fact in facts if fact.overlap],
    )
    masked = [fact for fact in facts if fact.keys]
    found += _split_objects(masked, name)
    found += _palettes(masked, name) + _shown_inverted(masked, name) + _likeness(masked, name, encoding)
    if encoding is None or not masked:
        return found
    if encoding.kind != "binary":
        found += about(
            "warning",
            f"masks of {name} in formats that change values, so that classes may be wrong: {{count}}. Export them "
            "again as PNG from what they were drawn with.",
            [f"{fact.name}: {fact.lossy}" for fact in masked if fact.lossy],
        )
    found += _unnumbered(masked, name, encoding)
    return found + _slopes(masked, name) + _classes(masked, name, encoding, config, learned)


def _split_objects(masked: list[RowFacts], name: str) -> list[Finding]:
    """Finds instance maps in which separate objects share a number, as in masks of classes."""
    numbered, split = sum(fact.numbered for fact in masked), sum(fact.split for fact in masked)
    if split <= SPLIT_OBJECTS * numbered:
        return []
    sentence = (
        f"instance maps of {name} with objects in several separate pieces: {{count}}. Each number is taken for one "
        "object. If all objects of a map share a number, it is a mask of classes; then leave out "
        "mask_encoding='instances' or instances_column."
    )
    examples = [f"{fact.name}: {fact.split} of {fact.numbered}" for fact in masked if fact.split]
    return about("warning", sentence, examples)


def _unnumbered(masked: list[RowFacts], name: str, encoding: MaskEncoding) -> list[Finding]:
    """Finds masks of classes that contradict their instance maps; a class without any number has no objects."""
    mapped = [fact for fact in masked if fact.numbered]
    pixels = sum((_pixels(fact.keys, encoding) for fact in mapped), Counter())
    numbered = sum((_pixels(fact.numbered_keys, encoding) for fact in mapped), Counter())
    found = []
    if numbered[0]:
        found.append(
            Finding(
                "warning",
                f"the instance maps of {name} have numbers at {numbered[0]} pixels that the masks call background "
                "(class 0). They belong to no object; look at masks and instance maps of the same image.",
            )
        )
    for label in range(1, encoding.num_classes):
        share = 1 - numbered[label] / pixels[label] if numbered[label] else 0.0
        if share > UNNUMBERED:
            found.append(
                Finding(
                    "warning",
                    f"{share:.0%} of the pixels of class {label} in {name} have no number in the instance maps, "
                    "although others of this class have. They belong to no object; number all objects.",
                )
            )
    return found


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _palettes(masked: list[RowFacts], name: str) -> list[Finding]:
    first: dict[int, Colour] = {}
    different = []
    for fact in masked:
        for key, colour in fact.palette:
            if first.setdefault(key, colour) != colour:
                different.append(f"{fact.name}: index {key} is {tuple(colour)}, but was {tuple(first[key])} before")
                break
    sentence = (
        f"masks of {name} with another palette than those before: {{count}}. An index may mean another class there; "
        "give mask_encoding='palette' to read colours."
    )
    return about("error", sentence, different)


def _shown_inverted(masked: list[RowFacts], name: str) -> list[Finding]:
    """Finds TIFF files that show 0 as white; this matters most if other files show it as black."""
    inverted = [fact.name for fact in masked if fact.white_is_zero]
    start = (
        f"masks of {name} whose files show 0 as white: {{count}} of {len(masked)}. Their stored values count, so that"
    )
    if len(inverted) == len(masked):
        return about("note", f"{start} what looks black has the highest value.", inverted)
    sentence = f"{start} what looks alike may be another class in the others; store all in one way."
    return about("warning", sentence, inverted)


def _slopes(masked: list[RowFacts], name: str) -> list[Finding]:
    """Finds class masks that were resized with interpolation, which puts other classes between two classes."""
    changes = sum(fact.changes for fact in masked)
    ramps: Counter[int] = Counter()
    for fact in masked:
        ramps.update(dict(fact.ramps))
    between = sorted(value for value, count in ramps.items() if count >= SLOPED * changes)
    if len(between) < 2:
        return []
    sentence = (
        f"the values {spans(between)} of the masks of {name} often lie as thin lines between lower and higher ones, as "
        "after resizing with interpolation, which puts classes where none are; resize masks by nearest neighbour."
    )
    return [Finding("warning", sentence)]


def _classes(
    masked: list[RowFacts], name: str, encoding: MaskEncoding, config: MaskedDataConfig, learned: bool
) -> list[Finding]:
    classes = encoding.classes
    unknown = [(fact.name, encoding.unknown([key for key, _ in fact.keys])) for fact in masked]
    outside = [f"{row}: {describe_keys(keys)}" for row, keys in unknown if keys]
    known = describe_keys([key for key, label in classes.items() if label != IGNORE_INDEX])
    found = about("error", f"masks of {name} with values outside the classes, which are {known}: {{count}}.", outside)

    pixels = [_pixels(fact.keys, encoding) for fact in masked]
    found += _binary_as_indices(masked, pixels, name, encoding)
    total = sum(pixels, Counter())
    labelled = sum(total[label] for label in range(encoding.num_classes))
    occurring = [label for label in range(encoding.num_classes) if total[label]]
    if len(occurring) < (2 if learned else 1):
        purpose = "learn" if learned else "measure"
        only = f"only class {occurring[0]}" if occurring else "no class"
        found.append(Finding("error", f"the masks of {name} hold {only}, so there is nothing to {purpose}."))
    elif labelled:
        found += _balance(total, labelled, name, encoding, config)
    per_mask = [{label for label in counts if label != IGNORE_INDEX} for counts in pixels]
    names = [fact.name for fact in masked]
    empty = [each for each, present in zip(names, per_mask) if present == {0}]
    found += about("note", f"masks of {name} that are empty, class 0 everywhere: {{count}} of {len(masked)}.", empty)
    full = [f"{each}: class {min(one)}" for each, one in zip(names, per_mask) if len(one) == 1 and one != {0}]
    found += about("warning", f"masks of {name} that are all one class: {{count}}.", full)
    ignored = [each for each, present in zip(names, per_mask) if not present]
    return found + about("warning", f"masks of {name} that are ignored (255) everywhere: {{count}}.", ignored)


def _pixels(keys: list[tuple[int, int]], encoding: MaskEncoding) -> Counter[int]:
    """Counts the pixels of each class, from those of each key of one mask, leaving out keys without a class."""
    pixels: Counter[int] = Counter()
    for key, count in keys:
        label = encoding.label(key)
        if label is not None:
            pixels[label] += count
    return pixels


def _binary_as_indices(
    masked: list[RowFacts], pixels: list[Counter[int]], name: str, encoding: MaskEncoding
) -> list[Finding]:
    """Finds the classic mistake: 0 and 255 in the files, with 255 taken for pixels to ignore."""
    if encoding.classes.get(IGNORE_INDEX) != IGNORE_INDEX:
        return []
    suspects = [fact.name for fact in masked if [key for key, _ in fact.keys] == [0, IGNORE_INDEX]]
    everywhere = not any(counts[label] for counts in pixels for label in range(1, encoding.num_classes))
    if everywhere:
        sentence = (
            f"the masks of {name} hold 0 and 255, and 255 is taken for pixels to ignore, so that no class is left to "
            "learn; give mask_encoding='binary'."
        )
        return about("error", sentence, suspects)
    sentence = (
        f"masks of {name} that hold only 0 and 255, while others hold class indices: {{count}}. Their 255 is ignored; "
        "if it means a class there, write it as its index."
    )
    return about("warning", sentence, suspects)


def _likeness(masked: list[RowFacts], name: str, encoding: MaskEncoding | None) -> list[Finding]:
    """Finds sets whose masks are the images themselves, or are all alike, such as a camera's field of view.

    Masks of more than two classes are not compared, since their lowest value may be rare.
    """
    if masked and all(fact.mask_is_image for fact in masked):
        sentence = (
            f"all masks of {name} are equal to their images; name the masks by masks, mask_suffix or mask_column."
        )
        return [Finding("warning", sentence)]
    first, *others = [int(fact.mask_sketch, 16) for fact in masked] or [0]
    is_large = first.bit_count() >= LARGE
    alike = all((first & other).bit_count() >= ALIKE * (first | other).bit_count() for other in others)
    two = _are_two_classes(masked, encoding)
    if len(others) + 1 < FEWEST_ALIKE or not (two and is_large and alike):
        return []
    return [
        Finding(
            "warning",
            f"the masks of {name} are nearly the same for all images. Such masks often mark the field of view of a "
            "camera, which is nothing to learn; check that they are the masks that you mean.",
        )
    ]


def _are_two_classes(masked: list[RowFacts], encoding: MaskEncoding | None) -> bool:
    return all(len(fact.keys) == 2 for fact in masked) if encoding is None else encoding.num_classes == 2


def _absent(absent: list[int], name: str, class_names: Sequence[str] | None) -> list[Finding]:
    if not absent:
        return []
    one = len(absent) == 1
    called = f" ({', '.join(class_names[label] for label in absent)})" if class_names else ""
    classes = f"class{'' if one else 'es'} {spans(absent)}{called} do{'es' if one else ''}"
    return [Finding("warning", f"{classes} not occur in the masks of {name}.")]


def _without_background(values: list[int], name: str) -> str:
    """Returns a sentence about class indices from 1 up, such as trimaps of object, background and border."""
    return (
        f"class 0 does not occur in the masks of {name}, whose values begin at 1, so that the network has a class "
        f"without use. Give num_classes if that is right.{each_of_values(values)}"
    )


def _balance(
    total: Counter[int], labelled: int, name: str, encoding: MaskEncoding, config: MaskedDataConfig
) -> list[Finding]:
    shares = {label: total[label] / labelled for label in range(encoding.num_classes)}
    names = config.class_names or encoding.class_names or [f"class {label}" for label in shares]
    absent = [label for label, share in shares.items() if share == 0]
    present = sorted(key for key in encoding.classes if total[key])
    if absent == [0] and encoding.kind == "indices" and config.known_classes is None:
        found = [Finding("warning", _without_background(present, name))]
    else:
        found = _absent(absent, name, config.class_names or encoding.class_names)
    rare = [f"{names[label]}: {share:.2%}" for label, share in shares.items() if 0 < share < RARE]
    sentence = (
        f"classes with less than {RARE:.0%} of the pixels of {name}: {{count}}. If the network misses them, set "
        "loss='both', which adds a Dice loss; balance_classes would draw them several times too large."
    )
    return found + about("warning", sentence, rare)
