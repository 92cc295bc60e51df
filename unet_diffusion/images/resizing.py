"""Resizes and converts decoded images to the size, the channels and the values that a run asks for."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from unet_diffusion.images.axes import AxisOrder
from unet_diffusion.images.decoding import LARGEST, Decoded
from unet_diffusion.images.stretching import Stretch

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601-2, as Pillow's convert("L")


@dataclass(frozen=True)
class Preparation:
    """The conversion of every image before it is stored.

    Args:
        image_size: length of the shorter side in pixels; smaller images are enlarged; None keeps the size.
        crop: "center" cuts the square in the middle; "random" keeps the longer side, for a new crop in every epoch.
        channels: 1 or 3 converts between grey and colour; None keeps the channels.
        axes: order of the axes of arrays, and of TIFF files that do not name their axes, for `decode_image`; images
            that are passed to a preparation are already (H, W, C).
        percentiles: percentiles of each channel of the whole image that become the ends of the range of its data type
            (`Stretch`); None keeps the values.
    """

    image_size: int | None = None
    crop: Literal["center", "random"] = "center"
    channels: int | None = None
    axes: AxisOrder | None = None
    percentiles: tuple[float, float] | None = None

    def __call__(self, image: np.ndarray | Decoded) -> np.ndarray:
        """Converts an image (H, W, C) to (H', W', C') of the same dtype; unchanged without options.

        Raises:
            ValueError: the channels cannot be converted (`convert_channels`), or are pages of a TIFF and not alpha.
        """
        if isinstance(image, Decoded):
            if image.separate:
                _check_no_alpha(image.pixels, self.channels)
            image = image.pixels
        if self.channels is not None:
            image = convert_channels(image, self.channels)
        if self.percentiles is not None:
            image = Stretch.of(image, self.percentiles)(image)
        if self.image_size is None:
            return image
        window, (height, width) = self._window(image.shape[0], image.shape[1], self.image_size)
        return resize(image[window], height, width)

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON types; percentiles are new, so they are included only if there are any."""
        options = asdict(self)
        if self.percentiles is None:
            del options["percentiles"]
        return options

    def labels(self, mask: np.ndarray) -> np.ndarray:
        """Cuts and resizes a mask (H, W) like its image, by nearest neighbour, so that labels are not mixed."""
        if self.image_size is None:
            return mask
        window, (height, width) = self._window(mask.shape[0], mask.shape[1], self.image_size)
        return resize_labels(mask[window], height, width)

    def _window(self, height: int, width: int, shorter: int) -> tuple[tuple[slice, slice], tuple[int, int]]:
        """Returns the part that is kept, and the height and width to which it is resized."""
        side = min(height, width)
        if self.crop == "center":
            top, left = (height - side) // 2, (width - side) // 2
            return (slice(top, top + side), slice(left, left + side)), (shorter, shorter)
        return (slice(height), slice(width)), (round(height * shorter / side), round(width * shorter / side))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image (H, W, C) to (height, width, C) by Pillow's antialiased Lanczos filter, channel by channel.

    It computes in float32 for any dtype, so that 16-bit and float images lose nothing. The filter's overshoot is
    clipped to the values that the channel had.
    """
    if image.shape[:2] == (height, width):
        return image
    planes = np.ascontiguousarray(np.moveaxis(image, 2, 0)).astype(np.float32)  # (C, H, W)
    size, lanczos = (width, height), Image.Resampling.LANCZOS
    resized = np.stack([np.asarray(Image.fromarray(plane).resize(size, lanczos)) for plane in planes], axis=2)
    resized = resized.clip(planes.min(axis=(1, 2)), planes.max(axis=(1, 2)))
    return _as_dtype(resized, image.dtype)


def resize_labels(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a mask (H, W) to (height, width): each pixel takes the label at its centre, as in `resize`."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip((height, width), mask.shape)
    )
    return mask[rows[:, None], columns]


def convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image (H, W, C) to (H, W, channels): grey is repeated, colour becomes luma, alpha is laid on white.

    Raises:
        ValueError: there is no such conversion, for example from 7 channels.
    """
    found = image.shape[2]
    if found == channels:
        return image
    opaque = _on_white(image) if found in (2, 4) and image.dtype.name in LARGEST else image
    if channels == 3 and opaque.shape[2] == 1:
        return np.repeat(opaque, 3, axis=2)
    if channels == 1 and opaque.shape[2] == 3:
        return _as_dtype(opaque.astype(np.float32) @ LUMA, image.dtype)[:, :, None]
    if opaque.shape[2] == channels:
        return opaque
    raise ValueError(f"{found} channels of {image.dtype} cannot be converted to {channels}.")


def _check_no_alpha(pixels: np.ndarray, channels: int | None) -> None:
    """Raises a ValueError if the last of separate channels would be taken for alpha."""
    found = pixels.shape[2]
    if found in (2, 4) and channels not in (None, found):
        raise ValueError(
            f"{found} channels of {pixels.dtype} cannot be converted to {channels}: they are pages or planes, not "
            "colour and alpha; leave out the option channels, or store the channels that you need in their own file."
        )


def _on_white(image: np.ndarray) -> np.ndarray:
    white = LARGEST[image.dtype.name]
    alpha = image[:, :, -1:].astype(np.float32) / white
    return _as_dtype(image[:, :, :-1] * alpha + white * (1 - alpha), image.dtype)


def _as_dtype(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (values.round() if dtype.kind == "u" else values).astype(dtype)
