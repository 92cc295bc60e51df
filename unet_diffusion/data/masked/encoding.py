"""The class that each value of the masks stands for, found from the training masks or stated."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import ImageColor

from unet_diffusion.checks import Question, check_class_names, require, require_choice
from unet_diffusion.data.masked.questions import (
    VOC_OUTLINE,
    ask_about_binary,
    ask_about_colours,
    ask_about_mixed_masks,
    ask_about_order,
    ask_about_values,
    ask_about_white_first,
    by_colour,
    counts_of_objects,
    default_threshold,
    outline_key,
)
from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.images.masks import COLOURED, Colour, colour_key, describe_keys, key_colour
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.palette import colour

ENCODINGS = ("auto", "indices", "binary", "palette", "instances")


@dataclass(frozen=True)
class MaskEncoding:
    """The class that each key stands for.

    Attributes:
        classes: class of each key; `IGNORE_INDEX` for pixels to ignore.
        num_classes: background included.
        palette: red, green and blue of each class, if the masks state them.
        kind: "indices", "binary", "palette" or "instances".
        threshold: for binary masks, pixels are class 1 from this value on; None if `classes` has all values.
        class_names: one name per class, if a file beside the masks states them.
        notes: what was understood, as sentences.
    """

    classes: Mapping[int, int]
    num_classes: int
    palette: tuple[Colour, ...] | None = None
    kind: str = "indices"
    threshold: int | float | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        possible = f"must be from 2 to {IGNORE_INDEX}, background included"
        require(2 <= self.num_classes <= IGNORE_INDEX, "the number of classes", self.num_classes, possible)

    def label(self, key: int) -> int | None:
        """Returns the class of a key, `IGNORE_INDEX` for pixels to ignore; None for a key without a class."""
        if self.threshold is not None and key < COLOURED:
            return int(key >= self.threshold)
        return self.classes.get(key)

    def keys_of(self, label: int) -> list[int]:
        """Returns the keys of a class, ascending; for `IGNORE_INDEX`, the keys to ignore."""
        return sorted(key for key in self.classes if self.label(key) == label)

    def unknown(self, keys: Collection[int]) -> list[int]:
        """Returns the keys that have no class."""
        return [key for key in keys if self.label(key) is None]

    def table(self, keys: Sequence[int]) -> np.ndarray:
        """Returns the class of each key, uint8 (256,), for `table[positions in keys]`.

        Raises:
            ValueError: some keys have no class; the message names all of them.
        """
        unknown = self.unknown(keys)
        if unknown:
            raise ValueError(
                f"masks hold {describe_keys(unknown)}, but the classes are "
                f"{describe_keys([key for key in self.classes if self.classes[key] != IGNORE_INDEX])}"
                f"{f' and {IGNORE_INDEX} (ignored)' if self.classes.get(IGNORE_INDEX) == IGNORE_INDEX else ''}. "
                "Repair the masks, or give mask_encoding, mask_colours or num_classes that fit."
            )
        table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        table[: len(keys)] = [label for label in map(self.label, keys) if label is not None]
        return table

    def noted(self, *notes: str, class_names: tuple[str, ...] | None = None) -> "MaskEncoding":
        """Returns the encoding with further notes, and with names of the classes."""
        return replace(self, notes=(*self.notes, *notes), class_names=class_names or self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Returns the encoding as JSON values."""
        return {**asdict(self), "classes": [[key, label] for key, label in self.classes.items()]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MaskEncoding":
        """Returns the encoding that `to_dict` described; raises a ValueError for other values."""
        try:
            palette, names = values["palette"], values["class_names"]
            return cls(
                {int(key): int(label) for key, label in values["classes"]},
                values["num_classes"],
                None if palette is None else tuple((red, green, blue) for red, green, blue in palette),
                values["kind"],
                values["threshold"],
                None if names is None else tuple(names),
                tuple(values["notes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the saved meaning of masks is {dict(values)!r}, which cannot be read: {error}"
            ) from error


def find_encoding(
    seen: SeenMasks | Collection[int],
    encoding: str = "auto",
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    colours: Mapping[Colour, int] | None = None,
    palette: Mapping[int, Colour] | None = None,
    threshold: float | None = None,
) -> MaskEncoding:
    """Finds what the keys of a set of training masks mean.

    Args:
        seen: the keys of each mask, or all keys that occur as if they were of one mask.
        encoding: as `MaskedOptions.mask_encoding`; "palette" orders the colours by (red, green, blue), and masks of
            "instances" were read as 0 and 1.
        num_classes: number of classes, background included; by default the number that occur, at least 2.
        class_names: names of the classes, if they are stated.
        colours: class of each colour, or `IGNORE_INDEX`, in place of the classes that would be found.
        palette: colours of class indices that palette files state, if `seen` does not hold them.
        threshold: as `MaskedOptions.mask_threshold`.

    Raises:
        ValueError: the encoding is unknown; keys do not fit it, or may mean several things under "auto"; or there are
            more classes than `num_classes` or than 255.
    """
    check_encoding(encoding, colours, threshold)
    if not isinstance(seen, SeenMasks):
        seen = SeenMasks.of(seen, palette=palette)
    found, count = seen.keys, num_classes if class_names is None else len(class_names)
    if encoding == "auto":
        encoding = _guess(seen, count, colours)
    notes = _notes_on_files(seen, encoding)
    if encoding == "palette":
        if colours is None:
            names = class_names if seen.coloured else None  # grey values have an order of their own
            ask_about_order([key for key in found if key != outline_key(found)], count, names)
        return _palette_encoding(found, count, colours, notes)
    coloured = [key for key in found if key >= COLOURED]
    if coloured:
        raise ValueError(
            f"mask_encoding is {encoding!r}, but masks hold the colours {describe_keys(coloured)}; use 'palette'."
        )
    if encoding == "binary":
        return _binary_encoding(seen, count, threshold, notes)
    return _index_encoding(seen, encoding, count, notes)


def check_learnable(seen: SeenMasks, encoding: str) -> None:
    """Raises a ValueError if the training masks hold a single value; masks of "instances" were read as 0 and 1."""
    found = seen.keys
    if len(found) == 1:
        everywhere = (
            "belongs to an object" if encoding == "instances" and found == [1] else f"is {describe_keys(found)}"
        )
        raise ValueError(
            f"every pixel of the masks {everywhere}, so there is nothing to learn; give masks that hold the background "
            "and at least one class."
        )


def for_other_masks(encoding: MaskEncoding, seen: SeenMasks) -> MaskEncoding:
    """Returns the encoding of the masks of another set, such as a test set, given that of the training masks.

    Binary masks may differ from the training masks: 1 and 255 are class 1 in masks that hold nothing else above 0.
    Masks in the colours of Pascal VOC may have its outline.

    Raises:
        Question: binary masks have other values than the training masks, so that some would be empty and others not; or
            class indices have other colours in the palettes of the files.
    """
    found, threshold = seen.keys, encoding.threshold
    outline = outline_key(found)
    if encoding.kind == "palette" and outline is not None:
        return replace(encoding, classes={outline: IGNORE_INDEX, **encoding.classes})
    if encoding.kind == "indices" and encoding.palette is not None:
        _ask_about_other_colours(seen, encoding.palette)
    if encoding.kind != "binary" or (threshold is None and not encoding.unknown(found)):
        return encoding
    if seen.two_valued and (threshold is None or set(found) <= {0, 1, IGNORE_INDEX}):
        threshold = 1
    elif threshold is None:
        threshold = _half(max(*found, *encoding.classes))
        ask_about_mixed_masks(seen, threshold)
    return replace(encoding, threshold=threshold, classes={**encoding.classes, **_split(found, threshold)})


def _ask_about_other_colours(seen: SeenMasks, palette: Sequence[Colour]) -> None:
    """Raises a Question if an index has another colour than in the palettes of the training masks."""
    for label, (before, found) in enumerate(zip(palette, map(seen.palette.get, range(len(palette))))):
        if found not in (None, before) and before != colour(label):  # which stands for classes that state no colour
            raise Question(
                f"index {label} has the colour {found} in the palettes of these masks and {before} in those of the "
                "training masks, so that indices may mean different classes. mask_encoding='palette' reads "
                "the colours; 'indices' keeps the indices, whatever their colours."
            )


def check_same_classes(encoding: MaskEncoding, before: MaskEncoding, name: str) -> None:
    """Raises a ValueError if a key has another class than in a run that goes on, or the classes are others.

    Args:
        encoding: of the masks as they are now.
        before: of the masks that the run has learnt from.
        name: of the set.
    """
    fix = (
        "restore the masks, and a labelmap.txt, class_dict.csv or _classes.csv beside them, or choose another output "
        "folder."
    )
    for key in dict.fromkeys((*before.classes, *encoding.classes)):
        label, learnt = encoding.label(key), before.label(key)
        if None not in (label, learnt) and label != learnt:
            now, earlier = ("ignored" if each == IGNORE_INDEX else f"class {each}" for each in (label, learnt))
            raise ValueError(
                f"{describe_keys([key])} in the masks of {name} is {now}, but for the run it has been {earlier}; {fix}"
            )
    if encoding.num_classes != before.num_classes:
        raise ValueError(
            f"the masks of {name} have {encoding.num_classes} classes, but those of the run have "
            f"{before.num_classes}; {fix}"
        )
    check_class_names(encoding.class_names, before.class_names or (), name)


def check_encoding(encoding: str, colours: Mapping[Colour, int] | None, threshold: float | None = None) -> None:
    """Raises a ValueError for an unknown encoding, or for colours or a threshold that the encoding does not use."""
    require_choice("mask_encoding", encoding, ENCODINGS)
    if colours is not None and encoding not in ("auto", "palette"):
        raise ValueError(f"mask_colours are given, but mask_encoding is {encoding!r}; set it to 'palette'.")
    if threshold is not None and encoding != "binary":
        raise ValueError(
            f"mask_threshold is {threshold:g}, but mask_encoding is {encoding!r}; set it to 'binary', or leave "
            "mask_threshold out."
        )


def parse_colours(colours: Mapping[str, int]) -> dict[Colour, int]:
    """Reads colours such as "#ff0000" or "black" as (red, green, blue).

    Raises:
        ValueError: a text is not a colour, a colour has two classes, or a class is not from 0 to 255.
    """
    classes: dict[Colour, int] = {}
    for text, label in colours.items():
        try:
            red, green, blue = ImageColor.getrgb(text)[:3]
        except ValueError as error:
            raise ValueError(f"mask_colours has {text!r}, which is not a colour; write it as '#ff0000'.") from error
        possible = f"classes are from 0 to {IGNORE_INDEX - 1}, and {IGNORE_INDEX} is ignored"
        require(0 <= label <= IGNORE_INDEX, f"the class of {text!r} in mask_colours", label, possible)
        if classes.setdefault((red, green, blue), label) != label:
            raise ValueError(
                f"mask_colours gives {text!r} the class {label}, but the same colour has the class "
                f"{classes[red, green, blue]} before; give each colour once."
            )
    return classes


def _guess(seen: SeenMasks, num_classes: int | None, colours: Mapping[Colour, int] | None) -> str:
    if colours is not None:
        return "palette"
    if seen.coloured:
        ask_about_colours(seen)
        return "palette"
    if seen.keys == [0, IGNORE_INDEX]:
        ask_about_binary(num_classes)
        return "binary"
    ask_about_white_first(seen)
    ask_about_values(seen, num_classes)
    return "indices"


def _notes_on_files(seen: SeenMasks, encoding: str) -> tuple[str, ...]:
    """Returns a sentence about files whose compression changes values."""
    if not seen.formats:
        return ()
    count, formats = sum(map(bool, seen.lossy)), " and ".join(seen.formats)
    end = "" if encoding == "binary" else ", so that classes may be wrong; masks are better exported as PNG"
    return (f"{count} masks are {formats} files, whose compression changes values{end}",)


def _index_encoding(seen: SeenMasks, kind: str, num_classes: int | None, notes: tuple[str, ...]) -> MaskEncoding:
    found, objects = seen.keys, counts_of_objects(seen)
    count = num_classes or max(2, 1 + max((key for key in found if key != IGNORE_INDEX), default=0))
    shown = tuple(seen.palette.get(label, colour(label)) for label in range(count)) if seen.palette else None
    if objects:
        of_objects = (
            f"each of the values 1 to {max(objects)} is one piece in nearly every mask; they are taken for classes, "
            "and mask_encoding='instances' takes them for objects"
        )
        notes = (*notes, of_objects)
    classes = {**{label: label for label in range(count)}, IGNORE_INDEX: IGNORE_INDEX}
    return MaskEncoding(classes, count, shown, kind, notes=notes)


def _binary_encoding(
    seen: SeenMasks, num_classes: int | None, threshold: float | None, notes: tuple[str, ...]
) -> MaskEncoding:
    found, count = seen.keys, num_classes or 2
    if threshold is None and len(found) == 2:
        classes = {found[0]: 0, found[1]: 1}
        return MaskEncoding(classes, count, None, "binary", None, None, notes)
    if threshold is None:
        threshold = _half(max(found, default=0))
        ask_about_mixed_masks(seen, threshold)
    else:
        _check_threshold(found, threshold)
    note = f"values of {threshold:g} and more are class 1"
    return MaskEncoding(_split(found, threshold), count, None, "binary", threshold, None, (*notes, note))


def _half(largest: int) -> int:
    threshold = default_threshold(largest)
    if threshold is None:
        raise Question(
            f"mask_encoding is 'binary', and masks hold more than two values, up to {largest}, which is the largest "
            "neither of 8 nor of 16 bits; give mask_threshold, the value from which on a pixel is class 1."
        )
    return threshold


def _check_threshold(found: Sequence[int], threshold: float) -> None:
    if found and not min(found) < threshold <= max(found):
        side = "class 0" if threshold > max(found) else "class 1"
        raise ValueError(
            f"mask_threshold is {threshold:g}, but masks hold {describe_keys(found)}, so that every pixel would be "
            f"{side}; give a threshold above {min(found)} and of at most {max(found)}."
        )


def _split(found: Sequence[int], threshold: float) -> dict[int, int]:
    return {key: int(key >= threshold) for key in found}


def _palette_encoding(
    found: Sequence[int], num_classes: int | None, colours: Mapping[Colour, int] | None, notes: tuple[str, ...]
) -> MaskEncoding:
    outline = outline_key(found)
    if colours is None:
        ordered = sorted((key for key in found if key != outline), key=by_colour)
        classes = {key: label for label, key in enumerate(ordered)}
        if outline is not None:
            classes[outline] = IGNORE_INDEX
            notes = (*notes, f"{VOC_OUTLINE}, the outline of Pascal VOC, is ignored")
        if 0 not in classes and any(key >= COLOURED for key in ordered):
            ground = f"no colour is black, so that class 0, the background of most masks, is {key_colour(ordered[0])}"
            notes = (*notes, f"{ground}; mask_colours states other classes")
    else:
        classes = {colour_key(value): label for value, label in colours.items()}
    count = max((label + 1 for label in classes.values() if label != IGNORE_INDEX), default=0)
    if num_classes is not None and count > num_classes:
        raise ValueError(
            f"the colours of the masks stand for {count} classes, but num_classes is {num_classes}; raise it, or give "
            "mask_colours, with 255 for colours to ignore."
        )
    count = max(2, num_classes or count)
    shown = [colour(label) for label in range(count)]
    for key, label in reversed(classes.items()):  # reversed, so that the first colour of a class is shown
        if label != IGNORE_INDEX:
            shown[label] = key_colour(min(key, 255) if key < COLOURED else key)
    return MaskEncoding(classes, count, tuple(shown), "palette", notes=notes)
