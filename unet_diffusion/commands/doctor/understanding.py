"""The summary of a data set in words and figures, from the facts of its rows."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from unet_diffusion.commands.doctor.row_facts import RowFacts
from unet_diffusion.commands.doctor.summary import Section, Table
from unet_diffusion.data.folders import counted
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.images.masks import COLOURED, describe_keys, key_colour
from unet_diffusion.images.no_class import IGNORE_INDEX

MOST_VALUES = 12  # values without a meaning in a table
MOST_COLOURS = 6  # of one class in a table
NO_CLASS = -1  # class of values outside the encoding


def describe_images(
    part: str, name: str, facts: list[RowFacts], notes: Sequence[str] = (), streamed: bool = False
) -> Section:
    """Returns the number, sizes, channels, dtype and values of the images of one part.

    For a stream, the facts are those of its first rows.
    """
    usable = [fact for fact in facts if not fact.image_problem]
    number = f"the first {counted(len(facts), 'image')} of a stream" if streamed else counted(len(facts), "image")
    figures = [number + _sizes(usable)]
    if usable:
        kinds = sorted({(fact.channels, fact.dtype) for fact in usable})
        figures.append(" or ".join(f"{counted(channels, 'channel')} of {dtype}" for channels, dtype in kinds))
        figures.append(f"values {min(fact.low for fact in usable):g} to {max(fact.high for fact in usable):g}")
    if len(usable) < len(facts):
        broken = len(facts) - len(usable)
        figures.append(f"{broken} of them cannot be used" if len(facts) > 1 else "which cannot be used")
    return Section(f"{part}: {name}: {', '.join(figures)}", tuple(note.rstrip(".") for note in notes))


def describe_masks(
    part: str, name: str, facts: list[RowFacts], encoding: MaskEncoding | None, class_names: Sequence[str] | None
) -> Section:
    """Returns the classes of the masks of one part and their shares; without an encoding, only the values."""
    masked = [fact for fact in facts if fact.keys]
    heading = f"{part}: {name}: {counted(len(masked), 'mask')}"
    if not masked:
        return Section(heading)
    if encoding is None:
        return Section(f"{heading}, whose values have no certain meaning", *_values(masked))
    table = _classes(masked, encoding, class_names or encoding.class_names)
    return Section(f"{heading}, {encoding.num_classes} classes ({encoding.kind})", encoding.notes, table)


def spans(keys: Collection[int]) -> str:
    """Returns classes or values as text: "1, 3 to 37"."""
    return describe_keys(keys).replace("..", " to ")


def _sizes(usable: list[RowFacts]) -> str:
    sizes = sorted({fact.size for fact in usable}, key=lambda size: size[0] * size[1])
    if not sizes:
        return ""
    least, most = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    return f" of {least}" if len(sizes) == 1 else f" of {least} to {most} ({len(sizes)} sizes)"


def _classes(masked: list[RowFacts], encoding: MaskEncoding, class_names: Sequence[str] | None) -> Table:
    labels = {key: encoding.label(key) for fact in masked for key, _ in fact.keys}
    classes = {key: NO_CLASS if label is None else label for key, label in labels.items()}
    values: dict[int, list[int]] = defaultdict(list)
    for key, label in classes.items():
        values[label].append(key)
    names = dict(enumerate(class_names or ())) | {IGNORE_INDEX: "ignored", NO_CLASS: "no class"}
    pixels, images = _counts(masked, classes)
    coloured = any(key >= COLOURED for key in labels)
    rows = []
    for label in sorted(values, key=lambda label: label % (IGNORE_INDEX + 1)):  # those without a class come last
        number = str(label) if label not in (IGNORE_INDEX, NO_CLASS) else ""
        shown = _colours(values[label]) if coloured else spans(values[label])
        if encoding.kind == "instances" and label == 1:
            shown = "above 0"
        rows.append((number, shown, names.get(label, ""), _share(pixels, label), str(images[label])))
    table = Table(("class", "value", "name", "pixels", "images"), tuple(rows))
    return table if any(row[2] for row in rows) else table.without("name")


def _values(masked: list[RowFacts]) -> tuple[tuple[str, ...], Table]:
    values = sorted({key for fact in masked for key, _ in fact.keys})
    pixels, images = _counts(masked, {key: key for key in values})
    shown = values[:MOST_VALUES]
    coloured = values[-1] >= COLOURED
    rows = [(_colours([key]) if coloured else str(key), _share(pixels, key), str(images[key])) for key in shown]
    more = (f"and {len(values) - len(shown)} more values",) if len(values) > len(shown) else ()
    return more, Table(("value", "pixels", "images"), tuple(rows))


def _counts(masked: list[RowFacts], classes: Mapping[int, int]) -> tuple[Counter[int], Counter[int]]:
    """Returns the number of pixels of each class, and the number of masks that have it."""
    pixels: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for fact in masked:
        for key, count in fact.keys:
            pixels[classes[key]] += count
        images.update({classes[key] for key, _ in fact.keys})
    return pixels, images


def _share(pixels: Counter[int], label: int) -> str:
    share = pixels[label] / pixels.total()
    return "<0.01%" if share < 0.00005 else f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"


def _colours(keys: Sequence[int]) -> str:
    shown = ["#{:02x}{:02x}{:02x}".format(*key_colour(key)) for key in keys[:MOST_COLOURS]]
    return ", ".join(shown) + (f" and {len(keys) - MOST_COLOURS} more" if len(keys) > MOST_COLOURS else "")
