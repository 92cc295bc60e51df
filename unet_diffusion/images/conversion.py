"""Converts images as users pass them to tensors of stored values, and values in [-1, 1] to the output of a pipeline."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.checks import require_choice
from unet_diffusion.images.axes import counted
from unet_diffusion.images.decoding import decode
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation

PIL_MODES = {("uint8", 1): "L", ("uint8", 3): "RGB", ("uint8", 4): "RGBA", ("uint16", 1): "I;16", ("float32", 1): "F"}
UNCHANGED = Preparation()  # keeps channels and values


def stored_images(image: Any, channels: int | None = None, preparation: Preparation = UNCHANGED) -> Iterator[Tensor]:
    """Yields the images in `image` one by one, as tensors (C, H, W) of the values that files store.

    Args:
        image: a tensor (C, H, W) or (B, C, H, W), anything that `decode_image` takes, or a list of these, which is
            decoded one by one.
        channels: the expected number of channels, which tells arrays (H, W, C) and (C, H, W) apart.
        preparation: how images that are not tensors are read and converted.

    Raises:
        ValueError: a tensor has another shape, or holds NaN or infinity; `decode_image` fails; or channels cannot be
            converted.
    """
    if isinstance(image, (list, tuple)):
        for each in image:
            yield from stored_images(each, channels, preparation)
    elif isinstance(image, Tensor):
        if image.ndim not in (3, 4) or 0 in image.shape:
            raise ValueError(f"the tensor has shape {tuple(image.shape)}, but must be (C, H, W) or (B, C, H, W).")
        if image.is_floating_point() and not image.isfinite().all():
            raise ValueError("the tensor has values that are NaN or infinite.")
        yield from image if image.ndim == 4 else [image]
    else:
        expected = channels if preparation.channels is None else None
        pixels = preparation(decode(image, axes=preparation.axes, channels=expected))
        yield torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def dtype_name(image: Tensor) -> str:
    """Returns the data type as `PixelRange` names it; every floating-point type counts as float32."""
    return "float32" if image.is_floating_point() else str(image.dtype).removeprefix("torch.")


def check_image(wanted: int, pixel_range: PixelRange, channels: int, dtype: str) -> None:
    """Raises a ValueError unless an image has the `wanted` channels and the data type that a network was trained on."""
    if channels != wanted:
        kinds = {1: " (grey)", 3: " (colour)", 4: " (colour with alpha)"}
        raise ValueError(
            f"the image has {counted(channels, 'channel')}, but the network takes {wanted}; convert it to "
            f"{counted(wanted, 'channel')}{kinds.get(wanted, '')}."
        )
    if dtype != pixel_range.dtype:
        ends, where = f" in the range {list(pixel_range.low)} to {list(pixel_range.high)}", " in that range"
        if pixel_range.percentiles is not None:
            ends, where = "", ""
        raise ValueError(
            f"the image holds {dtype}, but the network was trained on {pixel_range.dtype}{ends}; convert it to "
            f"{pixel_range.dtype}{where}."
        )


def check_output_type(output_type: str, known: tuple[str, ...], channels: int, pixel_range: PixelRange) -> None:
    """Raises a ValueError for an unknown output type, or for "pil" if PIL has no mode for the images."""
    require_choice("output_type", output_type, known)
    if output_type == "pil" and (pixel_range.dtype, channels) not in PIL_MODES:
        raise ValueError(
            f"PIL has no mode for {channels} channels of {pixel_range.dtype}; "
            "use output_type='np' or 'pt' (values in [0, 1]), or 'stored' (values as in the files)."
        )


def has_png(channels: int, pixel_range: PixelRange) -> bool:
    """Returns whether PIL can write these images as PNG without loss."""
    return (pixel_range.dtype, channels) in PIL_MODES and pixel_range.dtype != "float32"


def fits_stock_pipelines(channels: int, pixel_range: PixelRange) -> bool:
    """Returns whether these are images as the pipelines of diffusers give them: of 8 bits, and black is -1, white 1."""
    ends = set(zip(pixel_range.low, pixel_range.high))
    return pixel_range.dtype == "uint8" and ends == {(0, 255)} and has_png(channels, pixel_range)


def as_output(images: Tensor, output_type: str, pixel_range: PixelRange) -> list[Image.Image] | np.ndarray | Tensor:
    """Converts images, float32 (B, C, H, W) around [-1, 1], to an output type of the pipelines.

    Args:
        images: the images; values outside [-1, 1] are clipped, except for "latent".
        output_type: "pil": a list of PIL images; "np": float32 (B, H, W, C) in [0, 1]; "pt": float32 (B, C, H, W) in
            [0, 1]; "stored": (B, C, H, W) in the data type and values of files; "latent": unchanged.
        pixel_range: how stored values map to [-1, 1].
    """
    if output_type == "latent":
        return images
    if output_type in ("pt", "np"):
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
    stored = pixel_range.to_stored(images)
    if output_type == "stored":
        return stored
    return [stored_image(image) for image in stored]


def stored_image(image: Tensor) -> Image.Image:
    """Converts stored values (C, H, W) to a PIL image; PIL must have a mode for the channels and the data type."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
