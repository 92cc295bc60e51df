"""Stored images with masks as a torch data set, whose items depend on the seed, the epoch and the index alone."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unet_diffusion.data.cache import PixelFile, hexadecimal, in_order, written_once
from unet_diffusion.data.crops import crop_window
from unet_diffusion.data.masked.cache import MaskedCache
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.segmentation.instance_maps import (
    UNKNOWN,
    ObjectSizes,
    normalised_distance,
    object_areas,
    objects_of_mask,
)
from unet_diffusion.segmentation.instances import border_weight_map, separate_instances


class MaskedDataset(Dataset):
    """Images with masks, in their stored dtype and size.

    Args:
        cache: the decoded images and masks.
        rows: int64 (N,), the images that belong to this set.
        table: uint8 (256,), the class of each code of the cache.
        num_classes: number of classes, background included.
        pixel_range: maps the stored values to [-1, 1].
        name: of the source.
        crop_size: side of the square that `dataset[epoch, index]` cuts out at a random place; None: whole images.
        touching: the pixels of `touching_pixels` of all images of the cache, which become class 0, or None.
        weights: border weights of all images of the cache, or None.
        objects: the maps of `object_maps` of all images of the cache, or None.
        seed: of the run.

    Attributes:
        margin: number of pixels by which `dataset[epoch, index]` mirrors images beyond their border before cutting.
    """

    def __init__(
        self,
        cache: MaskedCache,
        rows: np.ndarray,
        table: np.ndarray,
        num_classes: int,
        pixel_range: PixelRange,
        *,
        name: str,
        crop_size: int | None = None,
        touching: PixelFile | None = None,
        weights: PixelFile | None = None,
        objects: PixelFile | None = None,
        seed: int = 0,
    ) -> None:
        self.cache = cache
        self.rows = rows
        self.table = table
        self.num_classes = num_classes
        self.pixel_range = pixel_range
        self.name = name
        self.crop_size = crop_size
        self.touching = touching
        self.weights = weights
        self.objects = objects
        self.seed = seed
        self.margin = 0
        self.channels = cache.images.channels
        self.height, self.width = (crop_size, crop_size) if crop_size else map(int, cache.sizes[rows[0]])
        content = cache.fingerprint.encode() + rows.tobytes() + table.tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self) -> list[str]:
        """Returns the content hash of each image, the same for equal images whatever their masks."""
        return self.cache.images.ids(self.rows)

    def contents(self) -> list[str]:
        """Returns what identifies an image for learning: its content hash and that of its mask."""
        return [f"{image} {mask}" for image, mask in zip(self.ids(), hexadecimal(self.cache.mask_digests[self.rows]))]

    def only(self, chosen: np.ndarray) -> "MaskedDataset":
        """Returns a set of only those images that are chosen, bool (N,)."""
        dataset = copy.copy(self)
        dataset.rows = self.rows[chosen]
        return dataset

    def mirrored(self, margin: int) -> "MaskedDataset":
        """Returns the same set with the margin of an unpadded network, so that the output reaches the border.

        Ronneberger et al. 2015 cut their tiles in this way. In the margin the mask is `IGNORE_INDEX`.
        """
        dataset = copy.copy(self)
        dataset.margin = margin
        return dataset

    def class_counts(self) -> Tensor:
        """Counts the pixels of each class in the masks of this set, int64 (num_classes,), leaving out ignored ones."""
        counts = np.zeros(256, dtype=np.int64)
        np.add.at(counts, self.table[: len(self.cache.keys)], self.cache.counts[self.rows].sum(axis=0))
        return torch.from_numpy(counts[: self.num_classes])

    def fetch(self, index: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Returns image `index` with its mask: whole without a generator, else a crop at a random place.

        An image smaller than the crop is mirrored beyond its border to the size of the crop. There the mask is
        `IGNORE_INDEX`, the weights are 0 and the objects `UNKNOWN`.

        Returns:
            `{"image": (C, H, W) of the stored dtype, "mask": int64 (H, W)}`, and `"weights"`, float32 (1, H, W), where
            there are border weights, and `"objects"`, float32 (2, H, W), where there are maps of objects.
        """
        row = self.rows[index]
        height, width = map(int, self.cache.sizes[row])
        window, padding = (slice(height), slice(width)), ((0, 0), (0, 0))
        if generator is not None:
            size = (self.crop_size, self.crop_size)
            window, padding = crop_window((height, width), size, generator, self.margin)
        image = self.cache.images.image(row)[(slice(None), *window)]
        mask = self.table[self.cache.codes[row][window]]
        if self.touching is not None:
            mask[self.touching[row][window] > 0] = 0
        item = {
            "image": torch.from_numpy(np.pad(image, ((0, 0), *padding), mode="reflect")),
            "mask": torch.from_numpy(np.pad(mask, padding, constant_values=IGNORE_INDEX)).to(torch.int64),
        }
        if self.weights is not None:
            item["weights"] = torch.from_numpy(np.pad(self.weights[row][window], padding))[None]
        if self.objects is not None:
            maps = self.objects[row][(slice(None), *window)]
            item["objects"] = torch.from_numpy(np.pad(maps, ((0, 0), *padding), constant_values=UNKNOWN))
        return item

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Returns item (epoch, index), which depends only on these and the seed; without epoch, the whole image."""
        if isinstance(key, tuple):
            epoch, index = key
            return self.fetch(index, keyed_generator(self.seed, "crop", epoch, index))
        if not -len(self) <= key < len(self):
            raise IndexError(f"index {key} of {len(self)} images")
        return self.fetch(key)


def touching_pixels(cache: MaskedCache, table: np.ndarray, cache_dir: str | Path | None) -> PixelFile:
    """Returns where objects touch others in all images of a cache, uint8 (H, W), 1 there; it is computed once.

    These are the pixels that `separate_instances` takes from the objects of `objects_of_mask`. Pixels that the masks
    ignore belong to no object. `table` gives the class of each code of the cache.
    """

    def touching(index: int) -> np.ndarray:
        objects = objects_of_mask(table[cache.codes[index]], cache.instances[index])
        return (separate_instances(objects) != objects).astype(np.uint8)

    key: list[Any] = ["touching", cache.fingerprint, table.tolist()]
    return PixelFile(_computed("touching", key, touching, cache, cache_dir), "uint8", cache.sizes)


def border_weights(
    cache: MaskedCache, table: np.ndarray, cache_dir: str | Path | None, separate: bool = True
) -> PixelFile:
    """Returns the border weights (`border_weight_map`) of all images of a cache; they are computed once.

    They separate the objects of the instance maps (`objects_of_mask`) or, without instance maps, the connected
    components of all pixels that are neither class 0 nor ignored. `table` gives the class of each code of the cache.
    With `separate`, the pixels where two objects touch are background (`touching_pixels`).
    """

    def weights(index: int) -> np.ndarray:
        classes = table[cache.codes[index]]
        if cache.has_instances:
            objects = objects_of_mask(classes, cache.instances[index])
            return border_weight_map(separate_instances(objects) if separate else objects)
        return border_weight_map((classes != 0) & (classes != IGNORE_INDEX))

    key: list[Any] = ["border weights", cache.fingerprint, table.tolist()]
    key += ["objects"] if cache.has_instances else []
    key += ["separate"] if cache.has_instances and separate else []
    return PixelFile(_computed("weights", key, weights, cache, cache_dir), "float32", cache.sizes)


def object_maps(cache: MaskedCache, table: np.ndarray, cache_dir: str | Path | None) -> PixelFile:
    """Returns the object maps of all images of a cache, float32 (2, H, W); they are computed once.

    The first map holds the numbers of the objects, the second their distances (`normalised_distance`). The objects come
    from the instance maps or, without these, from the class masks (`objects_of_mask`). `table` gives the class of each
    code of the cache.

    The maps are computed on whole images, so an object that a crop cuts keeps its own distances. They move with the
    masks in augmentation, and the boundaries are found afterwards.
    """

    def maps(index: int) -> np.ndarray:
        instances = cache.instances[index] if cache.has_instances else None
        objects = objects_of_mask(table[cache.codes[index]], instances)
        return np.stack([objects.astype(np.float32), normalised_distance(objects)])

    key: list[Any] = ["objects", cache.fingerprint, table.tolist()]
    return PixelFile(_computed("objects", key, maps, cache, cache_dir), "float32", cache.sizes, channels=2)


def object_sizes(objects: PixelFile, rows: np.ndarray) -> ObjectSizes:
    """Returns the sizes of the objects of some images.

    Raises:
        ValueError: there are none.
    """
    areas = np.concatenate([object_areas(objects[row][0].astype(np.int64)) for row in rows])
    if not len(areas):
        raise ValueError(
            "instances is True, but the training masks hold no object, which is a pixel of an instance map above 0 "
            "in a class above 0; give instance maps that fit the masks, or leave instances out."
        )
    return ObjectSizes.of(areas)


def _computed(
    name: str, key: list[Any], compute: Callable[[int], np.ndarray], cache: MaskedCache, cache_dir: str | Path | None
) -> Path:
    """Returns a file of the arrays that `compute` makes from each image of a cache; `key` holds what they depend on."""

    def write(folder: Path) -> None:
        with open(folder / f"{name}.bin", "wb") as file:
            for values in in_order(compute, range(len(cache))):
                file.write(np.ascontiguousarray(values).data)

    return written_once(name, key, cache_dir, write) / f"{name}.bin"
