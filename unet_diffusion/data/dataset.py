"""Stored images as a torch data set, whose items depend on the seed, the epoch and the index alone."""

import copy
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unet_diffusion.data.cache import ImageCache
from unet_diffusion.data.crops import crop_and_flip
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_generator


class ImageDataset(Dataset):
    """Images cut to one size, in their stored dtype.

    Args:
        cache: the decoded images.
        rows: int64 (N,), the images that belong to this set.
        size: height and width of the items.
        pixel_range: maps the stored values to [-1, 1].
        name: of the source.
        class_names: names of the classes, or None.
        labels: int64 (N,), class indices or -1; by default those of the cache.
        random: `dataset[epoch, index]` cuts images of other sizes at random places, and mirrors them if `flip` is true.
        flip: mirror each image left to right with probability 1/2.
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

    def ids(self) -> list[str]:
        """Returns the content hash of each image, the same for equal images."""
        return self.cache.ids(self.rows)

    def contents(self) -> list[str]:
        """Returns what identifies an image for learning: its content hash and its class, by name if it has one."""
        names = self.class_names or ()
        labels = [names[label] if 0 <= label < len(names) else str(label) for label in self.labels.tolist()]
        return [f"{image} {label}" for image, label in zip(self.ids(), labels)]

    def only(self, chosen: np.ndarray) -> "ImageDataset":
        """Returns a set of only those images that are chosen, bool (N,)."""
        dataset = copy.copy(self)
        dataset.rows, dataset.labels = self.rows[chosen], self.labels[chosen]
        return dataset

    def fetch(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Returns image `index`, cut and mirrored at random, or centrally and unmirrored without a generator.

        Returns:
            `{"image": Tensor (C, H, W) of the stored dtype, "label": int, -1 where there is none}`.
        """
        stored = self.cache.image(self.rows[index])
        image = crop_and_flip(stored, (self.height, self.width), generator, flip=self.flip)
        return {"image": torch.from_numpy(image), "label": int(self.labels[index])}

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """Returns item (epoch, index), which depends only on these and the seed; without epoch, nothing is random."""
        if isinstance(key, tuple):
            epoch, index = key
            return self.fetch(index, keyed_generator(self.seed, "augment", epoch, index) if self.random else None)
        if not -len(self) <= key < len(self):
            raise IndexError(f"index {key} of {len(self)} images")
        return self.fetch(key)


def to_batch(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stacks items into a batch of tensors: `{"image": (B, C, H, W) as stored, "label": int64 (B,)}`.

    Everything else that the items hold, such as `mask` and `weights`, is stacked in the same way.
    """
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}
