"""Whatever a user calls a picture, as tensors of stored values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.pixels import decode_image


def stored_pictures(image: Any) -> Iterator[Tensor]:
    """The pictures in `image`, one after the other, as tensors (C, H, W) of the values that files store.

    Args:
        image: a tensor (C, H, W) or (B, C, H, W), whatever `decode_image` takes, or a list of those; files of a list
            are decoded as they are asked for.

    Raises:
        ValueError: a tensor of another shape, or with NaN or infinity, or what `decode_image` refuses.
    """
    if isinstance(image, (list, tuple)):
        for each in image:
            yield from stored_pictures(each)
    elif isinstance(image, Tensor):
        if image.ndim not in (3, 4) or 0 in image.shape:
            raise ValueError(f"the tensor has shape {tuple(image.shape)}, but must be (C, H, W) or (B, C, H, W).")
        if image.is_floating_point() and not image.isfinite().all():
            raise ValueError("the tensor has values that are NaN or infinite.")
        yield from image if image.ndim == 4 else [image]
    else:
        pixels = decode_image(image)
        yield torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def dtype_name(picture: Tensor) -> str:
    """The data type as `PixelRange` names it; every floating one counts as float32."""
    return "float32" if picture.is_floating_point() else str(picture.dtype).removeprefix("torch.")
