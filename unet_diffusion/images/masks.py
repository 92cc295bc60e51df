"""Masks: how a mask file becomes numbers.

Class indices, black and white, colours, palettes and instance numbers are all read into one kind of number per pixel, a
*key*. A grey value or an index is its own key, and a colour has a key above all grey values. The meaning of the keys is
decided once for a whole set, from its training masks (`unet_diffusion.data.masked.encoding`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from unet_diffusion.checks import Question
from unet_diffusion.images.axes import AxisOrder
from unet_diffusion.images.decoding import LARGEST, LARGEST_OF_MASKS, NOT_A_CLASS, RENUMBER, Decoded, decode
from unet_diffusion.images.fetching import ImageLike

Colour: TypeAlias = tuple[int, int, int]
MaskReading: TypeAlias = Literal["values", "colours", "brightness"]

COLOURED = LARGEST_OF_MASKS + 1  # added to red * 65536 + green * 256 + blue in the key of a colour that is not grey
MOST_RUNS = 6  # of keys in a message
WHITE: Colour = (255, 255, 255)
QUARTER_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class DecodedMask:
    """One mask as read, with the facts that its file states."""

    keys: np.ndarray  # int64 (H, W)
    palette: Mapping[int, Colour] = field(default_factory=dict)  # colours of the indices; empty without a palette
    orientation: int = 1  # EXIF orientation in the file, 1 to 8; 1, upright, if there is none
    format: str = ""  # such as "JPEG", "PNG", "TIFF" or "NPY"; empty for arrays
    lossy: bool = False  # the file keeps its values only approximately, as JPEG does
    pages: int = 1  # frames of an animation, or pages of a TIFF
    unread_pages: int = 0  # pages that are left out: all frames but the first, or pages of another size
    white_is_zero: bool = False  # a TIFF whose lookup table is inverted: 0 is shown white, but stays 0
    overlap: int = 0  # pixels that several files of the mask mark


def decode_mask(source: ImageLike, *, reading: MaskReading = "values", axes: AxisOrder | None = None) -> DecodedMask:
    """Reads the keys of one mask.

    "values": grey images give their values (8 or 16 bits; whole floats too), palette images their indices, and colour
    images the keys of their colours, where transparent pixels count as black. Black-and-white images and bool arrays
    give 0 and 255.

    "colours": the same, but palette images give the keys of their colours.

    "brightness": the brightness of each pixel, 0 to 255, or to 65535 for 16 bits, for two classes with soft edges. Grey
    images give their values, floats up to 1 times 255, colour images the largest of their channels. All are multiplied
    by alpha; if everything is black, alpha itself counts, if it varies. Palette images with a palette of greys give the
    greys, and those of two indices 0 and 255, where black is 0 if the palette is white and black. With colours, they
    give 0 for index 0, and 255 for the one other index that a mask may have, so that red on white is not inverted.

    Stored values count: a TIFF in which white is zero, as Fiji writes masks, is not inverted, at any number of bits.
    Single bits of such a TIFF give 0 for 0, and 255 for 1. Grey values of 2 or 4 bits, or of a PGM with another largest
    value than 255 or 65535, are not scaled to these, except for brightness.

    Args:
        source: as `decode_image` takes it.
        reading: what the keys are.
        axes: as `decode_image` takes them.

    Raises:
        ValueError: the file cannot be decoded, or has one channel per class (multi-label); the message then tells
            whether classes overlap. Unless brightness is read, also if the file holds fractions, 16-bit colours or
            half-transparent pixels.
    """
    decoded = decode(source, axes=axes, reading="colours" if reading == "colours" else "values")
    keys, palette = _brightness(decoded) if reading == "brightness" else _keys(decoded, reading == "colours")
    return DecodedMask(
        keys,
        palette,
        decoded.orientation,
        decoded.format,
        decoded.lossy,
        decoded.pages,
        decoded.unread_pages,
        decoded.white_is_zero,
    )


def decode_instances(source: ImageLike, *, axes: AxisOrder | None = None) -> np.ndarray:
    """Reads instance numbers, uint16 (H, W), 0 for the background, from a grey or palette image or an array.

    Raises:
        ValueError: the file cannot be decoded, or holds colours or fractions.
    """
    return instance_numbers(decode_mask(source, axes=axes))


def instance_numbers(mask: DecodedMask) -> np.ndarray:
    """Returns the keys of a mask as instance numbers, uint16 (H, W); larger numbers are renumbered in order.

    Raises:
        ValueError: the keys are colours, or there are more than 65535 objects.
    """
    if mask.keys.max() >= COLOURED:
        raise ValueError(
            "the instance map is in colour, but must have one channel of instance numbers, 0 for the background."
        )
    if mask.keys.max() <= LARGEST["uint16"]:
        return mask.keys.astype(np.uint16)
    numbers, places = np.unique(np.append(mask.keys, 0), return_inverse=True)  # 0 keeps its place
    if len(numbers) > LARGEST["uint16"] + 1:
        raise ValueError(f"the instance map has {len(numbers) - 1} objects, but at most 65535 are possible; cut it.")
    return places[:-1].reshape(mask.keys.shape).astype(np.uint16)


def fit_orientation(labels: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Turns a mask (H, W) upright like its image, but only if the sizes show that it has to be turned.

    Images are turned upright by their EXIF orientation, and so are masks that state one. A mask without an orientation
    may have been drawn on the upright image, as viewers show it, or on the stored pixels. If it has the size of the
    upright image, it is left alone. If it has that size with height and width swapped, and the image states a quarter
    turn, it was drawn on the stored pixels and is turned in the same way. (If the turn does not change the size, the
    two cases cannot be told apart, and the doctor reports this.)

    Args:
        labels: the mask.
        size: height and width of the upright image.
        orientation: EXIF orientation of the image.
    """
    if labels.shape == size or labels.shape != size[::-1]:
        return labels
    turns = {5: labels.T, 6: np.rot90(labels, -1), 7: np.rot90(labels.T, 2), 8: np.rot90(labels)}
    return np.ascontiguousarray(turns.get(orientation, labels))


def describe_keys(keys: Collection[int]) -> str:
    """Returns keys as text: runs of numbers, and colours."""
    runs: list[list[int]] = []
    for key in sorted(keys):
        if runs and key == runs[-1][1] + 1 and key < COLOURED:
            runs[-1][1] = key
        else:
            runs.append([key, key])
    shown = [_run_text(low, high) for low, high in runs[:MOST_RUNS]]
    return ", ".join(shown) + (f" and {len(runs) - MOST_RUNS} more" if len(runs) > MOST_RUNS else "")


def _run_text(low: int, high: int) -> str:
    if low >= COLOURED:
        return str(key_colour(low))
    return f"{low}" if low == high else f"{low}..{high}"


def key_colour(key: int) -> Colour:
    """Returns the colour of a key: grey for a grey value of 8 bits."""
    packed = key - COLOURED if key >= COLOURED else key * 0x010101
    return packed >> 16 & 255, packed >> 8 & 255, packed & 255


def colour_key(value: Colour) -> int:
    """Returns the key of a colour."""
    red, green, blue = value
    return red if red == green == blue else COLOURED + (red << 16) + (green << 8) + blue


def _keys(decoded: Decoded, colours: bool) -> tuple[np.ndarray, dict[int, Colour]]:
    """Returns the keys (H, W), and the colours of the indices of a palette."""
    pixels = _whole(decoded.pixels) if decoded.pixels.dtype.kind == "f" else decoded.pixels
    if decoded.separate:
        raise _no_colours(pixels, _reason(pixels))
    if pixels.shape[2] > 1:
        return _colour_keys(pixels, colours), {}
    keys = pixels[:, :, 0].astype(np.int64)
    return keys, {} if decoded.palette is None else _used_colours(decoded.palette, np.unique(keys))


def _whole(pixels: np.ndarray) -> np.ndarray:
    outside = pixels[(pixels < 0) | (pixels > LARGEST_OF_MASKS)]
    fractions = pixels[pixels != np.floor(pixels)]
    if outside.size or fractions.size:
        wrong = (outside if outside.size else fractions).flat[0]
        fix = "; give mask_encoding='binary' if there are two classes, to split them at half; else resize masks by "
        fix = (NOT_A_CLASS if wrong < 0 else RENUMBER) if outside.size else f"{fix}nearest neighbour"
        raise ValueError(f"the mask holds the value {wrong:g}, but classes are whole numbers from 0 up{fix}.")
    return pixels.astype(np.uint32)


def _brightness(decoded: Decoded) -> tuple[np.ndarray, dict[int, Colour]]:
    """Returns the brightness (H, W) as keys, and no palette, since the keys are not its indices."""
    pixels = decoded.pixels
    if decoded.palette is not None:
        return _palette_brightness(pixels[:, :, 0], decoded.palette), {}
    channels = pixels.shape[2]
    if channels == 1:
        if decoded.scale != 1:
            pixels = np.round(pixels * decoded.scale)
        return (_scaled(pixels) if pixels.dtype.kind == "f" else pixels)[:, :, 0].astype(np.int64), {}
    if decoded.separate or not _is_colour(pixels):
        raise _no_colours(pixels, _reason(pixels))
    if channels == 3:
        return pixels.max(axis=2).astype(np.int64), {}
    if _is_shape_of_alpha(pixels):
        return pixels[:, :, -1].astype(np.int64), {}
    values, opaque = pixels[:, :, :-1].max(axis=2).astype(np.int64), LARGEST[pixels.dtype.name]
    return (values * pixels[:, :, -1] + opaque // 2) // opaque, {}


def _is_colour(pixels: np.ndarray) -> bool:
    """Returns whether 2 or more channels are grey or colour, with or without alpha, and not one per class."""
    channels = pixels.shape[2]
    if channels > 4 or pixels.dtype.kind == "f":
        return False
    if channels == 3:
        return bool(pixels.max() != 1 or (pixels == pixels[:, :, :1]).all())
    return bool(pixels.max() != 1 and not (pixels[:, :, -1].any() and _is_class_per_channel(pixels)))


def _palette_brightness(indices: np.ndarray, palette: list[int]) -> np.ndarray:
    """Returns the brightness of the pixels of a palette image, from the indices if there are two, 0 being the dark one.

    So a mask of red on white is not inverted. Only if index 0 is white and 1 black, as Pillow's `quantize` orders them,
    is 1 the dark one.
    """
    used = np.unique(indices).tolist()
    colours = _used_colours(palette, np.array(used))
    are_greys = len(colours) == len(used) and all(len({*each}) == 1 for each in colours.values())
    white_first = palette[:3] == [*WHITE] and not any(palette[3:6])
    if are_greys and (used[-1] > 1 or white_first):
        table = np.zeros(256, dtype=np.int64)
        table[used] = [red for red, _, _ in colours.values()]
        return table[indices]
    if len({*used} - {0}) > 1:
        raise ValueError(
            f"mask_encoding is 'binary', but the mask has a palette of colours and the indices {describe_keys(used)}; "
            "give mask_encoding='palette' if each colour is a class, or 'indices' if each index is."
        )
    return np.where(indices == 0, 0, 255)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """Rounds floats; if none is above 1, they are first multiplied by 255."""
    if pixels.min() < 0 or pixels.max() > LARGEST["uint16"]:
        raise ValueError(
            f"the mask holds {pixels.min():g} to {pixels.max():g}, but must hold 0 to 1, 0 to 255 or 0 to 65535."
        )
    return (pixels * 255 if pixels.max() <= 1 else pixels).round().astype(np.uint16)


def _used_colours(values: list[int], used: np.ndarray) -> dict[int, Colour]:
    """Returns the colours of indices; indices that the palette does not list have none."""
    listed = range(len(values) // 3)
    places = [index for index in used.tolist() if index in listed]
    return {index: (values[3 * index], values[3 * index + 1], values[3 * index + 2]) for index in places}


def _colour_keys(pixels: np.ndarray, colours: bool) -> np.ndarray:
    """Returns the keys (H, W) of pixels (H, W, C); values 0 and 1 count as colours only with `colours`."""
    eight_bits = pixels.dtype == np.uint8 and (colours or pixels.max() > 1)
    if pixels.shape[2] in (2, 4) and eight_bits:
        if not colours and _is_shape_of_alpha(pixels):
            raise Question(
                "Does the alpha channel hold the mask? Then give mask_encoding='binary', and what is transparent is "
                "class 0. With mask_encoding='palette', transparent pixels are black as well.",
                "all of the mask is black, and a part of it transparent",
            )
        pixels = _without_alpha(pixels)
    channels = pixels.shape[2]
    is_grey = (pixels == pixels[:, :, :1]).all()
    if channels in (1, 3) and (is_grey or eight_bits):
        red, green, blue = (pixels[:, :, min(channel, channels - 1)].astype(np.int64) for channel in range(3))
        return np.where((red == green) & (green == blue), red, COLOURED + (red << 16) + (green << 8) + blue)
    raise _no_colours(pixels, _reason(pixels))


def _reason(pixels: np.ndarray) -> str:
    """Returns the reason why channels that are classes cannot be read."""
    overlaps = int(((pixels > 0).sum(axis=2) > 1).sum())
    if overlaps:
        return f"they overlap at {overlaps} pixels (multi-label), and a softmax over classes learns one class a pixel"
    return "a channel for each class is not read"


def _no_colours(pixels: np.ndarray, reason: str) -> ValueError:
    return ValueError(
        f"the mask has {pixels.shape[2]} channels of {pixels.dtype}, and {reason}; store one channel of class indices, "
        "or 8-bit colours."
    )


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[:, :, -1:]
    if not np.isin(alpha, (0, 255)).all():
        raise Question(
            "Are half-transparent pixels the soft edges of two classes? Then give mask_encoding='binary', which splits "
            "them at half. Otherwise store one channel of class indices, or 8-bit colours (overlapping classes, "
            "multi-label masks, cannot be learned by softmax).",
            f"the mask has {pixels.shape[2]} channels, and the last is not alpha of 0 or 255 alone",
        )
    if _is_class_per_channel(pixels):
        raise _no_colours(pixels, "a channel for each class is not read")
    return np.where(alpha == 0, 0, pixels[:, :, :-1]).astype(np.uint8)


def _is_shape_of_alpha(pixels: np.ndarray) -> bool:
    """Returns whether only the last channel distinguishes pixels: the rest is black."""
    alpha = pixels[:, :, -1]
    return bool(alpha.min() < alpha.max() and not pixels[:, :, :-1].any())


def _is_class_per_channel(pixels: np.ndarray) -> bool:
    """Returns whether each pixel has one channel above 0, and not always the last, which is then not alpha."""
    hidden = (pixels[:, :, -1:] == 0) & (pixels[:, :, :-1] > 0)  # colours that nobody can see
    return bool(hidden.any() and ((pixels > 0).sum(axis=2) == 1).all())
