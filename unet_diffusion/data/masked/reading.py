"""The mask of one row, and perhaps its instance map, as the doctor and training both read them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from unet_diffusion.data.masked.config import Reading
from unet_diffusion.data.masked.parts import read_mask
from unet_diffusion.data.masked.questions import FEWEST_OBJECTS
from unet_diffusion.data.masked.seen import highest_of_run
from unet_diffusion.images.axes import AxisOrder
from unet_diffusion.images.decoding import Decoded
from unet_diffusion.images.masks import (
    DecodedMask,
    decode_instances,
    fit_orientation,
    instance_numbers,
)

SPLIT_OBJECTS = 0.1  # share of objects that may consist of several pieces


@dataclass(frozen=True)
class Labels:
    """The mask of one row, turned upright like its image.

    Attributes:
        mask: the keys, and facts about the file; the keys of instance maps are 0 and 1.
        instances: uint16 (H, W), or None.
        objects: whether the values look like numbers of objects.
        numbered: number of objects in the instance map.
        split: number of these that consist of several separate pieces.
    """

    mask: DecodedMask
    instances: np.ndarray | None
    objects: bool
    numbered: int = 0
    split: int = 0


def read_labels(
    sources: Mapping[str, Any], image: Decoded | None, reading: Reading, axes: AxisOrder | None = None
) -> Labels:
    """Reads the mask of a row, and its instance map.

    Args:
        sources: the files of the columns `mask` and perhaps `instances`, as `decode_mask` takes them.
        image: the image of the row; None leaves the masks unturned.
        reading: as `decode_mask` takes it; "instances" reads the mask as an instance map.
        axes: as `decode_image` takes them.

    Raises:
        ValueError: a file cannot be decoded, or its content does not fit the reading.
    """
    mask = read_mask(sources["mask"], reading, axes)
    instances = None
    if reading == "instances":
        instances = instance_numbers(mask)
        mask = replace(mask, keys=(instances > 0).astype(np.int64), palette={})
    elif "instances" in sources:
        instances = decode_instances(sources["instances"], axes=axes)
    objects = reading == "values" and not mask.palette and numbers_objects(mask.keys, np.unique(mask.keys).tolist())
    if image is not None:
        size = image.pixels.shape[:2]
        mask = replace(mask, keys=fit_orientation(mask.keys, size, image.orientation))
        instances = None if instances is None else fit_orientation(instances, size, image.orientation)
    pieces = [] if instances is None else list(pieces_of(instances))
    return Labels(mask, instances, objects, len(pieces), sum(count > 1 for count in pieces))


def numbers_objects(labels: np.ndarray, keys: Collection[int]) -> bool:
    """Returns whether the values of a mask look like numbers of objects: 1..n, nearly each of them one connected piece.

    Args:
        labels: the mask (H, W).
        keys: all its values.
    """
    highest = highest_of_run(keys)
    if highest is None or highest < FEWEST_OBJECTS:
        return False
    pieces = 0
    for count in pieces_of(labels):
        pieces += count
        if pieces > highest * (1 + SPLIT_OBJECTS):
            return False
    return True


def pieces_of(labels: np.ndarray) -> Iterator[int]:
    """Yields the number of connected pieces, also by corners, of each object 1..n that occurs in labels (H, W)."""
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            yield ndimage.label(labels[box] == label, structure=np.ones((3, 3)))[1]
