"""Maps of instances (such as cells): their connected components, and borders between instances that touch."""

import math

import numpy as np
from scipy import ndimage

from unet_diffusion.checks import require

REACH = 6.0  # sigmas beyond which a border weight is 0: exp(-6**2 / 2) = 1.5e-8, below the precision of float32


def connected_components(foreground: np.ndarray) -> np.ndarray:
    """Labels the components of a bool map (H, W): int32 (H, W), 0 for the background, 1..n for the components.

    Pixels are joined by edges, not by corners, so a background line one pixel wide separates at any slope.
    """
    return ndimage.label(foreground)[0]


def separate_instances(instances: np.ndarray) -> np.ndarray:
    """Sets pixels that touch another instance to background, so that there is a border between instances.

    This is the separation border of Ronneberger et al. 2015, section 3.1. Without it, a class mask of touching cells
    has no border for a network to learn or for `border_weight_map` to weight. Each of two touching cells gives up one
    pixel (diagonal contact counts).

    Args:
        instances: integer (H, W), 0 background, 1..n instances.

    Returns:
        An array of the same shape and type.

    Raises:
        ValueError: the map is not two-dimensional, not of integers, or has negative labels.
    """
    check_instances(instances)
    highest = ndimage.maximum_filter(instances, size=3, mode="nearest")
    without_background = np.where(instances == 0, np.iinfo(instances.dtype).max, instances)
    lowest = ndimage.minimum_filter(without_background, size=3, mode="nearest")
    alone = (highest == instances) & (lowest == instances)
    return np.where(alone, instances, 0).astype(instances.dtype)


def border_weight_map(
    instances: np.ndarray, w0: float = 10.0, sigma: float = 5.0, class_weights: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    """Weights that stress the background between neighbouring instances (Ronneberger et al. 2015, eq. 2).

    w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)), where d1 and d2 are the distances, in pixels, from a
    background pixel to the nearest and to the second nearest instance. Instance pixels get w_c alone, as in the paper's
    figure 3d. Distances are computed one instance at a time in a window of 6 sigma around it, and only the two smallest
    are kept, so memory does not grow with the number of instances.

    Args:
        instances: (H, W), integer labels (0 background, 1..n instances), or bool, whose connected components are used.
        w0: weight at the narrowest gap.
        sigma: width of the gaps that count, in pixels.
        class_weights: w_c of background and instances, such as the data set's `class_weights_from_counts`.

    Returns:
        float32 (H, W).

    Raises:
        ValueError: the map is not two-dimensional, not of integers or bool, or has negative labels; or sigma <= 0.
    """
    labels = connected_components(instances) if instances.dtype == bool else instances
    check_instances(labels)
    require(sigma > 0, "sigma", sigma, "must be a positive number of pixels; the paper's is 5")
    nearest = np.full(labels.shape, np.inf, dtype=np.float32)
    second = nearest.copy()
    reach = math.ceil(REACH * sigma)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        window = tuple(slice(max(side.start - reach, 0), side.stop + reach) for side in box)
        distance = ndimage.distance_transform_edt(labels[window] != label).astype(np.float32)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    background = labels == 0
    border = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    weights = np.where(background, class_weights[0] + border, class_weights[1])
    return weights.astype(np.float32)


def check_instances(instances: np.ndarray) -> None:
    """Raises a ValueError unless the map is (H, W), of integers, without negative labels."""
    if instances.ndim != 2 or instances.dtype.kind not in "ui" or (instances.size and instances.min() < 0):
        lowest = instances.min() if instances.size else "none"
        raise ValueError(
            f"instance map has shape {instances.shape}, type {instances.dtype} and lowest value {lowest}, but must be "
            "(H, W) of integers from 0 (background) up; give one channel, and labels by connected_components."
        )
