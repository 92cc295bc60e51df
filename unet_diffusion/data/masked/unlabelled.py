"""Images without masks, for tasks that learn from them beside images with masks."""

import logging
from dataclasses import replace

import numpy as np
from datasets import Dataset

from unet_diffusion.data.cache import ImageCache, cache_images, check_same_kind
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import MaskedSets, open_part
from unet_diffusion.data.sets import ImageSets, check_same_size, labels_among, rows_without
from unet_diffusion.data.sources import open_all_columns, open_with_notes

logger = logging.getLogger(__name__)

ALONE = "only those equal to held-out ones are left out of training"


def load_unlabelled(
    source: str | None,
    options: MaskedDataConfig,
    data: MaskedSets,
    label_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> ImageSets:
    """Opens images without masks, and reads them in the same way as those with masks.

    Args:
        source: the source of the images, whose split `train` is read; None takes all images of `data`, with or without
            masks.
        options: how the images with masks were read.
        data: the images with masks. Their validation images are also those of noise prediction. Images equal to these,
            wherever they come from, are not trained on, and neither are other images of their groups. A warning tells
            if the groups of `source` are not known.
        label_names: classes that the network can be conditioned on; other classes count as none.
        seed: the seed of the run; it determines the crops.

    Raises:
        ValueError: the source cannot be read; images have other channels, dtype or size; or all images are held out.
    """
    name = source
    if name is None:
        opened = open_part(replace(options, max_labels=None), "train")
        columns = [column for column in ("image", "group") if column in opened.rows.features]
        rows, name = opened.rows.select_columns(columns), opened.name
    else:
        rows = _opened(name, options)
    cache = cache_images(rows, options.preparation, name, options.max_broken, options.cache_dir)
    images, size = f"unlabelled images of {name}", (data.train.height, data.train.width)
    check_same_kind(images, cache, "those with masks have", data.train.channels, data.pixel_range.dtype)
    if options.crop_size is None:
        check_same_size(images, tuple(cache.sizes[0].tolist()), "those with masks", size)
    held_out = data.validation
    groups = data.train.cache.images.groups
    if cache.groups is not None and groups is not None and not set(cache.groups) & set(groups):
        logger.warning(
            "no group of %s, by group_column %r, is one of the images with masks; %s",
            images,
            options.group_column,
            ALONE,
        )
    usable = np.arange(len(cache))
    if held_out is not None:
        usable = rows_without(cache, held_out.cache.images, held_out.rows)
        usable = usable[_outside_groups(cache, held_out, usable)[usable]]
    if not len(usable):
        raise ValueError(f"all {len(cache)} unlabelled images of {name} are held out for validation; give others.")
    train = ImageDataset(
        cache,
        usable,
        size,
        data.pixel_range,
        name=name,
        class_names=label_names,
        labels=labels_among(label_names, cache)[usable],
        random=options.crop_size is not None,
        seed=seed,
    )
    if held_out is None:
        return ImageSets(train, None)
    return ImageSets(
        train, ImageDataset(held_out.cache.images, held_out.rows, size, data.pixel_range, name=held_out.name)
    )


def image_column_of(source: str, options: MaskedDataConfig) -> str | None:
    """Returns the image column that the options state, if a source without masks has it too; None finds its own."""
    if options.image_column is None:
        return None
    cache = None if options.cache_dir is None else str(options.cache_dir)
    features = open_all_columns(source, "train", False, cache).rows.features
    return options.image_column if options.image_column in (features or ()) else None


def _opened(source: str, options: MaskedDataConfig) -> Dataset:
    """Opens a source with its groups, if it has the column that names them."""
    image, cache = image_column_of(source, options), options.cache_dir
    try:
        group = options.group_column
        rows = open_with_notes(source, image_column=image, group_column=group, cache_dir=cache).rows
    except ValueError as error:
        if options.group_column is None:
            raise
        rows = open_with_notes(source, image_column=image, cache_dir=cache).rows
        logger.warning("the groups of unlabelled images of %s are not known; %s: %s", source, ALONE, error)
    assert isinstance(rows, Dataset)
    return rows


def _outside_groups(cache: ImageCache, held_out: MaskedDataset, usable: np.ndarray) -> np.ndarray:
    """Returns which images of a cache belong to no group that holds a held-out image, bool (N,).

    The rows besides `usable` are those of images that equal held-out ones.
    """
    groups = held_out.cache.images.groups
    if cache.groups is None or groups is None:
        return np.ones(len(cache), dtype=bool)
    equal = np.setdiff1d(np.arange(len(cache)), usable)
    return ~np.isin(cache.groups, [groups[row] for row in held_out.rows] + [cache.groups[row] for row in equal])
