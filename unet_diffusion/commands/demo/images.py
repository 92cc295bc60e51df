"""The images of a run's page: reading an upload, and showing an image."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.commands.inputs import find_inputs
from unet_diffusion.images.conversion import as_output
from unet_diffusion.images.figures import array_images
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline

Reader: TypeAlias = SegmentationPipeline | SuperResolutionPipeline  # pipelines that take images

MAX_EXAMPLES = 24
LARGEST_SHOWN, SMALLEST_SHOWN = 1024, 384  # pixels a side on the page
THUMBNAIL = 128


def find_examples(folder: Path, reader: Reader | None) -> list[tuple[Path, Image.Image]]:
    """Returns the first images of a folder with thumbnails; a ValueError names an image that does not fit the run."""
    if reader is None:
        raise ValueError(f"examples are {folder}, but the run only generates images and takes none; leave them out.")
    try:
        paths = find_inputs((str(folder),), folder / "masks").paths
    except ValueError as error:
        raise ValueError(f"examples are {folder}, but there is no image in it; give a folder of images.") from error
    examples = []
    for path in paths[:MAX_EXAMPLES]:
        try:
            examples.append((path, fitted(viewed(reader, read_upload(path, reader)), THUMBNAIL)))
        except ValueError as error:
            raise ValueError(f"{path} does not fit the run: {error} Take it out of examples.") from error
    return examples


def read_upload(path: Path, pipe: Reader) -> Tensor:
    """Reads the stored values (C, H, W) of a file for a run; errors give its name without the server's folders."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is no longer here, since uploads are kept for an hour; give it again.") from None
    (image,) = pipe.read_images({"bytes": content, "path": path.name})
    return image


def viewed(pipe: Reader, image: Tensor) -> Image.Image:
    """Converts stored values (C, H, W) that the run takes to RGB, by the run's pixel range."""
    return as_rgb(pipe.pixel_range.to_model(pipe.pixel_range.stretch(image)), pipe.pixel_range)


def as_rgb(image: Tensor, pixel_range: PixelRange) -> Image.Image:
    """Converts an image (C, H, W) in [-1, 1] to RGB: the first three of more than three channels, the first of two."""
    values = as_output(image[None], "np", pixel_range)
    assert isinstance(values, np.ndarray)
    return array_images(values)[0].convert("RGB")


def fitted(image: Image.Image, largest: int = LARGEST_SHOWN) -> Image.Image:
    """Fits an image to the page: shrinks a large one, and enlarges the pixels of a small one to visible squares."""
    longest = max(image.size)
    if longest > largest:
        width, height = (max(1, round(side * largest / longest)) for side in image.size)
        return image.resize((width, height), Image.Resampling.NEAREST if image.mode in ("P", "I") else None)
    factor = max(1, min(SMALLEST_SHOWN, largest) // longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def heat(values: np.ndarray) -> Image.Image:
    """Draws values from 0 to 1, (H, W), in colours from black through red to white."""
    from matplotlib import colormaps  # here, since it takes a tenth of the package's import time

    return Image.fromarray(colormaps["inferno"](values, bytes=True)[..., :3])
