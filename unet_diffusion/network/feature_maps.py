"""The size of a feature map, its border and its memory layout."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit(x: Tensor, like: Tensor) -> Tensor:
    """Crops or zero-pads `x` (..., h, w) around its centre to the height and width of `like` (..., H, W).

    A single pad, with negative amounts for a crop: a branch on the size would recompile for every parity. If the
    difference is odd, its larger part is at the far end, where pooling rounded.
    """
    height, width = like.shape[-2] - x.shape[-2], like.shape[-1] - x.shape[-1]
    top, left = -(-height // 2), -(-width // 2)
    return F.pad(x, (left, width - left, top, height - top))


def mirrored(places: Tensor, side: int) -> Tensor:
    """Maps positions on an endless line to 0..side-1, back and forth without repeating the ends."""
    period = max(2 * (side - 1), 1)
    places = places % period
    return torch.where(places < side, places, period - places)


def channels_last(images: Tensor) -> Tensor:
    """Copies images (B, C, H, W) with the values of a pixel side by side: the fastest layout without gradients.

    PyTorch considers an image of one channel to have this layout already, and then does not pass the layout on. So the
    strides are set here.
    """
    count, channels, height, width = images.shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(images.shape, strides, dtype=images.dtype, device=images.device).copy_(images)


def has_channels_last(x: Tensor) -> bool:
    """Returns whether a map (B, C, H, W) has the values of a pixel side by side, and is not also contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """Returns `x` (B, C, H, W) with channels last if `like`, of the same shape, has them last; copies if needed."""
    return x.contiguous(memory_format=torch.channels_last) if has_channels_last(like) else x
