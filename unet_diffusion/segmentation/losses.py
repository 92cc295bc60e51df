"""What a segmentation step minimises: losses over class logits, class weights, border weights of the 2015 paper.

Logits are (B, K, H, W) over K classes, the background included; masks are int64 (B, h, w) class indices, and pixels of
value `IGNORE_INDEX` count nowhere. An unpadded network gives logits smaller than the mask: masks and pixel weights are
then cut at the centre to the size of the logits.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from unet_diffusion.images.labels import IGNORE_INDEX
from unet_diffusion.network.maps import fit

LOSSES = ("cross_entropy", "dice", "both")
REACH = 6.0  # sigmas after which a border weight is 0: exp(-6**2 / 2) = 1.5e-8, below the precision of float32


def cross_entropy(
    logits: Tensor, masks: Tensor, class_weights: Tensor | None = None, pixel_weights: Tensor | None = None
) -> Tensor:
    """Pixel-wise softmax cross-entropy (Ronneberger et al. 2015, eq. 1), computed in float32.

    The weighted sum of each image is divided by the number of its pixels that are not ignored, not by the sum of the
    weights: so an image with heavy borders costs more, as in the paper, whose energy is that of one image. The mean
    over the images then is the same however they are spread over micro-batches and processes.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, h, w) with h >= H and w >= W; values in 0..K-1 or `IGNORE_INDEX`.
        class_weights: (K,), multiplied in by the class of the pixel.
        pixel_weights: (B, 1, h, w), multiplied in, such as `border_weight_map`.

    Returns:
        A scalar; an image of which every pixel is ignored adds 0 to the mean, with gradients of 0.

    Raises:
        ValueError: if the masks are smaller than the logits.
    """
    masks = cut_to(masks, logits)
    if class_weights is not None:
        class_weights = class_weights.to(logits.device, torch.float32)
    losses = F.cross_entropy(
        logits.float(), masks, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none"
    )  # (B, H, W), 0 where ignored
    if pixel_weights is not None:
        losses = losses * cut_to(pixel_weights, logits)[:, 0]
    return (losses.sum(dim=(1, 2)) / (masks != IGNORE_INDEX).sum(dim=(1, 2)).clamp(min=1)).mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice, 2 sum(p g) / (sum(p) + sum(g)) with softmax p (Milletari et al. 2016, without their squares).

    For each image the sums run over its pixels that are not ignored, and the mean over the classes that occur in its
    mask: a class that is absent has no overlap to raise, and its false positives already lower the other classes. The
    loss is the mean over the images, the same however they are spread over micro-batches and processes.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, h, w) with h >= H and w >= W; values in 0..K-1 or `IGNORE_INDEX`.

    Returns:
        A scalar in [0, 1]; an image of which every pixel is ignored adds 0 to the mean, with gradients of 0.

    Raises:
        ValueError: if the masks are smaller than the logits.
    """
    masks = cut_to(masks, logits)
    valid = (masks != IGNORE_INDEX).unsqueeze(1)  # (B, 1, H, W)
    probabilities = logits.float().softmax(dim=1) * valid
    indices = masks.unsqueeze(1).where(valid, 0)
    target = torch.zeros_like(probabilities).scatter_(1, indices, valid.float())  # one-hot, all 0 where ignored
    overlap = (probabilities * target).sum(dim=(2, 3))  # (B, K)
    size = target.sum(dim=(2, 3))
    dice = 2 * overlap / (probabilities.sum(dim=(2, 3)) + size).clamp(min=1)  # at least 1 where the class occurs
    occurs = size > 0
    return (((1 - dice) * occurs).sum(dim=1) / occurs.sum(dim=1).clamp(min=1)).mean()


def segmentation_loss(
    logits: Tensor,
    masks: Tensor,
    loss: str = "cross_entropy",
    class_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """The loss by name: `cross_entropy`, `dice_loss`, or their sum, with their arguments and shapes.

    Raises:
        ValueError: for an unknown name; for weights with "dice", which has no place for them; for masks smaller than
            the logits.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, but must be one of {', '.join(map(repr, LOSSES))}.")
    if loss == "dice":
        if class_weights is not None or pixel_weights is not None:
            raise ValueError(
                "loss is 'dice', which takes no class or pixel weights; leave them out, or set loss='both'."
            )
        return dice_loss(logits, masks)
    entropy = cross_entropy(logits, masks, class_weights, pixel_weights)
    return entropy if loss == "cross_entropy" else entropy + dice_loss(logits, masks)


def cut_to(target: Tensor, logits: Tensor) -> Tensor:
    """Cuts a target (..., h, w) at its centre to the height and width of the logits (..., H, W).

    Raises:
        ValueError: if the target is smaller, since padding it would invent labels.
    """
    (h, w), (height, width) = target.shape[-2:], logits.shape[-2:]
    if h < height or w < width:
        raise ValueError(
            f"masks or weights are {h}x{w}, but the logits are {height}x{width}, and a target may only be larger; "
            f"give image and mask of the same size."
        )
    return fit(target, logits)


def class_counts(masks: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, int64 (num_classes,), ignored ones left out; counts of several masks may be added.

    Raises:
        ValueError: for a class index that is neither below `num_classes` nor `IGNORE_INDEX`.
    """
    labels = masks[masks != IGNORE_INDEX]
    if labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"masks hold class indices {labels.min()}..{labels.max()}, but with {num_classes} classes they must be in "
            f"0..{num_classes - 1} or {IGNORE_INDEX} (ignored); map the mask values to classes, or raise num_classes."
        )
    return torch.bincount(labels.flatten(), minlength=num_classes)


def class_weights_from_counts(counts: Tensor) -> Tensor:
    """Inverse class frequencies for `cross_entropy`, float32 (K,): total / (classes that occur * count).

    Their mean over the pixels is 1, so the loss keeps its scale, and each class that occurs has the same share of it.
    A class that does not occur gets 1.

    Args:
        counts: pixels per class (K,), as `class_counts` gives them.
    """
    counts = counts.double()
    occurs = counts > 0
    return torch.where(occurs, counts.sum() / (occurs.sum() * counts.clamp(min=1)), 1.0).float()


def connected_components(foreground: np.ndarray) -> np.ndarray:
    """Labels int32 (H, W) of the components of a bool map (H, W): 0 background, 1..n components, neighbours by an edge.

    Diagonal neighbours do not join: a background line one pixel wide, at any slope, separates.
    """
    return ndimage.label(foreground)[0]


def separate_instances(instances: np.ndarray) -> np.ndarray:
    """Sets pixels that touch another instance to background, so that instances have a border between them.

    The separation border of Ronneberger et al. 2015, section 3.1: a class mask of touching cells shows no border that a
    network could learn, and `border_weight_map` none to weight. One pixel of each of the two cells is taken (diagonal
    contact counts), whatever their numbers.

    Args:
        instances: integer (H, W), 0 background, 1..n instances.

    Returns:
        An array of the same shape and type.

    Raises:
        ValueError: if the map is not two-dimensional, not of integers, or has negative labels.
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
    """Weights that press for the background between neighbouring instances (Ronneberger et al. 2015, eq. 2).

    w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2)), with the distances d1 and d2, in pixels, of a background
    pixel to the nearest pixel of the nearest and of the second nearest instance. Instance pixels get w_c alone, as in
    the paper's figure 3d. Distances are computed one instance at a time in a window of 6 sigma around it, and only the
    two smallest are kept, so memory does not grow with the number of instances.

    Args:
        instances: (H, W), integer labels (0 background, 1..n instances), or bool, whose connected components are taken.
        w0: weight at the narrowest gap.
        sigma: width of the gaps that count, in pixels.
        class_weights: w_c of background and of instances, such as `class_weights_from_counts` of the data set.

    Returns:
        float32 (H, W).

    Raises:
        ValueError: if the map is not two-dimensional, not of integers or bool, or has negative labels; if sigma <= 0.
    """
    labels = connected_components(instances) if instances.dtype == bool else instances
    check_instances(labels)
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}, but must be a positive number of pixels; the paper's is 5.")
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
    """Raises ValueError unless the map is (H, W), of integers, without negative labels."""
    if instances.ndim != 2 or instances.dtype.kind not in "ui" or (instances.size and instances.min() < 0):
        lowest = instances.min() if instances.size else "none"
        raise ValueError(
            f"instance map has shape {instances.shape}, type {instances.dtype} and lowest value {lowest}, but must be "
            f"(H, W) of integers from 0 (background) up; give one channel, and labels by connected_components."
        )
