"""Losses of segmentation over class logits, and class weights.

Logits are (B, K, H, W) over K classes, background included. Masks are int64 (B, h, w) class indices; pixels of value
`IGNORE_INDEX` do not count. The logits of an unpadded network are smaller than the mask; masks and pixel weights are
then cut around the centre to the size of the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.checks import require_choice
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.network.feature_maps import fit

LOSSES = ("cross_entropy", "dice", "both")
MAX_RATIO = 50.0  # largest ratio of two class weights
BOUNDARY_WEIGHT = 10.0  # of a boundary pixel, as in the code of Caicedo et al. 2019 (weights 1 : 1 : 10)


def cross_entropy(
    logits: Tensor, masks: Tensor, class_weights: Tensor | None = None, pixel_weights: Tensor | None = None
) -> Tensor:
    """Pixel-wise softmax cross-entropy (Ronneberger et al. 2015, eq. 1), computed in float32.

    The weighted sum of each image is divided by its number of pixels that are not ignored, not by the sum of the
    weights. So an image with heavy borders costs more, as in the paper, where the energy is that of one image. The mean
    over the images then does not depend on how they are split into micro-batches and processes.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, h, w) with h >= H and w >= W; values in 0..K-1 or `IGNORE_INDEX`.
        class_weights: (K,), factors for the class of each pixel.
        pixel_weights: (B, 1, h, w), further factors, such as `border_weight_map`.

    Returns:
        A scalar; an image whose pixels are all ignored adds 0 to the mean, with gradients of 0.

    Raises:
        ValueError: the masks are smaller than the logits.
    """
    masks = cut_to(masks, logits)
    if class_weights is not None:
        class_weights = class_weights.to(logits.device, torch.float32)
    losses = F.cross_entropy(
        logits.float(), masks, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="none"
    )  # (B, H, W), 0 where ignored
    if pixel_weights is not None:
        losses = losses * cut_to(pixel_weights, logits)[:, 0]
    return mean_over_pixels(losses, masks)


def boundary_loss(logits: Tensor, boundary: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy of the boundary of objects, computed in float32.

    A boundary pixel counts `BOUNDARY_WEIGHT` times, as in Caicedo et al. 2019 (Cytometry A 95:952), since boundary
    pixels are few and a missed one may join two objects. The mean is that of `cross_entropy`.

    Args:
        logits: (B, H, W).
        boundary: bool (B, h, w) with h >= H and w >= W, as `inner_boundary` finds it.
        masks: int64 (B, h, w); they only show which pixels are ignored (`IGNORE_INDEX`).

    Returns:
        A scalar.

    Raises:
        ValueError: the targets are smaller than the logits.
    """
    target, weight = cut_to(boundary, logits).float(), torch.tensor(BOUNDARY_WEIGHT, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(logits.float(), target, pos_weight=weight, reduction="none")
    masks = cut_to(masks, logits)
    return mean_over_pixels(losses.where(masks != IGNORE_INDEX, 0.0), masks)


def distance_loss(predicted: Tensor, distance: Tensor, masks: Tensor) -> Tensor:
    """Mean squared error of the distance in objects, computed in float32.

    The background counts too, as in the distance regression of Naylor et al. 2019 (IEEE TMI 38:448). The mean is that
    of `cross_entropy`.

    Args:
        predicted: (B, H, W).
        distance: (B, h, w) with h >= H and w >= W, as `normalised_distance` computes it.
        masks: int64 (B, h, w); they only show which pixels are ignored (`IGNORE_INDEX`).

    Returns:
        A scalar.

    Raises:
        ValueError: the targets are smaller than the predictions.
    """
    losses = (predicted.float() - cut_to(distance, predicted)).square()
    masks = cut_to(masks, predicted)
    return mean_over_pixels(losses.where(masks != IGNORE_INDEX, 0.0), masks)


def mean_over_pixels(losses: Tensor, masks: Tensor) -> Tensor:
    """Averages losses (B, H, W) over the pixels of each image that are not ignored, then over the images."""
    return (losses.sum(dim=(1, 2)) / (masks != IGNORE_INDEX).sum(dim=(1, 2)).clamp(min=1)).mean()


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice; soft Dice is 2 sum(p g) / (sum(p) + sum(g)) with softmax p (Milletari et al. 2016, no squares).

    For each image, the sums run over the pixels that are not ignored, and the mean is over the classes in its mask. An
    absent class has no overlap to raise, and its false positives already lower the scores of the other classes. The
    loss is the mean over the images, which does not depend on how they are split into micro-batches and processes.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, h, w) with h >= H and w >= W; values in 0..K-1 or `IGNORE_INDEX`.

    Returns:
        A scalar in [0, 1]; an image whose pixels are all ignored adds 0 to the mean, with gradients of 0.

    Raises:
        ValueError: the masks are smaller than the logits.
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
    """Computes the loss of a given name: `cross_entropy`, `dice_loss`, or their sum. Arguments and shapes are theirs.

    Raises:
        ValueError: the name is unknown, "dice" is given weights, or the masks are smaller than the logits.
    """
    require_choice("loss", loss, LOSSES)
    if loss == "dice":
        if class_weights is not None or pixel_weights is not None:
            raise ValueError(
                "loss is 'dice', which takes no class or pixel weights; leave them out, or set loss='both'."
            )
        return dice_loss(logits, masks)
    entropy = cross_entropy(logits, masks, class_weights, pixel_weights)
    return entropy if loss == "cross_entropy" else entropy + dice_loss(logits, masks)


def cut_to(target: Tensor, logits: Tensor) -> Tensor:
    """Cuts a target (..., h, w) at its centre to the height and width of the logits (..., H, W)."""
    (h, w), (height, width) = target.shape[-2:], logits.shape[-2:]
    if h < height or w < width:  # padding would invent labels
        raise ValueError(
            f"masks or weights are {h}x{w}, but the logits are {height}x{width}, and targets must not be smaller; "
            "give image and mask of the same size."
        )
    return fit(target, logits)


def class_counts(masks: Tensor, num_classes: int) -> Tensor:
    """Counts the pixels per class, int64 (num_classes,), without ignored ones; counts of several masks can be added.

    Raises:
        ValueError: a class index is neither below `num_classes` nor `IGNORE_INDEX`.
    """
    labels = masks[masks != IGNORE_INDEX]
    check_labels("masks", labels, num_classes)
    return torch.bincount(labels.flatten(), minlength=num_classes)


def check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises a ValueError unless all class indices are in 0..num_classes-1."""
    if labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"class indices of {name} are {labels.min()}..{labels.max()}, but with {num_classes} classes they must be "
            f"0..{num_classes - 1}; map the mask values to classes, or raise num_classes."
        )


def class_weights_from_counts(counts: Tensor) -> Tensor:
    """Inverse class frequencies for `cross_entropy`, limited, float32 (K,).

    Within the limit, all classes that occur have the same share of the loss: total / (classes that occur * count). No
    weight is more than `MAX_RATIO` times the smallest, which is about the range of ENet's weights (Paszke et al. 2016,
    section 5.2); otherwise a few pixels of a rare class could outweigh the rest. The mean over the pixels is 1, so the
    loss keeps its scale. A class that does not occur gets 1.

    Args:
        counts: pixels per class (K,), as `class_counts` gives them.
    """
    counts = counts.double()
    occurs, total = counts > 0, counts.sum()
    inverse = total / counts.clamp(min=1)
    limited = inverse.clamp(max=MAX_RATIO * float(inverse[occurs].min())) if occurs.any() else inverse
    return torch.where(occurs, limited * total / (limited * counts).sum().clamp(min=1), 1.0).float()
