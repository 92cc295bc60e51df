"""Crops of stored images: where they lie, and how images are cut and mirrored."""

import numpy as np
import torch


def crop_and_flip(
    image: np.ndarray, size: tuple[int, int], generator: torch.Generator | None, *, flip: bool
) -> np.ndarray:
    """Cuts an image (C, h, w) to (C, height, width) and perhaps mirrors it left to right; returns a copy.

    The generator draws the place of the crop and, if `flip` is true, whether to mirror, with probability 1/2. Without a
    generator the crop is central and nothing is mirrored. An image that is smaller than the crop is mirrored beyond its
    border.
    """
    (rows, columns), padding = crop_window(image.shape[1:], size, generator)
    mirror = generator is not None and torch.randint(2, (), generator=generator) == 1
    cut = np.pad(image[:, rows, columns], ((0, 0), *padding), mode="reflect")
    return np.ascontiguousarray(cut[:, :, ::-1]) if mirror and flip else cut


def crop_window(
    shape: tuple[int, ...], size: tuple[int | None, int | None], generator: torch.Generator | None, margin: int = 0
) -> tuple[tuple[slice, slice], tuple[tuple[int, int], tuple[int, int]]]:
    """Draws the place of a crop.

    Args:
        shape: height and width of the image.
        size: height and width of the crop; None: the whole side with its margins.
        generator: draws the place; None: the crop is central.
        margin: pixels before and after each side that a crop may cover.

    Returns:
        The rows and columns of the image to take, and the pixels to add before and after each. An image smaller than
        the crop is taken whole, at a random place in it.
    """
    (rows, above_below), (columns, left_right) = (
        _crop_side(side, length, margin, generator) for side, length in zip(shape, size)
    )
    return (rows, columns), (above_below, left_right)


def _crop_side(
    side: int, crop: int | None, margin: int, generator: torch.Generator | None
) -> tuple[slice, tuple[int, int]]:
    length = side + 2 * margin if crop is None else crop
    low, high = sorted((-margin, side + margin - length))
    start = (low + high) // 2
    if generator is not None:
        start = low + int(torch.randint(high - low + 1, (), generator=generator))
    stop = start + length
    return slice(max(start, 0), min(stop, side)), (max(-start, 0), max(stop - side, 0))
