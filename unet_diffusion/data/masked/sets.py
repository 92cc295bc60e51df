"""The images and masks of a segmentation run: from its options to training and validation sets.

The pieces are `open_masked_source` (where they come from), `MaskedCache` (decoded once), `settled_encoding` (the
meaning of the masks' values) and `MaskedDataset` (items).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from unet_diffusion.data.cache import ImageCache, check_same_kind, present
from unet_diffusion.data.config import part_name
from unet_diffusion.data.folders import MOST_EXAMPLES
from unet_diffusion.data.masked.cache import MaskedCache, cache_masked
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions, Reading
from unet_diffusion.data.masked.dataset import (
    MaskedDataset,
    border_weights,
    object_maps,
    object_sizes,
    touching_pixels,
)
from unet_diffusion.data.masked.encoding import MaskEncoding, check_same_classes
from unet_diffusion.data.masked.meaning import (
    encoding_of_others,
    encoding_of_part,
    reading_of_others,
    settled_encoding,
)
from unet_diffusion.data.masked.questions import ask_about_shared_numbers
from unet_diffusion.data.masked.sources import open_masked_source
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import Part, find_range, hold_out
from unet_diffusion.images.masks import Colour, describe_keys
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.segmentation.instance_maps import ObjectSizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskedSets:
    """Training and validation images, and the meaning of their masks.

    Attributes:
        train: items (epoch, index) are crops, if a crop size is given.
        validation: items are whole and may differ in size; in their masks, touching instances are not separated. None
            if nothing is held out.
        num_classes: number of classes, background included.
        class_names: one name per class, or None.
        palette: red, green and blue of each class, or None if the masks do not state colours.
        pixel_range: maps stored values to [-1, 1].
        encoding: meaning of the values of the training masks.
        object_sizes: the sizes of the training objects, if instances are loaded.
        without_masks: number of images of the training source that have no mask or whose mask is beyond `max_labels`.
    """

    train: MaskedDataset
    validation: MaskedDataset | None
    num_classes: int
    class_names: tuple[str, ...] | None
    palette: tuple[Colour, ...] | None
    pixel_range: PixelRange
    encoding: MaskEncoding
    object_sizes: ObjectSizes | None = None
    without_masks: int = 0


@dataclass(frozen=True)
class MaskedPart(Part):
    """The undecoded rows to train on, or those of another labelled set.

    Attributes:
        orphans: masks without an image.
        class_names: the classes of masks with a file for each class, the background first; else empty.
        without_masks: number of images that are left out because they have no mask.
    """

    rows: Dataset
    orphans: tuple[Path, ...] = ()
    class_names: tuple[str, ...] = ()
    without_masks: int = 0


def load_masked(
    config: MaskedDataConfig,
    seed: int = 0,
    before: DataRecord | None = None,
    instances: bool = False,
    saved: MaskEncoding | None = None,
) -> MaskedSets:
    """Opens, decodes (unless the cache has them) and splits the images and masks of a run.

    The meaning of the masks' values and the number of classes are taken from all masks of `data`, whether they are
    trained on, held out or beyond `max_labels`. So they do not depend on that choice.

    Args:
        config: names the images.
        seed: the seed of the run; it determines the crops, but not which images are held out.
        before: the data record of the run that is resumed, as in `hold_out`. The classes must be those of the record.
        instances: whether the training items hold the maps of `object_maps`. If so, touching objects stay whole in the
            masks, since these maps tell them apart; otherwise background separates them.
        saved: the meaning of the masks' values, if it is known from training; by default it is found.

    Raises:
        ValueError: the source, a split or a column does not exist; too many rows are broken; sizes differ and there is
            no crop size; mask values have no class, or fewer than two classes occur; there are no objects;
            validation images have other channels, dtype or mask values; or the masks or their labelmap.txt state other
            classes than those that the run that is resumed has learnt.
        ImportError: a file needs a package that is not installed.
    """
    part = open_part(config, "train")
    config = with_class_names(config, part.class_names)
    reading = reading_of_others(config, saved)
    cache, name = _cached(config, part, reading, config.preparation)
    encoding = settled_encoding(config, cache.seen) if saved is None else saved
    encoding = encoding.noted(class_names=config.class_names)
    if before is not None and before.mask_encoding is not None:
        check_same_classes(encoding, MaskEncoding.from_dict(before.mask_encoding), name)
    table = _table(encoding, cache, name)
    rows, held_out = hold_out(cache.images, config, before)
    with_masks = len(rows)
    rows = first_labels(cache.images, rows, config.max_labels, before)
    without_masks = part.without_masks + with_masks - len(rows)
    if config.crop_size is None:
        _check_sizes(cache, rows)
    pixel_range = find_range(config, cache.images, rows)
    touching = touching_pixels(cache, table, config.cache_dir) if cache.has_instances and not instances else None
    objects = object_maps(cache, table, config.cache_dir) if instances else None
    train = MaskedDataset(
        cache,
        rows,
        table,
        encoding.num_classes,
        pixel_range,
        name=name,
        crop_size=config.crop_size,
        touching=touching,
        weights=border_weights(cache, table, config.cache_dir, not instances) if config.border_weights else None,
        objects=objects,
        seed=seed,
    )
    _check_classes(train)
    sizes = None if objects is None else object_sizes(objects, rows)
    if config.names_validation:
        cache, name = _cached(config, open_part(config, "validation"), reading, config.preparation)
        images = f"validation images of {name}"
        check_same_kind(images, cache.images, "the training images have", train.channels, pixel_range.dtype)
        table, held_out = _table(encoding_of_part(config, encoding, cache.seen), cache, name), np.arange(len(cache))
    validation = None
    if len(held_out):
        validation = MaskedDataset(cache, held_out, table, encoding.num_classes, pixel_range, name=name)
    meaning = (encoding.num_classes, encoding.class_names, encoding.palette, pixel_range, encoding)
    return MaskedSets(train, validation, *meaning, sizes, without_masks)


def first_labels(cache: ImageCache, rows: np.ndarray, most: int | None, before: DataRecord | None) -> np.ndarray:
    """Returns the rows, at most `most`, whose masks are learnt from: first those of the run that is resumed."""
    known = np.isin(cache.ids(rows), () if before is None else before.trained)
    return np.sort(np.concatenate([rows[known], rows[~known]])[:most])


def load_labelled(
    options: MaskedOptions,
    *,
    num_classes: int,
    channels: int,
    pixel_range: PixelRange,
    palette: Sequence[Sequence[int]] | None = None,
    saved: MaskEncoding | None = None,
    class_names: Sequence[str] | None = None,
) -> MaskedDataset:
    """Opens one whole set of images and masks, such as a test set, for a trained network.

    The meaning of the masks' values must not be found from this set. It may lack a class, and then later colours would
    be taken for other classes.

    Args:
        options: names the images.
        num_classes: classes of the network, background included.
        channels: number of channels that the network takes.
        pixel_range: maps stored values to the network's [-1, 1].
        palette: red, green and blue of each class of the network, for masks in colour without `mask_colours`.
        saved: encoding of the masks that the network was trained on, if its run has it. Masks are then read like those,
            unless the options state their meaning.
        class_names: the classes of the network, the background first, for masks with a file for each class.

    Raises:
        ValueError: the source, the split or a column does not exist; too many rows are broken; the images have other
            channels or another dtype; or the masks hold values without a class, label no pixel, or cannot be
            matched with the classes of the network.
        ImportError: a file needs a package that is not installed.
    """
    part = _open(options, options.data, options.split, options.masks, class_names)
    if len(part.class_names) not in (0, num_classes):
        raise ValueError(
            f"{part.name} has files of the classes {', '.join(part.class_names[1:])}, but the network has "
            f"{num_classes} classes without names; give masks with one file for each image."
        )
    preparation = replace(options.preparation, percentiles=pixel_range.percentiles)
    reading = reading_of_others(options, saved)
    cache, name = _cached(options, part, reading, preparation)
    if reading == "instances" and options.mask_encoding == "auto":
        ask_about_shared_numbers(cache.numbered, name)
    check_same_kind(f"images of {name}", cache.images, "the network takes", channels, pixel_range.dtype)
    encoding = encoding_of_others(options, cache.seen, num_classes, palette, saved, name)
    table = _table(encoding, cache, f"{name}, for a network of {num_classes} classes")
    dataset = MaskedDataset(cache, np.arange(len(cache)), table, num_classes, pixel_range, name=name)
    if not dataset.class_counts().any():
        raise ValueError(
            f"the masks of {name} label no pixel: all are {IGNORE_INDEX}, which is ignored; if that is a class, give "
            "mask_colours."
        )
    return dataset


def with_class_names(config: MaskedDataConfig, names: tuple[str, ...]) -> MaskedDataConfig:
    """Returns the options with the classes named by the files of masks, unless the user states classes.

    Raises:
        ValueError: `num_classes` is stated and is another number.
    """
    return config if not names or config.class_names is not None else replace(config, class_names=names)


def open_part(config: MaskedDataConfig, part: Literal["train", "validation"]) -> MaskedPart:
    """Opens the rows to train on, or those of a named validation set, by `open_masked_source`.

    With `max_labels`, rows without a mask are left out: they count as images without labels, like those beyond that
    number.
    """
    source, split, masks = config.data, config.split, config.masks
    if part == "validation":
        source, split = config.validation_data or config.data, config.validation_split or "train"
        masks = config.validation_masks or config.masks
    groups = config.group_column if part == "train" else None
    opened = _open(config, source, split, masks, config.class_names, groups)
    if part == "train" and config.max_labels is not None:
        masked = present(opened.rows, "mask")
        if 0 < len(masked) < len(opened.rows):
            without = len(opened.rows) - len(masked)
            return replace(opened, rows=opened.rows.select(masked), without_masks=without)
    return opened


def _open(
    options: MaskedOptions,
    source: str,
    split: str,
    masks: str | None,
    class_names: Sequence[str] | None,
    group_column: str | None = None,
) -> MaskedPart:
    opened = open_masked_source(
        source,
        split,
        image_column=options.image_column,
        mask_column=options.mask_column,
        instances_column=options.instances_column,
        masks=masks,
        mask_suffix=options.mask_suffix,
        mask_prefix=options.mask_prefix,
        image_suffix=options.image_suffix,
        masks_per_image=options.masks_per_image,
        class_files=None if class_names is None else class_names[1:],
        group_column=group_column,
        cache_dir=options.cache_dir,
    )
    return MaskedPart(opened.rows, part_name(source, split), opened.notes, opened.orphans, opened.class_names)


def _cached(
    config: MaskedOptions, opened: MaskedPart, reading: Reading, preparation: Preparation
) -> tuple[MaskedCache, str]:
    if opened.orphans:
        examples = ", ".join(path.name for path in opened.orphans[:MOST_EXAMPLES])
        logger.warning("%d masks of %s have no image: %s", len(opened.orphans), opened.name, examples)
    cache = cache_masked(
        opened.rows,
        preparation,
        opened.name,
        reading=reading,
        threshold=config.mask_threshold,
        max_broken=config.max_broken,
        cache_dir=config.cache_dir,
    )
    return cache, opened.name


def _table(encoding: MaskEncoding, cache: MaskedCache, name: str) -> np.ndarray:
    try:
        return encoding.table(cache.keys)
    except ValueError as error:
        unknown = [cache.keys.index(key) for key in encoding.unknown(cache.keys)]
        rows = cache.rows[cache.counts[:, unknown].any(axis=1)]
        examples = ", ".join(map(str, rows[:MOST_EXAMPLES]))
        raise ValueError(f"{name}: {error} Found in {len(rows)} of {len(cache)} masks: rows {examples}.") from error


def _check_sizes(cache: MaskedCache, rows: np.ndarray) -> None:
    different = rows[(cache.sizes[rows] != cache.sizes[rows[0]]).any(axis=1)]
    if len(different):
        (height, width), (other_height, other_width) = cache.sizes[rows[0]], cache.sizes[different[0]]
        raise ValueError(
            f"row {cache.rows[different[0]]} has {other_width}x{other_height} pixels, but row {cache.rows[rows[0]]} "
            f"has {width}x{height}; give crop_size to train on pieces of one size, or image_size to resize them."
        )


def _check_classes(train: MaskedDataset) -> None:
    """Raises a ValueError if the masks that are trained on hold fewer than two classes."""
    occurring = np.flatnonzero(train.class_counts().numpy())
    if len(occurring) > 1:
        return
    only = f"only class {occurring[0]}" if len(occurring) else "no class"
    keys = np.array(train.cache.keys)[train.cache.counts[train.rows].any(axis=0)].tolist()
    ignored = ""
    if IGNORE_INDEX in keys and train.table[train.cache.keys.index(IGNORE_INDEX)] == IGNORE_INDEX:
        ignored = " 255 was taken for pixels to ignore: if it means class 1, give mask_encoding='binary'."
    raise ValueError(
        f"the training masks of {train.name} hold {only} (values: {describe_keys(keys)}), so there is nothing to learn."
        f"{ignored}"
    )
