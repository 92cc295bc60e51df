"""What a pipeline gives back: images in [-1, 1] as PIL images, arrays, tensors or stored values."""

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.images.decoding import PixelRange

PIL_MODES = {("uint8", 1): "L", ("uint8", 3): "RGB", ("uint8", 4): "RGBA", ("uint16", 1): "I;16", ("float32", 1): "F"}


def check_output_type(output_type: str, known: tuple[str, ...], channels: int, pixel_range: PixelRange) -> None:
    """Raises a ValueError for an unknown output type, or for "pil" where PIL has no mode for the images."""
    if output_type not in known:
        raise ValueError(f"output_type is {output_type!r}, but must be one of {', '.join(known)}.")
    if output_type == "pil" and (pixel_range.dtype, channels) not in PIL_MODES:
        raise ValueError(
            f"PIL has no mode for {channels} channels of {pixel_range.dtype}; "
            "use output_type='np' or 'pt' (values in [0, 1]), or 'stored' (values as in the files)."
        )


def has_png(channels: int, pixel_range: PixelRange) -> bool:
    """Whether a PNG that PIL writes holds such images without loss."""
    return (pixel_range.dtype, channels) in PIL_MODES and pixel_range.dtype != "float32"


def as_output(images: Tensor, output_type: str, pixel_range: PixelRange) -> list[Image.Image] | np.ndarray | Tensor:
    """Images float32 (B, C, H, W) around [-1, 1] in another form.

    Args:
        images: the images; values outside of [-1, 1] are clipped, but for "latent".
        output_type: "pil": a list of PIL images; "np": float32 (B, H, W, C) in [0, 1]; "pt": float32 (B, C, H, W) in
            [0, 1]; "stored": (B, C, H, W) in the data type and values of files; "latent": as they are.
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
    """Stored values (C, H, W) as a PIL image, of channels and a data type that PIL has a mode for."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)
