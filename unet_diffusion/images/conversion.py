"""Whatever a user calls an image, as tensors of stored values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.images.decoding import PixelRange, decode_image


def stored_images(image: Any) -> Iterator[Tensor]:
    """The images in `image`, one after the other, as tensors (C, H, W) of the values that files store.

    Args:
        image: a tensor (C, H, W) or (B, C, H, W), whatever `decode_image` takes, or a list of those; files of a list
            are decoded as they are asked for.

    Raises:
        ValueError: a tensor of another shape, or with NaN or infinity, or what `decode_image` refuses.
    """
    if isinstance(image, (list, tuple)):
        for each in image:
            yield from stored_images(each)
    elif isinstance(image, Tensor):
        if image.ndim not in (3, 4) or 0 in image.shape:
            raise ValueError(f"the tensor has shape {tuple(image.shape)}, but must be (C, H, W) or (B, C, H, W).")
        if image.is_floating_point() and not image.isfinite().all():
            raise ValueError("the tensor has values that are NaN or infinite.")
        yield from image if image.ndim == 4 else [image]
    else:
        pixels = decode_image(image)
        yield torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def dtype_name(image: Tensor) -> str:
    """The data type as `PixelRange` names it; every floating one counts as float32."""
    return "float32" if image.is_floating_point() else str(image.dtype).removeprefix("torch.")


def check_image(wanted: int, pixel_range: PixelRange, channels: int, dtype: str) -> None:
    """Raises a ValueError for an image of other channels or another data type than the network was trained on.

    Args:
        wanted: channels of the images that the network was trained on.
        pixel_range: how their values were stored.
        channels: of the image.
        dtype: of the image, as `dtype_name` gives it.
    """
    stored = pixel_range.dtype
    if channels != wanted:
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        fix = f'image.convert("{modes[wanted]}")' if wanted in modes else f"an image of {wanted} channels"
        raise ValueError(f"the image has {channels} channels, but the network takes {wanted}; pass {fix}.")
    if dtype != stored:
        raise ValueError(
            f"the image holds {dtype}, but the network was trained on {stored} in the range "
            f"{list(pixel_range.low)} to {list(pixel_range.high)}; pass stored values of that data type."
        )
