"""The class that each value of the masks stands for: found from the training masks, or stated."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageColor

from unet_diffusion.checks import require, require_choice
from unet_diffusion.images.masks import COLOURED, Colour, colour_key, describe_keys, key_colour
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.palette import colour

ENCODINGS = ("auto", "indices", "binary", "palette", "instances")
MANY_CLASSES = 64  # more are probably instance numbers or JPEG artefacts, unless the user says otherwise


@dataclass(frozen=True)
class MaskEncoding:
    """The class that each key stands for."""

    classes: Mapping[int, int]  # of each key; `IGNORE_INDEX` for pixels to ignore
    num_classes: int  # background included
    palette: tuple[Colour, ...] | None = None  # red, green and blue of each class, if the masks state them
    kind: str = "indices"  # the encoding that was taken, one of `ENCODINGS` but not "auto"
    class_names: tuple[str, ...] | None = None  # if a file beside the masks states them
    notes: tuple[str, ...] = ()  # what was understood, as sentences

    def __post_init__(self) -> None:
        possible = f"must be from 2 to {IGNORE_INDEX}, background included"
        require(2 <= self.num_classes <= IGNORE_INDEX, "the number of classes", self.num_classes, possible)

    def label(self, key: int) -> int | None:
        """Returns the class of a key, `IGNORE_INDEX` for pixels to ignore; None for a key without a class."""
        return self.classes.get(key)

    def table(self, keys: Sequence[int]) -> np.ndarray:
        """Returns the class of each key, uint8 (256,), for `table[positions in keys]`.

        Raises:
            ValueError: some keys have no class; the message names all of them.
        """
        unknown = [key for key in keys if key not in self.classes]
        if unknown:
            raise ValueError(
                f"masks hold {describe_keys(unknown)}, but the classes are "
                f"{describe_keys([key for key in self.classes if self.classes[key] != IGNORE_INDEX])}"
                f"{f' and {IGNORE_INDEX} (ignored)' if IGNORE_INDEX in self.classes.values() else ''}. "
                "Repair the masks, or give mask_encoding, mask_colours or num_classes that fit."
            )
        table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        table[: len(keys)] = [self.classes[key] for key in keys]
        return table


def find_encoding(
    keys: Collection[int],
    encoding: str = "auto",
    *,
    num_classes: int | None = None,
    colours: Mapping[Colour, int] | None = None,
    palette: Mapping[int, Colour] | None = None,
) -> MaskEncoding:
    """Finds what the keys of a set of training masks mean.

    Args:
        keys: all keys that occur.
        encoding: as `MaskedOptions.mask_encoding`; "palette" orders the colours by (red, green, blue), and masks of
            "instances" were read as 0 and 1.
        num_classes: number of classes, background included; by default as many as occur, at least 2.
        colours: class of each colour, or `IGNORE_INDEX`, instead of those that are found.
        palette: colours of class indices that palette files state.

    Raises:
        ValueError: an unknown encoding; keys that do not fit it, or that would be too many classes under "auto"; more
            classes than `num_classes` or than 255.
    """
    check_encoding(encoding, colours)
    found = sorted(set(keys))
    if encoding == "auto":
        encoding = _guess(found, num_classes, colours)
    if encoding == "palette":
        return _palette_encoding(found, num_classes, colours)
    coloured = [key for key in found if key >= COLOURED]
    if coloured:
        raise ValueError(
            f"mask_encoding is {encoding!r}, but masks hold the colours {describe_keys(coloured)}; use 'palette'."
        )
    if encoding == "binary":
        if len(found) != 2:
            raise ValueError(
                f"mask_encoding is 'binary', but masks hold {describe_keys(found)}; it takes exactly two values. Masks "
                "saved as JPEG have values in between: save them as PNG."
            )
        return MaskEncoding({found[0]: 0, found[1]: 1}, num_classes or 2, kind=encoding)
    count = num_classes or max(2, 1 + max((key for key in found if key != IGNORE_INDEX), default=0))
    shown = tuple(palette.get(label, colour(label)) for label in range(count)) if palette else None
    classes = {**{label: label for label in range(count)}, IGNORE_INDEX: IGNORE_INDEX}
    return MaskEncoding(classes, count, shown, kind=encoding)


def check_encoding(encoding: str, colours: Mapping[Colour, int] | None) -> None:
    """Raises a ValueError for an unknown encoding, or for colours with an encoding that has none."""
    require_choice("mask_encoding", encoding, ENCODINGS)
    if colours is not None and encoding not in ("auto", "palette"):
        raise ValueError(f"mask_colours are given, but mask_encoding is {encoding!r}; set it to 'palette'.")


def parse_colours(colours: Mapping[str, int]) -> dict[Colour, int]:
    """Reads colours such as "#ff0000" or "black" as (red, green, blue); raises a ValueError for other text."""
    classes: dict[Colour, int] = {}
    for text, label in colours.items():
        try:
            red, green, blue = ImageColor.getrgb(text)[:3]
        except ValueError as error:
            raise ValueError(f"mask_colours has {text!r}, which is not a colour; write it as '#ff0000'.") from error
        classes[red, green, blue] = label
    return classes


def _guess(found: list[int], num_classes: int | None, colours: Mapping[Colour, int] | None) -> str:
    if colours is not None or (found and found[-1] >= COLOURED):
        if colours is None and len(found) > MANY_CLASSES:
            raise ValueError(
                f"masks hold {len(found)} different colours, more than masks usually have. JPEG blends colours: save "
                "masks as PNG. If all are classes, give mask_encoding='palette' or mask_colours."
            )
        return "palette"
    if found == [0, 255]:
        return "binary"
    highest = max((key for key in found if key != IGNORE_INDEX), default=0)
    if highest >= MANY_CLASSES and num_classes is None:
        raise ValueError(
            f"masks hold {describe_keys(found)}, which would be {highest + 1} classes. State their meaning by "
            "mask_encoding: 'indices' for class indices, 'instances' for instance numbers, 'palette' if each value is "
            "a class, 'binary' for two values."
        )
    return "indices"


def _palette_encoding(found: list[int], num_classes: int | None, colours: Mapping[Colour, int] | None) -> MaskEncoding:
    if colours is None:
        ordered = sorted(found, key=lambda key: key_colour(key) if key >= COLOURED or key <= 255 else (key, 0, 0))
        classes = {key: label for label, key in enumerate(ordered)}
    else:
        classes = {colour_key(value): label for value, label in colours.items()}
    count = max((label + 1 for label in classes.values() if label != IGNORE_INDEX), default=0)
    if min(classes.values(), default=0) < 0 or (num_classes is not None and count > num_classes):
        raise ValueError(
            f"the colours of the masks stand for {count} classes, but num_classes is {num_classes}; raise it, or give "
            "mask_colours, with 255 for colours to ignore."
        )
    count = max(2, num_classes or count)
    shown = [colour(label) for label in range(count)]
    for key, label in reversed(classes.items()):  # so that the first colour of a class is shown
        if label != IGNORE_INDEX:
            shown[label] = key_colour(min(key, 255) if key < COLOURED else key)
    return MaskEncoding(classes, count, tuple(shown), kind="palette")
