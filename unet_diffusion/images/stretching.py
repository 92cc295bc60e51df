"""Stretches each image so that two of its percentiles become the ends of the range of its data type."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from unet_diffusion.images.decoding import LARGEST

BINS = 1 << 16  # of a histogram; values with more bits are counted by their upper half first


@dataclass(frozen=True)
class Stretch:
    """The values of an image that become the ends of the range, 0 to 255, 0 to 65535, or 0 to 1 for floats.

    If the two percentiles of a channel are equal, as for a few bright specks on an even background, its smallest and
    largest values are used instead.

    Attributes:
        low: of each channel, (C,).
        high: of each channel, (C,); not above `low` in a uniform channel, which becomes 0.
    """

    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, image: np.ndarray, percentiles: Sequence[float]) -> "Stretch":
        """Returns the percentiles, from 0 to 100, of each channel of an image (H, W, C), as values that occur in it."""
        ranks = (0, *percentiles, 100)
        return cls._of_ranked(np.percentile(image, ranks, axis=(0, 1), method="inverted_cdf"))

    @classmethod
    def of_parts(cls, parts: Callable[[], Iterable[np.ndarray]], percentiles: Sequence[float]) -> "Stretch":
        """Returns the same for an image that is read in parts (h, w, C), twice if its values have 32 bits.

        Values are counted, not kept. Floats are counted by bits that sort in the same order, the upper 16 first.

        Raises:
            ValueError: a part holds NaN or infinity.
        """
        first = next(iter(parts()))
        channels, dtype = first.shape[2], first.dtype
        shift = 16 if dtype.kind == "f" else 0
        counts = np.zeros((channels, BINS), dtype=np.int64)
        for part in parts():
            if shift and not np.isfinite(part).all():
                raise ValueError("the image has pixels that are NaN or infinite; replace them.")
            for channel in range(channels):
                counts[channel] += np.bincount(_keys(part[..., channel]) >> shift, minlength=BINS)
        ranks = np.array([_rank(percentile, int(counts[0].sum())) for percentile in (0, *percentiles, 100)])
        keys, before = _of_rank(counts, ranks)  # (C, R) each
        if shift:
            below = np.zeros((channels, len(ranks), BINS), dtype=np.int64)
            for part in parts():
                for channel in range(channels):
                    own = _keys(part[..., channel])
                    for end, upper in enumerate(keys[channel]):
                        lower = own[own >> shift == upper] & (BINS - 1)
                        below[channel, end] += np.bincount(lower, minlength=BINS)
            rest = (np.cumsum(below, axis=2) <= (ranks - before)[..., None]).sum(axis=2)
            keys = keys << shift | rest
        return cls._of_ranked(_values(keys, dtype).T)

    @classmethod
    def _of_ranked(cls, values: np.ndarray) -> "Stretch":
        """Returns the stretch of channels, given their smallest value, two percentiles and largest value, (4, C)."""
        least, low, high, most = values
        same = high <= low
        return cls(np.where(same, least, low), np.where(same, most, high))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Returns the stretched image or part of one, (H, W, C), in the same data type; values outside are clipped.

        Integers are rounded to the nearest.
        """
        low, high = self.low.astype(np.float32), self.high.astype(np.float32)
        span = np.where(high > low, high - low, np.inf).astype(np.float32)
        shares = ((image.astype(np.float32) - low) / span).clip(0, 1)
        if image.dtype.name not in LARGEST:
            return shares.astype(image.dtype)
        return (shares * LARGEST[image.dtype.name]).round().astype(image.dtype)


def _rank(percentile: float, count: int) -> int:
    """Returns the index, among `count` sorted values, of the least one that this percentage of them does not exceed."""
    return max(int(np.ceil(percentile / 100 * count)) - 1, 0)


def _of_rank(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bins (C, R) that hold the values of some ranks, given counts (C, B), and the values before each."""
    sums = np.cumsum(counts, axis=1)
    bins = (sums[:, None] <= ranks[:, None]).sum(axis=2)
    return bins, np.take_along_axis(sums - counts, bins, axis=1)


def _keys(values: np.ndarray) -> np.ndarray:
    """Returns integers from 0 on, (N,), that sort as the values do: integers themselves, floats by their bits."""
    if values.dtype.kind == "u":
        return values.ravel().astype(np.int64)
    bits = np.ascontiguousarray(values, dtype=np.float32).ravel().view(np.int32).astype(np.int64)
    return np.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


def _values(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values of keys, as `_keys` gives them."""
    if dtype.kind == "u":
        return keys.astype(dtype)
    signed = keys - (1 << 31)
    bits = np.where(signed < 0, (-1 - signed) | (1 << 31), signed).astype(np.uint32)
    return bits.view(np.float32)
