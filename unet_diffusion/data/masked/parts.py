"""Masks in several files for one image, with a file for each object or each class, merged into one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unet_diffusion.checks import Question
from unet_diffusion.data.masked.config import Reading
from unet_diffusion.images.axes import AxisOrder
from unet_diffusion.images.masks import DecodedMask, decode_mask, describe_keys

NEAR = 32  # values this close to 0 or 255 count as these in files with more values, as JPEG leaves them


def read_mask(value: Any, reading: Reading, axes: AxisOrder | None = None) -> DecodedMask:
    """Reads the mask of a row: an image, or a list of the files of an image.

    A list is merged. Under "instances", each file is an object, numbered from 1 in order, and where two overlap the
    later one stays. Otherwise the files are the classes from 1 on, with None for classes without a file.

    Args:
        value: the value in the column of masks, as `decode_mask` takes it, or a list of such values.
        reading: as `MaskedOptions.mask_reading`.
        axes: as `decode_image` takes them.

    Raises:
        ValueError: a file cannot be decoded or does not hold two values; files have different sizes; or a pixel has two
            classes.
    """
    if not isinstance(value, list):
        return decode_mask(value, reading="values" if reading == "instances" else reading, axes=axes)
    parts = {number: _marked(part, axes) for number, part in enumerate(value, 1) if part is not None}
    if not parts:
        raise ValueError("it has no mask.")
    first, orientation = next(iter(parts.values()))
    keys: np.ndarray = np.zeros(first.shape, dtype=np.int64)
    overlap = 0
    for number, (marked, _) in parts.items():
        if marked.shape != keys.shape:
            raise ValueError(
                f"the files of its mask have {keys.shape[1]}x{keys.shape[0]} and {marked.shape[1]}x{marked.shape[0]} "
                "pixels; all must have the size of the image."
            )
        overlap += int(((keys > 0) & marked).sum())
        keys[marked] = number
    if overlap and reading != "instances":
        raise ValueError(
            f"the files of its mask mark {overlap} pixels as two classes (multi-label), but a pixel has one class; "
            "clear these pixels in all files but one, or train a network for each class."
        )
    return DecodedMask(keys, orientation=orientation, overlap=overlap)


def _marked(part: Mapping[str, Any], axes: AxisOrder | None) -> tuple[np.ndarray, int]:
    """Returns the pixels that a file marks, bool (H, W), and the orientation that it states."""
    try:
        mask = decode_mask(part, axes=axes)
        if mask.palette and mask.keys.max() <= 1:  # index 0 may be the white one
            mask = decode_mask(part, reading="brightness", axes=axes)
    except Question:  # about alpha, which can only mark the object
        mask = decode_mask(part, reading="brightness", axes=axes)
    found = np.unique(mask.keys)
    if len(found) <= 2 and (found[0] == 0 or len(found) == 1):
        return mask.keys > 0, mask.orientation
    if all(key <= NEAR or 255 - NEAR <= key <= 255 for key in found):
        return mask.keys > 127, mask.orientation
    raise ValueError(
        f"{part.get('path') or 'a file of its mask'} holds {describe_keys(found.tolist())}, but a file for one object "
        "or class holds 0 and one other value; set all pixels of the object to that value."
    )


def is_missing(value: Any) -> bool:
    """Returns whether a value of a column of images or masks is empty."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return all(is_missing(part) for part in value)
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)
