"""How the values that files store map to [-1, 1] and back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.checks import PERCENTILES, are_percentiles, plain, require, require_choice
from unet_diffusion.images.decoding import LARGEST, DTypeName
from unet_diffusion.images.stretching import Stretch

DTYPES: dict[str, torch.dtype] = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


@dataclass(frozen=True)
class PixelRange:
    """The stored values that become -1 and 1.

    If each image has its own range, whole images are first stretched by `stretch`, and `to_model` takes the result.

    Args:
        low: stored value that becomes -1, one for all channels or one per channel.
        high: stored value that becomes 1, one for all channels or one per channel; above `low`.
        dtype: data type of the stored images.
        percentiles: percentiles of each channel of an image that `stretch` maps to the ends of the range; None for one
            range for all.

    Raises:
        ValueError: the bounds are not finite, out of order or of different number; the dtype is unknown; the
            percentiles are not two numbers from 0 to 100 in order; or there are percentiles and another range than that
            of `stretched`.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: DTypeName
    percentiles: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, tuple(DTYPES))
        if not self.low or len(self.low) != len(self.high):
            raise ValueError(
                f"low has {len(self.low)} and high has {len(self.high)} values; give one each, or one per channel."
            )
        for low, high in zip(self.low, self.high):
            ordered = math.isfinite(low) and math.isfinite(high) and low < high
            require(ordered, "the range", (low, high), "both ends must be finite, and the first below the second")
        if self.percentiles is None:
            return
        require(are_percentiles(self.percentiles), "percentiles", self.percentiles, PERCENTILES)
        object.__setattr__(self, "percentiles", tuple(map(float, self.percentiles)))
        whole = (self.low, self.high) == ((0.0,), (float(LARGEST.get(self.dtype, 1)),))
        require(whole, "the range", (self.low, self.high), "must be that of the data type if there are percentiles")

    @classmethod
    def full(cls, dtype: DTypeName) -> "PixelRange":
        """Returns the range of all values of an integer dtype: 0 to 255 or 0 to 65535."""
        if dtype not in LARGEST:
            raise ValueError(f"{dtype} has no natural range; state one, such as PixelRange((0.0,), (1.0,), {dtype!r}).")
        return cls(low=(0.0,), high=(float(LARGEST[dtype]),), dtype=dtype)

    @classmethod
    def stretched(cls, dtype: DTypeName, percentiles: tuple[float, float]) -> "PixelRange":
        """Returns the range of images that are stretched one by one: all values of an integer dtype, or 0 to 1."""
        return cls((0.0,), (float(LARGEST.get(dtype, 1)),), dtype, percentiles)

    def stretch(self, image: Tensor) -> Tensor:
        """Stretches a whole stored image (C, H, W) of the dtype to its percentiles, or leaves it if there are none."""
        if self.percentiles is None:
            return image
        stored = image.float() if image.is_floating_point() else image
        values = stored.permute(1, 2, 0).cpu().numpy()
        stretched = torch.from_numpy(Stretch.of(values, self.percentiles)(values))
        return stretched.permute(2, 0, 1).to(image.device)

    @property
    def options(self) -> str:
        """Returns the options that give images this range, as text for people."""
        if self.percentiles is not None:
            low, high = self.percentiles
            return f"percentiles {low:g} {high:g} with percentiles_of image"
        if self.dtype in LARGEST and self == PixelRange.full(self.dtype):
            return f"neither value_range nor percentiles, for images of {self.dtype}"
        if len(self.low) == 1:
            return f"value_range {self.low[0]:g} {self.high[0]:g}"
        return f"its data, whose percentiles are {list(self.low)} to {list(self.high)}"

    def to_model(self, stored: Tensor) -> Tensor:
        """Maps stored values (..., C, H, W) of any dtype to float32 in [-1, 1], clipping values outside the range."""
        low, high = self._bounds(stored)
        return ((stored.to(torch.float32) - low) * (2 / (high - low)) - 1).clamp(-1, 1)

    def to_stored(self, images: Tensor) -> Tensor:
        """Maps values in [-1, 1], (..., C, H, W), to the stored dtype: clipped, and rounded to the nearest integer.

        It is the inverse of `to_model`, and exact for every integer in the range.
        """
        low, high = self._bounds(images)
        values = (images.to(torch.float32).clamp(-1, 1) + 1) * ((high - low) / 2) + low
        if self.dtype != "float32":
            values = values.round().clamp(0, LARGEST[self.dtype])
        return values.to(DTYPES[self.dtype])

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON types; percentiles only if there are any."""
        fields = {"low": list(self.low), "high": list(self.high), "dtype": self.dtype}
        return fields if self.percentiles is None else {**fields, "percentiles": list(self.percentiles)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PixelRange":
        """Returns the range described by `to_dict`; its values are checked again."""
        if not isinstance(fields, Mapping) or set(fields) - {"percentiles"} != {"low", "high", "dtype"}:
            found = ", ".join(sorted(map(str, fields))) if isinstance(fields, Mapping) else repr(fields)
            raise ValueError(f"a pixel range has the keys low, high, dtype and, perhaps, percentiles; found {found}.")
        for name in ("low", "high"):
            values = plain(fields[name])
            valid = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
            require(valid, name, fields[name], "must be a list of numbers, one for all channels or one per channel")
        low, high = (tuple(float(value) for value in fields[name]) for name in ("low", "high"))
        return cls(low, high, fields["dtype"], fields.get("percentiles"))

    def _bounds(self, images: Tensor) -> tuple[Any, Any]:
        if len(self.low) == 1:
            return self.low[0], self.high[0]
        if images.ndim < 3 or images.shape[-3] != len(self.low):
            raise ValueError(f"images of shape {tuple(images.shape)}, but the range is for {len(self.low)} channels.")
        low, high = torch.tensor([self.low, self.high]).to(images.device, non_blocking=True)[..., None, None]
        return low, high
