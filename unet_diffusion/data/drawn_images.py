"""Images of a set in a random order, read in parts, for comparison with other images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.streaming import StreamingImages


@dataclass(frozen=True, eq=False)
class DrawnImages:
    """Images that are read only when a part of them is asked for: `images[10:20]` is float32 (10, C, H, W) in [-1, 1].

    Attributes:
        images: the set.
        order: int64 (N,), the images of the set that were drawn.
    """

    images: ImageDataset
    order: Tensor

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        stored = [self.images[index]["image"] for index in self.order[part].tolist()]
        return self.images.pixel_range.to_model(torch.stack(stored))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Returns the number of images, their channels, height and width."""
        return len(self), self.images.channels, self.images.height, self.images.width

    def first(self, count: int) -> "DrawnImages":
        """Returns only the first images."""
        return DrawnImages(self.images, self.order[:count])


def drawn(images: ImageDataset | StreamingImages, count: int) -> DrawnImages:
    """Returns at most `count` images in a fixed random order."""
    if not isinstance(images, ImageDataset):
        raise ValueError("streaming is set, but real images are drawn from the whole set; leave it out.")
    return DrawnImages(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])
