"""The order of the axes of arrays and of TIFF pages that do not state it."""

from typing import Literal, TypeAlias, get_args

from unet_diffusion.checks import Question

AxisOrder: TypeAlias = Literal["HWC", "CHW"]

AXIS_ORDERS: tuple[AxisOrder, ...] = get_args(AxisOrder)
USUAL_CHANNELS = 4  # a last axis of at most this length is the channels
ASKED = (
    "Which axis holds the channels? Give axes='CHW' if it is the first, or axes='HWC' if it is the last. If the first "
    "axis counts images, store each image in a file of its own."
)
MOST_CHANNELS = 32  # longer axes are channels only if the user states it


def order_of_array(shape: tuple[int, ...], axes: AxisOrder | None, channels: int | None) -> AxisOrder:
    """Returns the order of the three axes of an array.

    It is `axes`, if stated. If only one order gives the expected number of `channels`, it is that order. Otherwise the
    last axis is the channels if it has at most 4 entries, or at most 32 and fewer than each of the others, since
    100 x 28 x 28 may be 100 images.

    Raises:
        Question: none of these settles the order. ValueError: neither axis has the expected number of channels.
    """
    first, middle, last = shape
    if axes is not None:
        return axes
    if channels is not None and channels in (first, last):
        return "HWC" if last == channels else "CHW"
    if last <= USUAL_CHANNELS or (last <= MOST_CHANNELS and last < min(first, middle)):
        return "HWC"
    raise _unclear(shape, channels)


def order_of_pages(shape: tuple[int, ...], axes: AxisOrder | None, channels: int | None) -> AxisOrder:
    """Returns the order of the axes of (pages, rows, columns), as `order_of_array` does.

    Pages are the channels if there are at most 32, fewer than rows and fewer than columns, and if there are more than 4
    columns.
    """
    pages, rows, columns = shape
    if axes is not None:
        return axes
    if channels is not None and channels in (pages, columns):
        return "CHW" if pages == channels else "HWC"
    if pages <= MOST_CHANNELS and columns > USUAL_CHANNELS and pages < min(rows, columns):
        return "CHW"
    raise _unclear(shape, channels)


def _unclear(shape: tuple[int, ...], channels: int | None) -> ValueError:
    first, second, third = shape
    if channels is not None:
        return ValueError(
            f"its shape is {shape}, but {counted(channels, 'channel')} must be its first or its last axis; of several "
            "images, give each on its own."
        )
    images = "" if first <= USUAL_CHANNELS else f", or {first} images"
    return Question(
        ASKED,
        f"its shape is {shape}, which may be {counted(first, 'channel')} of {second} x {third} pixels, or "
        f"{first} x {second} pixels with {counted(third, 'channel')}{images}",
    )


def counted(number: int, noun: str) -> str:
    """Returns "1 channel" or "2 channels", for messages."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
