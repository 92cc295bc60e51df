"""Findings about the masks of a data set."""

from collections import Counter

from unet_diffusion.commands.doctor.findings import Finding, about
from unet_diffusion.commands.doctor.image_findings import unusable_severity
from unet_diffusion.commands.doctor.row_facts import RowFacts
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.encoding import MaskEncoding, find_encoding
from unet_diffusion.images.masks import Colour, describe_keys
from unet_diffusion.images.no_class import IGNORE_INDEX

RARE = 0.01  # share of the pixels; a class with less is called rare


def agreed_encoding(facts: list[RowFacts], config: MaskedDataConfig) -> MaskEncoding:
    """Finds what the masks' values would mean in training; raises a ValueError if that is unclear."""
    palette = {key: colour for fact in facts for key, colour in fact.palette}
    keys = {key for fact in facts for key, _ in fact.keys}
    return find_encoding(
        keys, config.mask_reading, num_classes=config.known_classes, colours=config.colours, palette=palette
    )


def mask_findings(
    facts: list[RowFacts], name: str, config: MaskedDataConfig, encoding: MaskEncoding | None
) -> list[Finding]:
    """Returns the findings about the masks of one split; without an encoding, their values cannot be judged."""
    severity = unusable_severity(facts, config)
    found = about(
        severity,
        f"images of {name} that have no mask: {{count}}. Add masks, or move the images to a folder of "
        "their own, which training takes as unlabelled.",
        [fact.name for fact in facts if fact.no_mask],
    )
    problems = [f"{fact.name}: {fact.mask_problem}" for fact in facts if fact.mask_problem is not None]
    found += about(severity, f"masks of {name} that cannot be used: {{count}}.", problems)
    sizes = [
        f"{fact.name}: mask {_size(fact.mask_size)}, image {_size(fact.size)}"
        for fact in facts
        if fact.mask_size != (0, 0) and fact.size not in ((0, 0), fact.mask_size)
    ]
    found += about(severity, f"masks of {name} of another size than their image: {{count}}.", sizes)
    found += about(
        "note",
        f"images of {name} that state an EXIF orientation while their masks state none: {{count}}. The masks are taken "
        "as drawn on the upright images, which their sizes cannot confirm; look at some.",
        [fact.name for fact in facts if fact.may_be_turned],
    )
    found += about(
        "warning",
        f"masks of {name} in which objects overlap: {{count}}. The object with the later name keeps the pixels.",
        [f"{fact.name}: {fact.overlap} pixels" for fact in facts if fact.overlap],
    )
    masked = [fact for fact in facts if fact.keys]
    found += _palettes(masked, name)
    return found if encoding is None or not masked else found + _classes(masked, name, encoding, config)


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


def _classes(masked: list[RowFacts], name: str, encoding: MaskEncoding, config: MaskedDataConfig) -> list[Finding]:
    classes = encoding.classes
    unknown = [(fact.name, [key for key, _ in fact.keys if key not in classes]) for fact in masked]
    outside = [f"{row}: {describe_keys(keys)}" for row, keys in unknown if keys]
    known = describe_keys([key for key, label in classes.items() if label != IGNORE_INDEX])
    found = about("error", f"masks of {name} with values outside the classes, which are {known}: {{count}}.", outside)

    pixels = [_pixels(fact, encoding) for fact in masked]
    found += _binary_as_indices(masked, pixels, name, encoding)
    total = sum(pixels, Counter())
    labelled = sum(total[label] for label in range(encoding.num_classes))
    occurring = [label for label in range(encoding.num_classes) if total[label]]
    if len(occurring) < 2:
        only = f"only class {occurring[0]}" if occurring else "no class"
        found.append(Finding("error", f"the masks of {name} hold {only}, so there is nothing to learn."))
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


def _pixels(fact: RowFacts, encoding: MaskEncoding) -> Counter[int]:
    """Counts the pixels of each class of one mask, leaving out keys without a class."""
    pixels: Counter[int] = Counter()
    for key, count in fact.keys:
        if key in encoding.classes:
            pixels[encoding.classes[key]] += count
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


def _balance(
    total: Counter[int], labelled: int, name: str, encoding: MaskEncoding, config: MaskedDataConfig
) -> list[Finding]:
    shares = {label: total[label] / labelled for label in range(encoding.num_classes)}
    names = config.class_names or [f"class {label}" for label in shares]
    text = ", ".join(f"{names[label]} {share:.1%}" for label, share in shares.items())
    found = [Finding("note", f"shares of the labelled pixels of {name}: {text}.")]
    absent = [names[label] for label, share in shares.items() if share == 0]
    found += about("warning", f"classes that do not occur in the masks of {name}: {{count}}.", absent)
    rare = [f"{names[label]}: {share:.2%}" for label, share in shares.items() if 0 < share < RARE]
    sentence = (
        f"classes with less than {RARE:.0%} of the pixels of {name}: {{count}}. Class weights or a Dice loss may help."
    )
    return found + about("warning", sentence, rare)
