"""Images to look at: grids of samples, written as PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.files import written_aside
from unet_diffusion.images.conversion import stored_image
from unet_diffusion.images.decoding import LARGEST, scientific
from unet_diffusion.images.palette import viewable


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Lays out images, as RGB, in rows of `columns`; by default the grid is about square.

    There are `gap` white pixels between images, and each pixel becomes a square of `scale` pixels a side. Every image
    has a place of the size of the first one, to which images of other sizes are fitted without distortion.
    """
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    width, height = (side * scale for side in images[0].size)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        left, top = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + gap)
        share = min(width / image.width, height / image.height)
        size = max(1, round(share * image.width)), max(1, round(share * image.height))
        place = left + (width - size[0]) // 2, top + (height - size[1]) // 2
        sheet.paste(viewable(image).resize(size, Image.Resampling.NEAREST), place)
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG to a temporary file and renames it."""
    with written_aside(path) as aside:
        aside.write_bytes(encoded_image(image))


def save_stored(image: Tensor, path: Path) -> None:
    """Writes stored values (C, H, W) via a temporary file: as PNG if the suffix is `.png`, else as array (H, W, C)."""
    with written_aside(path) as aside:
        aside.write_bytes(encoded_stored(image, path.suffix))


def encoded_image(image: Image.Image) -> bytes:
    """Returns the content of an image's PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def encoded_labels(labels: np.ndarray) -> bytes:
    """Returns the content of a compressed TIFF file of numbers (H, W): uint16, or uint32 if one is above 65535.

    Raises:
        ImportError: for uint32 without the extra `scientific`.
    """
    file = io.BytesIO()
    if labels.max() <= LARGEST["uint16"]:
        Image.fromarray(labels.astype(np.uint16)).save(file, "TIFF", compression="tiff_adobe_deflate")
    else:
        tifffile = scientific("tifffile", "label images of more than 65535 objects")
        tifffile.imwrite(file, labels.astype(np.uint32), compression="zlib", metadata=None)
    return file.getvalue()


def encoded_stored(image: Tensor, suffix: str) -> bytes:
    """Returns the content of a file of stored values (C, H, W): ".png", or ".npy" with an array (H, W, C)."""
    return (
        encoded_image(stored_image(image)) if suffix == ".png" else encoded_array(image.permute(1, 2, 0).cpu().numpy())
    )


def encoded_array(array: np.ndarray) -> bytes:
    """Returns the content of an array's `.npy` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def array_images(images: np.ndarray) -> list[Image.Image]:
    """Converts images (B, H, W, C) in [0, 1] to PIL images: the first three of more channels, or the first of two."""
    eight_bit = (images.clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0]) for image in eight_bit]
