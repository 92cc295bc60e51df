"""Masks: how a mask file becomes numbers.

Class indices, black and white, colours, palettes and instance numbers are all read into one kind of number per pixel, a
*key*: a grey value or an index is its own key, and a colour has a key above all grey values. The meaning of the keys is
decided once for a whole set, from its training masks (`unet_diffusion.data.masked.encoding`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from unet_diffusion.images.decoding import LARGEST, decode
from unet_diffusion.images.fetching import ImageLike

Colour: TypeAlias = tuple[int, int, int]

COLOURED = 1 << 24  # added to red * 65536 + green * 256 + blue in the key of a colour that is not grey
MOST_RUNS = 6  # of keys in a message
QUARTER_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class DecodedMask:
    """One mask as read."""

    keys: np.ndarray  # int64 (H, W)
    palette: Mapping[int, Colour] = field(default_factory=dict)  # colours of the indices; empty without a palette
    orientation: int = 1  # EXIF orientation that the file states, 1 to 8; 1, upright, if it states none
    overlap: int = 0  # pixels that several files of the mask mark


def decode_mask(source: ImageLike, *, colours: bool = False) -> DecodedMask:
    """Reads the keys of one mask.

    Grey images give their values (8 or 16 bits; whole floats too), palette images their indices, and colour images the
    keys of their colours, where transparent pixels count as black. Black-and-white images and bool arrays give 0 and
    255.

    Args:
        source: as `decode_image` takes it.
        colours: read the colours of palette images instead of their indices.

    Raises:
        ValueError: a file that cannot be decoded, that holds fractions, 16-bit colours or half-transparent pixels, or
            that has one channel per class (multi-label); the message then says whether classes overlap.
    """
    decoded = decode(source, keep_indices=not colours)
    pixels = decoded.pixels
    if pixels.dtype.kind == "f":
        pixels = _whole(pixels)
    if pixels.shape[2] > 1:
        return DecodedMask(_colour_keys(pixels, colours), orientation=decoded.orientation)
    keys = pixels[:, :, 0].astype(np.int64)
    palette = {} if decoded.palette is None else _used_colours(decoded.palette, np.unique(keys))
    return DecodedMask(keys, palette, decoded.orientation)


def decode_instances(source: ImageLike) -> np.ndarray:
    """Reads instance numbers, uint16 (H, W), 0 for the background, from a grey or palette image or an array.

    Raises:
        ValueError: a file that cannot be decoded, or that holds colours or fractions.
    """
    return instance_numbers(decode_mask(source))


def instance_numbers(mask: DecodedMask) -> np.ndarray:
    """Returns the keys of a mask as instance numbers, uint16 (H, W); raises a ValueError if they are colours."""
    if mask.keys.max() > LARGEST["uint16"]:
        raise ValueError(
            "the instance map is in colour, but must have one channel of instance numbers, 0 for the background."
        )
    return mask.keys.astype(np.uint16)


def fit_orientation(labels: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Turns a mask (H, W) upright as its image, but only where the sizes show that it has to be turned.

    Images are turned upright by their EXIF orientation, and so are masks that state one. A mask without one may have
    been drawn on the upright image, as viewers show it, or on the pixels as they are stored. If it has the size of
    the upright image, it is left alone. If it has that size with height and width exchanged, and the image states a
    quarter turn, it was drawn on the stored pixels and is turned in the same way. (Where the turn does not change the
    size, the two cases cannot be distinguished, and the doctor says so.)

    Args:
        labels: the mask.
        size: height and width of the upright image.
        orientation: EXIF orientation that the image states.
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


def _whole(pixels: np.ndarray) -> np.ndarray:
    fractions = pixels[(pixels != np.floor(pixels)) | (pixels < 0) | (pixels > LARGEST["uint16"])]
    if fractions.size:
        raise ValueError(f"the mask holds the value {fractions.flat[0]:g}, but classes are whole numbers from 0 up.")
    return pixels.astype(np.uint16)


def _used_colours(values: list[int], used: np.ndarray) -> dict[int, Colour]:
    colours = {int(index): values[3 * index : 3 * index + 3] for index in used}
    return {index: (red, green, blue) for index, (red, green, blue) in colours.items() if len(colours[index]) == 3}


def _colour_keys(pixels: np.ndarray, colours: bool) -> np.ndarray:
    """Returns the keys (H, W) of pixels (H, W, C); values 0 and 1 count as colours only if `colours` says so."""
    eight_bits = pixels.dtype == np.uint8 and (colours or pixels.max() > 1)
    if pixels.shape[2] in (2, 4) and eight_bits:
        pixels = _without_alpha(pixels)
    channels = pixels.shape[2]
    is_grey = (pixels == pixels[:, :, :1]).all()
    if channels in (1, 3) and (is_grey or eight_bits):
        red, green, blue = (pixels[:, :, min(channel, channels - 1)].astype(np.int64) for channel in range(3))
        return np.where((red == green) & (green == blue), red, COLOURED + (red << 16) + (green << 8) + blue)
    overlaps = int(((pixels > 0).sum(axis=2) > 1).sum())
    raise _no_colours(
        pixels,
        f"they overlap at {overlaps} pixels (multi-label), and a softmax over classes learns one class a pixel"
        if overlaps
        else "a channel for each class is not read",
    )


def _no_colours(pixels: np.ndarray, reason: str) -> ValueError:
    return ValueError(
        f"the mask has {pixels.shape[2]} channels of {pixels.dtype}, and {reason}; store one channel of class indices, "
        "or 8-bit colours."
    )


def _without_alpha(pixels: np.ndarray) -> np.ndarray:
    alpha = pixels[:, :, -1:]
    if not np.isin(alpha, (0, 255)).all():
        raise ValueError(
            f"the mask has {pixels.shape[2]} channels, but the last is not alpha of 0 or 255; store one channel of "
            "class indices, or 8-bit colours (overlapping classes, multi-label masks, cannot be learned by softmax)."
        )
    hidden = (alpha == 0) & (pixels[:, :, :-1] > 0)  # colours that nobody can see
    if hidden.any() and ((pixels > 0).sum(axis=2) == 1).all():
        raise _no_colours(pixels, "a channel for each class is not read")
    return np.where(alpha == 0, 0, pixels[:, :, :-1]).astype(np.uint8)
