"""Stored images as a torch data set whose items depend on the seed, the epoch and the index alone."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unet_diffusion.data.cache import ImageCache
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_generator


def augment(image: np.ndarray, size: tuple[int, int], generator: torch.Generator | None, *, flip: bool) -> np.ndarray:
    """An image (C, h, w) cut to (C, height, width) and perhaps mirrored; a copy.

    The place of the cut is drawn from the generator, and so is the mirroring, left to right, of half of the images if
    `flip` is true. Without a generator the centre is cut and nothing mirrored. An image that is smaller is mirrored
    beyond its border.
    """
    places = [place(side, length, 0, generator) for side, length in zip(image.shape[1:], size)]
    mirror = generator is not None and torch.randint(2, (), generator=generator) == 1
    (rows, columns), padding = zip(*places)
    cut = np.pad(image[:, rows, columns], ((0, 0), *padding), mode="reflect")
    return np.ascontiguousarray(cut[:, :, ::-1]) if mirror and flip else cut


def place(side: int, crop: int | None, margin: int, generator: torch.Generator | None) -> tuple[slice, tuple[int, int]]:
    """Where a crop lies along one side: the part of the image, and the pixels to add before and after.

    A side with its margins is cut at a random place; one that is shorter than the crop comes whole, at a random place
    of it. Without a generator both are in the middle. Without a crop: the side with its margins.
    """
    length = side + 2 * margin if crop is None else crop
    low, high = sorted((-margin, side + margin - length))
    start = (low + high) // 2
    if generator is not None:
        start = low + int(torch.randint(high - low + 1, (), generator=generator))
    stop = start + length
    return slice(max(start, 0), min(stop, side)), (max(-start, 0), max(stop - side, 0))


class ImageDataset(Dataset):
    """Images cut to one size, in their stored dtype.

    Args:
        cache: the decoded images.
        rows: int64 (N,), which of them belong to this set.
        size: height and width of the items.
        pixel_range: what maps the stored values to [-1, 1].
        name: of the source.
        class_names: of the labels, or None.
        labels: int64 (N,), class indices or -1; by default the cache's.
        random: whether `dataset[epoch, index]` cuts images of other sizes at random places and mirrors.
        flip: whether it mirrors.
        seed: of the run.
    """

    def __init__(
        self,
        cache: ImageCache,
        rows: np.ndarray,
        size: tuple[int, int],
        pixel_range: PixelRange,
        *,
        name: str,
        class_names: tuple[str, ...] | None = None,
        labels: np.ndarray | None = None,
        random: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.channels = cache.channels
        self.height, self.width = size
        self.pixel_range = pixel_range
        self.name = name
        self.class_names = class_names
        self.labels = cache.labels[rows] if labels is None else labels
        self.random = random
        self.flip = flip
        self.seed = seed
        self.fingerprint = hashlib.sha256(cache.fingerprint.encode() + rows.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Image `index`, cut and mirrored as the generator says, or undisturbed without one.

        Returns:
            `{"image": Tensor (C, H, W) of the stored dtype, "label": int, -1 where there is none}`.
        """
        stored = self.cache.image(self.rows[index])
        image = augment(stored, (self.height, self.width), generator, flip=self.flip)
        return {"image": torch.from_numpy(image), "label": int(self.labels[index])}

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Item (epoch, index), which depends on nothing else than these and the seed; an index alone: undisturbed."""
        if isinstance(key, tuple):
            epoch, index = key
            return self.fetch(index, keyed_generator(self.seed, "augment", epoch, index) if self.random else None)
        if not -len(self) <= key < len(self):
            raise IndexError(f"index {key} of {len(self)} images")
        return self.fetch(key)


def to_batch(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Items to tensors with a first axis for the batch: `{"image": (B, C, H, W) as stored, "label": int64 (B,)}`.

    Whatever else the items hold is stacked likewise, such as `mask` and `weights`.
    """
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
