"""Images of a set in a random order, read in parts, for comparison with other images."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.randomness import keyed_generator


@dataclass(frozen=True, eq=False)
class DrawnImages:
    """Images that are read only when a part of them is asked for: `images[10:20]` is float32 (10, C, H, W) in [-1, 1].

    Attributes:
        images: the set.
        order: int64 (N,), the images of the set that were drawn.
        random: each image is cut and mirrored as in training, in the same way whenever it is read; otherwise it is cut
            in the middle and not mirrored.
    """

    images: ImageDataset
    order: Tensor
    random: bool = False

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        stored = [self.images.fetch(index, self._generator(index))["image"] for index in self.order[part].tolist()]
        return self.images.pixel_range.to_model(torch.stack(stored))

    def _generator(self, index: int) -> torch.Generator | None:
        return keyed_generator(0, "drawn", index) if self.random else None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Returns the number of images, their channels, height and width."""
        return len(self), self.images.channels, self.images.height, self.images.width

    def first(self, count: int) -> "DrawnImages":
        """Returns only the first images."""
        return DrawnImages(self.images, self.order[:count], self.random)

    @property
    def are_cut(self) -> bool:
        """Returns whether some images are larger than what is cut out of them."""
        sizes = self.images.cache.sizes[self.images.rows[self.order.numpy()]]
        return bool((sizes > (self.images.height, self.images.width)).any())


def drawn(
    images: ImageDataset | StreamingImages, count: int, *, random: bool = False, flip: bool = False
) -> DrawnImages:
    """Returns at most `count` images in a fixed random order.

    Args:
        images: the set.
        count: number of images, if the set has as many.
        random: cut each image at a random place of its own, as in training.
        flip: with `random`, mirror each image left to right with probability 1/2.

    Raises:
        ValueError: the images are streamed.
    """
    if not isinstance(images, ImageDataset):
        raise ValueError("streaming is set, but real images are drawn from the whole set; leave it out.")
    images = copy.copy(images)
    images.flip = flip
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return DrawnImages(images, order, random)
