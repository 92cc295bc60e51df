"""The images of a run: from its options to training and validation sets and their range of values.

The pieces are `open_source` (where images come from), `ImageCache` (decoded once), and `ImageDataset` or
`StreamingImages` (items).
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
from datasets import Dataset, IterableDataset

from unet_diffusion.checks import check_class_names
from unet_diffusion.data.cache import ImageCache, cache_images, check_same_kind
from unet_diffusion.data.config import DataConfig, ImageOptions, part_name
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.record import UNRECORDED, DataRecord
from unet_diffusion.data.shuffled_rows import BufferedRows, IndexedRows, RowsOfGroups
from unet_diffusion.data.sources import open_with_notes
from unet_diffusion.data.streaming import StreamingImages, first_usable
from unet_diffusion.data.tables import RowGroups
from unet_diffusion.images.decoding import LARGEST, DTypeName
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_permutation, keyed_seed
from unet_diffusion.unused_options import check_used

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0  # not the run's, so that runs of all seeds are validated on the same images
MOST_MEASURED = 2**24  # values of each channel, for percentiles
GOLDEN = (math.sqrt(5) - 1) / 2  # part of a step; its multiples are spread evenly between whole numbers
USUAL_BITS = (8, 12, 14)  # of cameras whose values are stored in 16
NARROW = 1 / 8  # share of the 16-bit range; below it, an error asks for the range


@dataclass(frozen=True)
class ImageSets:
    """Training images, and validation images if there are any; both have the same range, channels and classes."""

    train: ImageDataset | StreamingImages
    validation: ImageDataset | None


@dataclass(frozen=True)
class Part:
    """The undecoded rows to train on, or those of a named validation set.

    Attributes:
        rows: the rows.
        name: the name of the source and the split, for messages.
        notes: facts about the files, as sentences for the summary of the data.
        row_groups: the same rows as row groups, if they are streamed from local Parquet files.
        identity: as in `Source`.
    """

    rows: Dataset | IterableDataset
    name: str
    notes: tuple[str, ...] = ()
    row_groups: RowGroups | None = field(default=None, kw_only=True)
    identity: Callable[[], str] | None = field(default=None, kw_only=True)


def load_images(
    config: DataConfig,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    before: DataRecord | None = None,
) -> ImageSets:
    """Opens, decodes (unless the cache has them) and splits the images of a run.

    Args:
        config: names the images.
        seed: the seed of the run; it determines crops, mirroring and the order of a stream, but not which images are
            held out.
        process_index: this process, counted from 0; only a stream is divided among processes here.
        num_processes: number of processes.
        before: the data record of the run that is resumed, as in `hold_out`.

    Raises:
        ValueError: the source, a split or a column does not exist; too many images are broken, or none is usable;
            sizes differ and neither `crop_size` nor `image_size` is given; float images have no range; or the classes
            are not those that the run that is resumed has learnt.
        ImportError: the source needs a package that is not installed.
    """
    if config.streaming:
        sets = _stream_images(config, seed, process_index, num_processes)
        if before is not None:
            check_class_names(sets.train.class_names, before.class_names, sets.train.name)
        return sets
    cache, name = _cached(config, "train")
    if before is not None:
        check_class_names(cache.class_names, before.class_names, name)
    rows, held_out = hold_out(cache, config, before)
    pixel_range = find_range(config, cache, rows)
    size = _item_size(config, cache)
    train = ImageDataset(
        cache,
        rows,
        size,
        pixel_range,
        name=name,
        class_names=cache.class_names,
        random=config.flip or config.crop_size is not None,
        flip=config.flip,
        seed=seed,
    )
    if config.names_validation:
        return ImageSets(train, _named_validation(config, train))
    if not len(held_out):
        return ImageSets(train, None)
    validation = ImageDataset(cache, held_out, size, pixel_range, name=name, class_names=cache.class_names)
    return ImageSets(train, validation)


def open_part(config: DataConfig, part: Literal["train", "validation"], streaming: bool = False) -> Part:
    """Opens the undecoded rows to train on, or those of a named validation set."""
    source, split, most = config.data, config.split, config.max_images
    if part == "validation":
        source, split, most = config.validation_data or config.data, config.validation_split or "train", None
    opened = open_with_notes(
        source,
        split,
        image_column=config.image_column,
        label_column=config.label_column,
        group_column=None if part == "validation" else config.group_column,
        max_images=most,
        streaming=streaming,
        cache_dir=config.cache_dir,
    )
    rows, groups, notes = opened.rows, opened.row_groups, opened.notes
    if most is not None:
        rows = rows.select(range(min(most, len(rows)))) if isinstance(rows, Dataset) else rows.take(most)
        groups = None if groups is None else groups.first(most)
    if isinstance(rows, IterableDataset) and groups is None:
        notes += (f"streamed without an index: each image is drawn from a buffer of {config.shuffle_buffer} images",)
    return Part(rows, part_name(source, split), notes, row_groups=groups, identity=opened.identity)


def shuffled(part: Part, seed: int, shuffle_buffer: int) -> IndexedRows | RowsOfGroups | BufferedRows:
    """Returns the rows of a part in the order of streaming, by an index if there is one."""
    if isinstance(part.rows, Dataset):
        return IndexedRows(part.rows, part.name, seed)
    if part.row_groups is not None:
        return RowsOfGroups(part.rows, part.row_groups, part.name, seed, shuffle_buffer)
    return BufferedRows(part.rows, part.name, seed, shuffle_buffer)


def _cached(config: DataConfig, part: Literal["train", "validation"]) -> tuple[ImageCache, str]:
    opened = open_part(config, part)
    assert isinstance(opened.rows, Dataset)
    cache = cache_images(opened.rows, config.preparation, opened.name, config.max_broken, config.cache_dir)
    return cache, opened.name


def _item_size(config: DataConfig, cache: ImageCache) -> tuple[int, int]:
    if config.side is not None:
        return config.side, config.side
    height, width = cache.sizes[0]
    return int(height), int(width)


def hold_out(
    cache: ImageCache, config: ImageOptions, before: DataRecord | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to train on and those held out, each in ascending order.

    An image is held out if the hash of its content, as a number in [0, 1), is below `validation_fraction`. With groups,
    the hash of the group's name counts instead, and groups that share equal images count as one (`joined_groups`). So
    neither the names of files nor their order matter, equal images are on the same side, and adding an image moves no
    other, unless it joins two groups. At least the image or group with the lowest hash is held out, and at least the
    one with the highest is trained on, so in a small set an added image may take this place from another. If all images
    are equal, none is held out, with a warning.

    Args:
        cache: the images.
        config: holds the share to hold out.
        before: the record of the run that is resumed. Its images stay on their side, and images that it has learnt from
            in any way are not held out.

    Raises:
        ValueError: all images belong to one group, or all have been held out by the run that is resumed.
    """
    rows = np.arange(len(cache))
    if config.names_validation or config.validation_fraction == 0:
        return rows, rows[:0]
    ids = cache.ids(rows)
    names = joined_groups(cache.groups, ids) if cache.groups else ids
    places = {name: place_of(name) for name in names}
    if cache.groups and len(places) < len(set(cache.groups)):
        count = len(set(cache.groups)) - len(places)
        logger.warning("%d groups hold images of other groups too, and stay together with these", count)
    if before is UNRECORDED and len(places) > 1:
        before = _divided_by_place(ids, config.validation_fraction)
    learnt = set() if before is None else _names_of(before.learnt, ids, names)
    kept = set() if before is None else _names_of(before.held_out, ids, names) - learnt
    if kept == places.keys():
        raise ValueError(
            f"all {len(cache)} images of {config.data} that are left are held out by the run, so that none can be "
            "trained on; restore the others, or choose another output folder."
        )
    if len(places) == 1:
        if cache.groups:
            raise ValueError(only_one_group(config.group_column, cache.groups))
        images = (
            f"all {len(cache)} images of {config.data} are equal" if len(cache) > 1 else f"{config.data} has one image"
        )
        logger.warning("%s, so nothing is held out, and the last weights are saved", images)
        return rows, rows[:0]
    held_out = {name for name, place in places.items() if place < config.validation_fraction}
    held_out = (held_out | {min(places, key=places.__getitem__)}) - {max(places, key=places.__getitem__)}
    held_out = (held_out | kept) - learnt
    is_held_out = np.array([name in held_out for name in names])
    return rows[~is_held_out], rows[is_held_out]


def joined_groups(groups: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Returns a name for the group of each image; groups that share equal images, even by others, have one name.

    Args:
        groups: the name of each image's group.
        ids: the content hash of each image.

    Returns:
        The names: of joined groups, the first in alphabetical order.
    """
    above = {group: group for group in groups}  # of each group, one that it is joined to, or itself

    def name_of(group: str) -> str:
        while above[group] != group:
            above[group] = group = above[above[group]]
        return group

    first: dict[str, str] = {}  # the group of the first image of each content
    for image, group in zip(ids, groups):
        one, other = sorted([name_of(first.setdefault(image, group)), name_of(group)])
        above[other] = one
    return [name_of(group) for group in groups]


def only_one_group(column: str | None, groups: Sequence[str]) -> str:
    """Returns the error for images that all belong to one group, perhaps of several that share equal images."""
    several = f"together, since the {len(set(groups))} groups share equal images"
    belong = f"to the group {groups[0]!r}" if len(set(groups)) == 1 else several
    return (
        f"group_column is {column!r}, but all {len(groups)} usable images belong {belong}, so none can be held out; "
        "leave group_column out, or name a validation set."
    )


def place_of(name: str) -> float:
    """Returns the number in [0, 1) that decides whether an image or a group is held out: a hash of its name."""
    return keyed_seed(VALIDATION_SEED, "held out", name) / 2**63


def _divided_by_place(ids: list[str], fraction: float) -> DataRecord:
    """Returns the division of a run from before `data.json`, which depended on the places of images alone."""
    order = keyed_permutation(len(ids), VALIDATION_SEED, "validation").tolist()
    images, count = [ids[place] for place in order], max(1, round(fraction * len(ids)))
    return DataRecord(trained=tuple(images[:-count]), held_out=tuple(images[-count:]))


def _names_of(recorded: tuple[str, ...], ids: list[str], names: list[str]) -> set[str]:
    """Returns the names, such as groups, of images whose content hashes a run has recorded."""
    known = set(recorded)
    return {name for image, name in zip(ids, names) if image in known}


def rows_without(cache: ImageCache, others: ImageCache, rows: np.ndarray) -> np.ndarray:
    """Returns the rows of a cache whose images differ, in some pixel, from all images in `rows` of another cache."""
    held_out: dict[tuple[tuple[int, ...], bytes], list[np.ndarray]] = {}
    for image in map(others.image, rows):
        held_out.setdefault(_probe(image), []).append(image)
    return np.array(
        [
            row
            for row, image in enumerate(map(cache.image, range(len(cache))))
            if not any(np.array_equal(image, other) for other in held_out.get(_probe(image), ()))
        ],
        dtype=np.int64,
    )


def _probe(image: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    """Returns the shape and the middle row of an image, which are the same for equal images."""
    return image.shape, image[:, image.shape[1] // 2].tobytes()


def _named_validation(config: DataConfig, train: ImageDataset | StreamingImages) -> ImageDataset:
    cache, name = _cached(config, "validation")
    size = _item_size(config, cache)
    images = f"validation images of {name}"
    check_same_kind(images, cache, "the training images have", train.channels, train.pixel_range.dtype)
    unknown = sorted(set(cache.class_names or ()) - set(train.class_names or cache.class_names or ()))
    if unknown and len(cache.class_names or ()) > 1:  # the name of a single folder need not be a class
        raise ValueError(f"{images} have classes that are not trained on: {', '.join(unknown)}.")
    check_same_size(images, size, "the training images", (train.height, train.width))
    return ImageDataset(
        cache,
        np.arange(len(cache)),
        size,
        train.pixel_range,
        name=name,
        class_names=train.class_names,
        labels=labels_among(train.class_names, cache),
    )


def check_same_size(images: str, size: tuple[int, int], others: str, needed: tuple[int, int]) -> None:
    """Raises a ValueError unless two sizes (height, width) are equal."""
    if size != needed:
        raise ValueError(
            f"{images} have {size[1]}x{size[0]} pixels, but {others} have {needed[1]}x{needed[0]}; give crop_size to "
            "cut both, or image_size to resize them."
        )


def labels_among(names: tuple[str, ...] | None, cache: ImageCache) -> np.ndarray:
    """Returns a cache's labels as indices into other class names, int64 (N,); `NO_LABEL` for names not among them."""
    known = {name: index for index, name in enumerate(names or ())}
    table = np.array([known.get(name, NO_LABEL) for name in cache.class_names or ()] + [NO_LABEL])
    return table[cache.labels]  # NO_LABEL itself indexes the last entry


def find_range(config: ImageOptions, cache: ImageCache, rows: np.ndarray) -> PixelRange:
    """Returns the range that the config states, or else the whole range of the dtype.

    Images that each have their own range were stretched to that of their dtype when they were prepared.

    Raises:
        ValueError: no range is stated for float images, or for 16-bit images that use a small part of their range.
    """
    stated = config.value_range is not None or config.image_percentiles is not None
    if stated or (config.percentiles is None and cache.dtype == "uint8"):
        return _unmeasured_range(config, cache.dtype)
    if config.percentiles is not None:
        low, high = _percentiles(cache, rows, config.percentiles)
        return PixelRange(tuple(map(float, low)), tuple(map(float, high)), cache.dtype)
    least, most = math.inf, -math.inf
    for image in map(cache.image, rows):
        least, most = min(least, float(image.min())), max(most, float(image.max()))
        problem = unclear_range(config.data, cache.dtype, least, most)
        if problem is None:  # further images can only widen the range
            return _unmeasured_range(config, cache.dtype)
    raise ValueError(problem)


def unclear_range(name: str, dtype: str, least: float, most: float) -> str | None:
    """Returns the reason why images with values from `least` to `most` need a stated range; None if they need none."""
    if dtype == "float32":
        return (
            f"the images of {name} are floats from {least:g} to {most:g}, which have no natural range; give "
            "value_range, or percentiles such as 0.1 and 99.9."
        )
    if dtype == "uint16" and most - least < NARROW * LARGEST[dtype]:
        bits = next((bits for bits in USUAL_BITS if most < 2**bits), None)
        by_bits = "" if bits is None else f"value_range 0 {2**bits - 1} if the data have {bits} bits, "
        return (
            f"the 16-bit images of {name} use only {least:g} to {most:g} of 0 to 65535, so that the network would see "
            f"them nearly uniform. Give {by_bits}percentiles such as 0.1 and 99.9, or value_range 0 65535 to keep the "
            "whole range."
        )
    return None


def _unmeasured_range(config: ImageOptions, dtype: DTypeName) -> PixelRange:
    if config.image_percentiles is not None:
        return PixelRange.stretched(dtype, config.image_percentiles)
    if config.value_range is not None:
        low, high = config.value_range
        return PixelRange((float(low),), (float(high),), dtype)
    return PixelRange.full(dtype)


def _percentiles(
    cache: ImageCache, rows: np.ndarray, percentiles: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns two percentiles of each channel, (C,) each, the first below the second.

    If both are the same value, the smallest and the largest value take their place, as in `Stretch`. If the channel is
    constant, the second is 1 more, or for large floats enough more to differ in float32.
    """
    low, high = np.percentile(_measured_values(cache, rows), percentiles, axis=1)
    same = high <= low
    if same.any():
        channels = ", ".join(map(str, np.flatnonzero(same)))
        logger.warning(
            "the percentiles %g and %g of channel %s are equal; its smallest and largest values are used instead",
            *percentiles,
            channels,
        )
        least, most = (ends.astype(np.float64) for ends in _extremes(cache, rows))
        low, high = np.where(same, least, low), np.where(same, most, high)
        high = np.where(high <= low, low + np.maximum(1, abs(low) / 2**20), high)
    return low, high


def _extremes(cache: ImageCache, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest value of each channel in all rows, (C,) each."""
    ends = np.array([(image.min(axis=(1, 2)), image.max(axis=(1, 2))) for image in map(cache.image, rows)])
    return ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)


def _measured_values(cache: ImageCache, rows: np.ndarray) -> np.ndarray:
    """Returns values (C, n) that are spread evenly over all pixels of all rows; n is at most about `MOST_MEASURED`.

    All values are returned if there are not more. Otherwise the step is no whole number, since one that fits the width
    of the images would take the same columns of every row.
    """
    pixels = cache.sizes[rows].prod(axis=1)
    step = math.ceil(pixels.sum() / MOST_MEASURED)
    step += GOLDEN if step > 1 else 0
    starts = np.cumsum(pixels) - pixels
    parts = []
    for row, start, count in zip(rows, starts, pixels):
        places = np.arange(math.ceil(start / step), math.ceil((start + count) / step)) * step - start
        parts.append(cache.image(row).reshape(cache.channels, -1)[:, places.astype(np.int64).clip(0, count - 1)])
    return np.concatenate(parts, axis=1)


def _stream_images(config: DataConfig, seed: int, process_index: int, num_processes: int) -> ImageSets:
    part = open_part(config, "train", streaming=True)
    first = first_usable(part.rows, config.preparation, part.name)
    rows = shuffled(part, seed, config.shuffle_buffer)
    check_used(config, indexed=isinstance(rows, IndexedRows))
    if isinstance(rows, BufferedRows) and config.num_workers > 1:
        raise ValueError(
            f"num_workers is {config.num_workers}, but must be 0 or 1 for {part.name}, which has no index, so that "
            "every worker would read all of it; give 0 or 1."
        )
    number = None if isinstance(rows, BufferedRows) else len(rows)  # another number of rows gives another order
    files = config.data if part.identity is None else part.identity()
    key = json.dumps([files, config.split, config.max_images, config.preparation.to_dict(), number])
    assert config.side is not None
    train = StreamingImages(
        rows,
        config.preparation,
        (config.side, config.side),
        _unmeasured_range(config, cast(DTypeName, first.dtype.name)),
        channels=first.shape[2],
        name=part.name,
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        seed=seed,
        flip=config.flip,
        max_broken=config.max_broken,
        process_index=process_index,
        num_processes=num_processes,
    )
    return ImageSets(train, _named_validation(config, train) if config.names_validation else None)
