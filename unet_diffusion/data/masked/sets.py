"""The images and masks of a segmentation run: from its options to training and validation sets.

The pieces are `open_masked_source` (where they come from), `MaskedCache` (decoded once), `find_encoding` (what the
masks' values mean) and `MaskedDataset` (items).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from unet_diffusion.data.cache import check_same_kind, present
from unet_diffusion.data.folders import MOST_EXAMPLES
from unet_diffusion.data.masked.cache import MaskedCache, cache_masked
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset, border_weights
from unet_diffusion.data.masked.encoding import MaskEncoding, find_encoding
from unet_diffusion.data.masked.sources import open_masked_source
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import find_range, hold_out
from unet_diffusion.images.masks import COLOURED, Colour
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.pixel_range import PixelRange

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskedSets:
    """Training and validation images, and what their masks mean.

    Attributes:
        train: items (epoch, index) are crops, if a crop size is given.
        validation: items are whole and may differ in size; in their masks, touching instances are not separated. None
            if nothing is held out.
        num_classes: number of classes, background included.
        class_names: one name per class, or None.
        palette: red, green and blue of each class, or None if the masks do not say.
        pixel_range: maps stored values to [-1, 1].
    """

    train: MaskedDataset
    validation: MaskedDataset | None
    num_classes: int
    class_names: tuple[str, ...] | None
    palette: tuple[Colour, ...] | None
    pixel_range: PixelRange


@dataclass(frozen=True)
class MaskedPart:
    """The undecoded rows to train on, or those of another labelled set.

    Attributes:
        rows: the rows.
        name: of the source and the split, for messages.
        notes: what was understood about the files, as sentences for the summary of the data.
        orphans: masks without an image.
    """

    rows: Dataset
    name: str
    notes: tuple[str, ...] = ()
    orphans: tuple[Path, ...] = ()


def load_masked(config: MaskedDataConfig, seed: int = 0, before: DataRecord | None = None) -> MaskedSets:
    """Opens, decodes (unless the cache has them) and splits the images and masks of a run.

    The meaning of the masks' values and the number of classes are taken from all masks of `data`, whether they are
    trained on, held out or beyond `max_labels`, so that they do not depend on that choice.

    Args:
        config: names the images.
        seed: of the run; it sets the crops, but not what is held out.
        before: what the run that is resumed knew about its data; as in `hold_out`.

    Raises:
        ValueError: the source, a split or a column does not exist; too many rows are broken; sizes differ and there is
            no crop size; mask values have no class, or fewer than two classes occur; or validation images have
            other channels, dtype or mask values.
        ImportError: a file needs a package that is not installed.
    """
    cache, name = _cached(config, open_part(config, "train"))
    encoding = find_encoding(
        cache.keys,
        config.mask_encoding,
        num_classes=config.known_classes,
        colours=config.colours,
        palette=cache.palette,
    )
    table = _table(encoding, cache, name)
    rows, held_out = hold_out(cache.images, config, before)
    rows = rows[: config.max_labels]
    if config.crop_size is None:
        _check_sizes(cache, rows)
    pixel_range = find_range(config, cache.images, rows)
    train = MaskedDataset(
        cache,
        rows,
        table,
        encoding.num_classes,
        pixel_range,
        name=name,
        crop_size=config.crop_size,
        separate=cache.has_instances,
        weights=border_weights(cache, table, config.cache_dir) if config.border_weights else None,
        seed=seed,
    )
    _check_classes(train)
    if config.names_validation:
        cache, name = _cached(config, open_part(config, "validation"))
        images = f"validation images of {name}"
        check_same_kind(images, cache.images, "the training images have", train.channels, pixel_range.dtype)
        table, held_out = _table(encoding, cache, name), np.arange(len(cache))
    validation = None
    if len(held_out):
        validation = MaskedDataset(cache, held_out, table, encoding.num_classes, pixel_range, name=name)
    return MaskedSets(train, validation, encoding.num_classes, config.class_names, encoding.palette, pixel_range)


def load_labelled(
    options: MaskedOptions,
    *,
    num_classes: int,
    channels: int,
    pixel_range: PixelRange,
    palette: Sequence[Sequence[int]] | None = None,
) -> MaskedDataset:
    """Opens one whole set of images and masks, such as a test set, for a trained network.

    The meaning of the masks' values must not be found from this set: it may lack a class, and the colours after that
    class would be taken for others.

    Args:
        options: names the images.
        num_classes: classes of the network, background included.
        channels: number of channels that the network takes.
        pixel_range: maps stored values to the network's [-1, 1].
        palette: red, green and blue of each class of the network, for masks in colour without `mask_colours`.

    Raises:
        ValueError: the source, the split or a column does not exist; too many rows are broken; the images have other
            channels or another dtype; or the masks hold values without a class, label no pixel, or cannot be
            matched with the classes of the network.
        ImportError: a file needs a package that is not installed.
    """
    cache, name = _cached(options, _open(options, options.data, options.split, options.masks))
    check_same_kind(f"images of {name}", cache.images, "the network takes", channels, pixel_range.dtype)
    encoding = _encoding_for(options, cache, num_classes, palette, name)
    table = _table(encoding, cache, f"{name}, for a network of {num_classes} classes")
    dataset = MaskedDataset(cache, np.arange(len(cache)), table, num_classes, pixel_range, name=name)
    if not dataset.class_counts().any():
        raise ValueError(
            f"the masks of {name} label no pixel: all are {IGNORE_INDEX}, which is ignored; if that is a class, give "
            "mask_colours."
        )
    return dataset


def _encoding_for(
    options: MaskedOptions,
    cache: MaskedCache,
    num_classes: int,
    palette: Sequence[Sequence[int]] | None,
    name: str,
) -> MaskEncoding:
    """Finds what the masks mean as classes of a network; raises a ValueError if only its training masks could tell."""
    encoding, colours = options.mask_encoding, options.colours
    if colours is None:
        auto = encoding == "auto"
        if encoding == "palette" or (auto and max(cache.keys) >= COLOURED):
            if palette is None:
                raise ValueError(f"the masks of {name} are colours, and the run knows none; give mask_colours.")
            # of equal colours the first was found in training; the others only fill in for missing ones
            colours = {(red, green, blue): label for label, (red, green, blue) in reversed([*enumerate(palette)])}
        elif num_classes > 2 and (encoding in ("binary", "instances") or (auto and sorted(cache.keys) == [0, 255])):
            raise ValueError(
                f"the masks of {name} have one class beside the background, but the network has {num_classes} classes; "
                "give masks of all of them, or mask_encoding='indices' if 255 marks pixels to ignore."
            )
    return find_encoding(cache.keys, encoding, num_classes=num_classes, colours=colours, palette=cache.palette)


def open_part(config: MaskedDataConfig, part: Literal["train", "validation"]) -> MaskedPart:
    """Opens the rows to train on, or those of a named validation set, by `open_masked_source`.

    With `max_labels`, rows without a mask are left out: they are images without labels, as those beyond that number.
    """
    source, split, masks = config.data, config.split, config.masks
    if part == "validation":
        source, split = config.validation_data or config.data, config.validation_split or "train"
        masks = config.validation_masks or config.masks
    opened = _open(config, source, split, masks, config.group_column if part == "train" else None)
    if part == "train" and config.max_labels is not None:
        masked = present(opened.rows, "mask")
        if 0 < len(masked) < len(opened.rows):
            return replace(opened, rows=opened.rows.select(masked))
    return opened


def _open(
    options: MaskedOptions, source: str, split: str, masks: str | None, group_column: str | None = None
) -> MaskedPart:
    opened = open_masked_source(
        source,
        split,
        image_column=options.image_column,
        mask_column=options.mask_column,
        instances_column=options.instances_column,
        masks=masks,
        mask_suffix=options.mask_suffix,
        group_column=group_column,
        cache_dir=options.cache_dir,
    )
    return MaskedPart(opened.rows, f"{source} ({split})", opened.notes, opened.orphans)


def _cached(config: MaskedOptions, opened: MaskedPart) -> tuple[MaskedCache, str]:
    if opened.orphans:
        examples = ", ".join(path.name for path in opened.orphans[:MOST_EXAMPLES])
        logger.warning("%d masks of %s have no image: %s", len(opened.orphans), opened.name, examples)
    cache = cache_masked(
        opened.rows,
        config.preparation,
        opened.name,
        encoding=config.mask_reading,
        max_broken=config.max_broken,
        cache_dir=config.cache_dir,
    )
    return cache, opened.name


def _table(encoding: MaskEncoding, cache: MaskedCache, name: str) -> np.ndarray:
    try:
        return encoding.table(cache.keys)
    except ValueError as error:
        unknown = [position for position, key in enumerate(cache.keys) if key not in encoding.classes]
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
    occurring = np.flatnonzero(train.class_counts().numpy())
    if len(occurring) > 1:
        return
    only = f"only class {occurring[0]}" if len(occurring) else "no class"
    ignored = ""
    if IGNORE_INDEX in train.cache.keys and train.table[train.cache.keys.index(IGNORE_INDEX)] == IGNORE_INDEX:
        ignored = " 255 was taken for pixels to ignore: if it means class 1, give mask_encoding='binary'."
    raise ValueError(f"the training masks of {train.name} hold {only}, so there is nothing to learn.{ignored}")
