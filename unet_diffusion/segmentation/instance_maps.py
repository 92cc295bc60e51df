"""The maps that tell objects apart: the boundary of each object, and how deep in its object each pixel lies."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.measure import label
from torch import Tensor

from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.segmentation.instances import check_instances

SMALLEST = 0.01  # share of the training objects that may be smaller than any object looked for later
SPECK = 0.1  # of the median area; what is larger may be a part of an object
UNKNOWN = -1  # in instance maps: pixels whose object is not known


def objects_of_mask(mask: np.ndarray, instances: np.ndarray | None = None) -> np.ndarray:
    """Returns the objects of a class mask, int32 (H, W), 0 for no object: in class 0 and where the mask is ignored.

    Args:
        mask: class indices or 255 = ignored (H, W).
        instances: the objects, integer (H, W), 0 for none; None takes the connected components of each class, joined by
            edges and not by corners.
    """
    mask = np.where(mask == IGNORE_INDEX, 0, mask)
    found = label(mask, background=0, connectivity=1) if instances is None else np.where(mask == 0, 0, instances)
    return found.astype(np.int32)


def inner_boundary(instances: Tensor) -> Tensor:
    """Returns the pixels of objects beside a pixel of the background or of another object, bool (..., H, W).

    These are the pixels that `skimage.segmentation.find_boundaries(mode="inner")` finds. The image's border is not a
    boundary, and neither is the border of `UNKNOWN` pixels, since the object may go on there.

    Args:
        instances: numbers of the objects (..., H, W), 0 for the background.
    """
    boundary = torch.zeros_like(instances, dtype=torch.bool)
    for side in (-1, -2):
        pairs = instances.shape[side] - 1
        before, after = instances.narrow(side, 0, pairs), instances.narrow(side, 1, pairs)
        edge = (before != after) & (before != UNKNOWN) & (after != UNKNOWN)
        boundary.narrow(side, 0, pairs).logical_or_(edge)
        boundary.narrow(side, 1, pairs).logical_or_(edge)
    return boundary & (instances > 0)


def normalised_distance(instances: np.ndarray) -> np.ndarray:
    """Returns the distance to the nearest pixel outside the object, divided by its largest value in the object.

    The distance is Euclidean, from pixel to pixel, so it is at least 1 before the division. The area beyond the image's
    border is not outside: an object that is cut there counts as if it went on. An object that fills the image is 1
    everywhere. Distances are computed one object at a time, in a window of the object's size.

    Args:
        instances: numbers of the objects, integer (H, W), 0 for the background.

    Returns:
        float32 (H, W): above 0 and up to 1 in objects, 0 in the background.

    Raises:
        ValueError: the map is not two-dimensional, not of integers, or has negative numbers.
    """
    check_instances(instances)
    result = np.zeros(instances.shape, dtype=np.float32)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        window = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)  # holds the nearest pixel outside
        inside = instances[window] == number
        # the distance transform is undefined on a map without zeros
        distance = np.ones(inside.shape) if inside.all() else ndimage.distance_transform_edt(inside)
        result[window][inside] = (distance / distance.max())[inside]
    return result


def object_areas(instances: np.ndarray) -> np.ndarray:
    """Returns the area of each object in pixels, int64 (n,); 0 is the background."""
    areas = np.bincount(instances.ravel())[1:]
    return areas[areas > 0]


@dataclass(frozen=True)
class ObjectSizes:
    """The sizes of training objects, as a network keeps them.

    Attributes:
        diameter: the median diameter in pixels; the diameter of an object is that of a circle of the same area.
        min_area: the largest area, in pixels, that at least 99 % of the objects reach, but at most a tenth of the
            median area, so that parts of usual objects, such as those at the border of an image, are larger.
    """

    diameter: float
    min_area: int

    @classmethod
    def of(cls, areas: np.ndarray) -> "ObjectSizes":
        """Returns the sizes of objects of these areas, (n,) in pixels, n >= 1."""
        diameter = float(np.median(np.sqrt(4 * areas / np.pi)))
        reached = int(np.quantile(areas, SMALLEST, method="lower"))
        return cls(diameter, max(1, min(reached, int(SPECK * np.median(areas)))))
