"""The meaning of mask values, settled from the options, a labelmap.txt and the masks; nothing is read here."""

from collections.abc import Sequence

from unet_diffusion.data.masked.config import READINGS, MaskedDataConfig, MaskedOptions, Reading
from unet_diffusion.data.masked.encoding import MaskEncoding, check_learnable, find_encoding, for_other_masks
from unet_diffusion.data.masked.labelmap import LabelMap
from unet_diffusion.data.masked.questions import (
    VOC_OUTLINE,
    ask_about_colours,
    ask_about_lossy,
    ask_about_test_values,
    ask_about_white_first,
    outline_key,
)
from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.files import readable
from unet_diffusion.images.masks import COLOURED, Colour, colour_key, describe_keys
from unet_diffusion.images.no_class import IGNORE_INDEX


def settled_encoding(config: MaskedDataConfig, seen: SeenMasks) -> MaskEncoding:
    """Returns the encoding of the training masks, for both the doctor and training.

    Args:
        config: names the masks.
        seen: their values, as `config.mask_reading` reads them.

    Raises:
        ValueError: the values may mean several things, fit no class, or leave nothing to learn.
    """
    check_learnable(seen, config.mask_encoding)
    labelmap = config.labelmap
    if labelmap is not None and labelmap.fits(seen):
        return _by_labelmap(labelmap, config, seen)
    listed = config.class_list
    if (
        listed is not None
        and set(seen.keys) <= {*range(len(listed[1])), IGNORE_INDEX}
        and seen.keys != [0, IGNORE_INDEX]
    ):
        found = find_encoding(seen, config.mask_encoding, class_names=listed[1])
        return found.noted(f"names of the classes are those of {readable(str(listed[0]))}", class_names=listed[1])
    found = find_encoding(
        seen,
        config.mask_encoding,
        num_classes=config.known_classes,
        class_names=config.class_names,
        colours=config.colours,
        threshold=config.mask_threshold,
    )
    if config.colours is not None and found.unknown(seen.keys):
        ask_about_colours(seen)
    table = config.other_table
    if table is not None:
        found = found.noted(f"{readable(str(table))} is not used, since its columns are not name, r, g and b")
    if labelmap is None or not seen.keys:
        return found
    note = f"{readable(str(labelmap.path))} is not used, since the masks are not in its colours"
    return found.noted(note)


def encoding_of_part(config: MaskedDataConfig, encoding: MaskEncoding, seen: SeenMasks) -> MaskEncoding:
    """Returns the encoding of one part of a run, such as its validation set.

    A stated threshold holds for all parts, and so do stated indices. Raises the errors of `for_other_masks`.
    """
    if config.mask_threshold is not None or config.mask_encoding == "indices":
        return encoding
    return for_other_masks(encoding, seen)


def reading_of_others(options: MaskedOptions, saved: MaskEncoding | None) -> Reading:
    """Returns how to read the masks of a labelled set for a trained network: if open, as its training masks."""
    if saved is None or options.mask_encoding != "auto" or options.mask_colours is not None:
        return options.mask_reading
    return READINGS[saved.kind]


def encoding_of_others(
    options: MaskedOptions,
    seen: SeenMasks,
    num_classes: int,
    palette: Sequence[Sequence[int]] | None,
    saved: MaskEncoding | None,
    name: str,
) -> MaskEncoding:
    """Returns the encoding of the masks of another set, as classes of a network.

    Args:
        options: names the set.
        seen: its masks, as `reading_of_others` reads them.
        num_classes: classes of the network.
        palette: red, green and blue of each class of the network, or None.
        saved: the encoding of the masks that the network was trained on; None if it is not known.
        name: of the set.

    Raises:
        ValueError: only the training masks could tell the meaning, or the masks do not fit the network.
    """
    encoding, colours, found = options.mask_encoding, options.colours, seen.keys
    binary = num_classes == 2 and set(found) <= {0, IGNORE_INDEX}
    unstated = colours is None and options.mask_threshold is None
    if saved is not None and unstated and _same_kind(encoding, saved, seen.coloured or binary):
        _check_classes_beside_background(found, "auto" if saved.kind == "indices" else saved.kind, num_classes, name)
        if saved.kind == "indices":
            ask_about_test_values(seen, num_classes)
        elif saved.kind == "palette":
            ask_about_lossy(seen, "palette")
        return for_other_masks(saved, seen)
    if colours is None and (encoding == "palette" or (encoding == "auto" and seen.coloured)):
        if palette is None:
            raise ValueError(f"the masks of {name} are colours, and the run knows none; give mask_colours.")
        colours = _colours_of(palette)
    elif colours is None:
        _check_classes_beside_background(found, encoding, num_classes, name)
    if binary and unstated and encoding in ("auto", "binary"):
        return MaskEncoding({0: 0, IGNORE_INDEX: 1}, 2, kind="binary")
    if encoding == "auto" and colours is None:
        ask_about_white_first(seen)
        ask_about_test_values(seen, num_classes)
        encoding = "indices"
    return find_encoding(seen, encoding, num_classes=num_classes, colours=colours, threshold=options.mask_threshold)


def _by_labelmap(labelmap: LabelMap, config: MaskedDataConfig, seen: SeenMasks) -> MaskEncoding:
    classes = labelmap.classes(0 in seen.keys, config.class_names)
    colours: dict[Colour, int] = {colour: label for label, (_, colour) in enumerate(classes)}
    path, notes = readable(str(labelmap.path)), []
    unknown = [key for key in seen.keys if key not in map(colour_key, colours)]
    if unknown and unknown == [outline_key(seen.keys)]:
        colours[VOC_OUTLINE] = IGNORE_INDEX
        notes.append(f"{VOC_OUTLINE}, the outline of Pascal VOC, is ignored")
    elif unknown:
        ask_about_colours(seen)
        raise ValueError(
            f"masks hold {describe_keys(unknown)}, which {path} does not name. Add a line for each, repair the masks, "
            "or give mask_colours."
        )
    names = tuple(name for name, _ in classes)
    found = find_encoding(seen, "palette", num_classes=config.num_classes, colours=colours)
    return found.noted(f"names and colours of the classes are those of {path}", *notes, class_names=names)


def _same_kind(encoding: str, saved: MaskEncoding, unlike_indices: bool) -> bool:
    """Returns whether masks are read like those that a network was trained on."""
    if saved.kind == "indices":
        return encoding == "auto" and not unlike_indices
    return encoding in ("auto", saved.kind)


def _check_classes_beside_background(found: Sequence[int], encoding: str, num_classes: int, name: str) -> None:
    """Raises a ValueError for masks of two classes if the network has more classes."""
    two = encoding in ("binary", "instances") or (encoding == "auto" and list(found) == [0, IGNORE_INDEX])
    if two and num_classes > 2:
        raise ValueError(
            f"the masks of {name} have one class beside the background, but the network has {num_classes} classes; "
            "give masks of all of them, or mask_encoding='indices' if 255 marks pixels to ignore."
        )


def _colours_of(palette: Sequence[Sequence[int]]) -> dict[Colour, int]:
    """Returns the class of each colour; among equal colours the first one counts, since others fill gaps."""
    colours = {(red, green, blue): label for label, (red, green, blue) in reversed([*enumerate(palette)])}
    if any(colour_key(colour) >= COLOURED for colour in colours):
        colours.setdefault(VOC_OUTLINE, IGNORE_INDEX)
    return colours
