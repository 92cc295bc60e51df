"""The images of a run: from what a user names to training and validation sets and their range of values.

The pieces are `open_source` (where images come from), `ImageCache` (decoded once), `ImageDataset` or
`StreamingImages` (items) and `GlobalBatches` (their order).
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset

from unet_diffusion.data.cache import ImageCache, cache_images
from unet_diffusion.data.config import DataConfig, ImageOptions
from unet_diffusion.data.dataset import ImageDataset, to_batch
from unet_diffusion.data.sources import open_source
from unet_diffusion.data.streaming import StreamingImages, first_usable
from unet_diffusion.images.decoding import DTypeName, PixelRange
from unet_diffusion.images.labels import NO_LABEL
from unet_diffusion.randomness import keyed_permutation

__all__ = [
    "DataConfig",
    "ImageDataset",
    "ImageSets",
    "StreamingImages",
    "load_images",
    "to_batch",
]

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0  # not the run's, so that runs of other seeds are validated on the same images
MEASURED_VALUES = 2**24  # of each channel at most, for percentiles
NARROW = 1 / 8  # share of the 16-bit range below which a warning asks whether the data have 12 bits


@dataclass(frozen=True)
class ImageSets:
    """The images to train on and those to validate on, if any; both have the same range, channels and classes."""

    train: ImageDataset | StreamingImages
    validation: ImageDataset | None


def load_images(config: DataConfig, seed: int = 0, process_index: int = 0, num_processes: int = 1) -> ImageSets:
    """Opens, decodes (or finds decoded) and splits the images of a run.

    Args:
        config: which images.
        seed: of the run; it sets cuts, mirroring and the order of a stream, not what is held out.
        process_index: this process, counted from 0; only a stream is divided here.
        num_processes: number of processes.

    Raises:
        ValueError: if the source, a split or a column does not exist; if too many images are broken or none is
            usable; if sizes differ and neither `crop_size` nor `image_size` is given; if float images come without a
            range.
        ImportError: if the source needs a package that is not installed.
    """
    if config.streaming:
        return _stream_images(config, seed, process_index, num_processes)
    cache = _cached(config, config.data, config.split, config.max_images)
    rows, held_out = hold_out(len(cache), config)
    pixel_range = find_range(config, cache, rows)
    name = _name(config.data, config.split)
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


def _cached(config: DataConfig, source: str, split: str, max_images: int | None) -> ImageCache:
    dataset = open_rows(config, source, split, streaming=False)
    assert isinstance(dataset, Dataset)
    if max_images is not None and max_images < len(dataset):
        dataset = dataset.select(range(max_images))
    return cache_images(dataset, config.preparation, _name(source, split), config.max_broken, config.cache_dir)


def open_rows(config: DataConfig, source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """The undecoded rows of one split, as `open_source` gives them."""
    return open_source(
        source,
        split,
        image_column=config.image_column,
        label_column=config.label_column,
        streaming=streaming,
        cache_dir=config.cache_dir,
    )


def _name(source: str, split: str) -> str:
    return f"{source} ({split})"


def _item_size(config: DataConfig, cache: ImageCache) -> tuple[int, int]:
    if config.side is not None:
        return config.side, config.side
    height, width = cache.sizes[0]
    return int(height), int(width)


def hold_out(length: int, config: ImageOptions) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those held out, each in ascending order."""
    if config.names_validation or config.validation_fraction == 0:
        return np.arange(length), np.arange(0)
    held_out = max(1, round(config.validation_fraction * length))
    if held_out >= length:
        raise ValueError(
            f"{config.data} has {length} usable images, and validation_fraction={config.validation_fraction} holds "
            f"out {held_out}, so that none is left to train on; lower it, or set it to 0."
        )
    order = keyed_permutation(length, VALIDATION_SEED, "validation").numpy()
    return np.sort(order[:-held_out]), np.sort(order[-held_out:])


def rows_without(cache: ImageCache, others: ImageCache, rows: np.ndarray) -> np.ndarray:
    """The rows of a cache whose images are, pixel by pixel, none of those that `rows` of another cache name."""
    held_out: dict[Any, list[np.ndarray]] = {}
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
    """What equal images have in common, from few of their pixels: their size and middle rows."""
    return image.shape, image[:, image.shape[1] // 2].tobytes()


def _named_validation(config: DataConfig, train: ImageDataset | StreamingImages) -> ImageDataset:
    source, split = config.validation_data or config.data, config.validation_split or "train"
    cache = _cached(config, source, split, max_images=None)
    size = _item_size(config, cache)
    found, expected = (cache.channels, cache.dtype), (train.channels, train.pixel_range.dtype)
    if found != expected:
        raise ValueError(
            f"validation images of {source} have {found[0]} channels of {found[1]}, "
            f"those to train on {expected[0]} of {expected[1]}; they must agree."
        )
    unknown = sorted(set(cache.class_names or ()) - set(train.class_names or cache.class_names or ()))
    if unknown:
        raise ValueError(f"validation images of {source} have classes not trained on: {', '.join(unknown)}.")
    if size != (train.height, train.width):
        raise ValueError(
            f"validation images of {source} have {size[1]}x{size[0]} pixels, those to train on "
            f"{train.width}x{train.height}; give crop_size to cut both, or image_size to resize them."
        )
    return ImageDataset(
        cache,
        np.arange(len(cache)),
        size,
        train.pixel_range,
        name=_name(source, split),
        class_names=train.class_names,
        labels=labels_among(train.class_names, cache),
    )


def labels_among(names: tuple[str, ...] | None, cache: ImageCache) -> np.ndarray:
    """The cache's labels as indices into other class names, int64 (N,); `NO_LABEL` where a class is not among them."""
    known = {name: index for index, name in enumerate(names or ())}
    table = np.array([known.get(name, NO_LABEL) for name in cache.class_names or ()] + [NO_LABEL])
    return table[cache.labels]  # NO_LABEL itself takes the last entry


def find_range(config: ImageOptions, cache: ImageCache, rows: np.ndarray) -> PixelRange:
    """What maps the stored values to [-1, 1]: as the config says, or else the whole range of the dtype.

    Raises:
        ValueError: for float images without a range.
    """
    if config.percentiles is None and (config.value_range is not None or cache.dtype == "uint8"):
        return _unmeasured_range(config, cache.dtype)
    values = _measured_values(cache, rows)
    least, most = float(values.min()), float(values.max())
    if config.percentiles is not None:
        low, high = np.percentile(values, config.percentiles, axis=1)
        return PixelRange(tuple(map(float, low)), tuple(map(float, high)), cache.dtype)
    if cache.dtype == "float32":
        raise ValueError(
            f"the images of {config.data} are floats from {least:g} to {most:g}, which have no natural range; "
            "give value_range, or percentiles such as 0.1 and 99.9."
        )
    pixel_range = _unmeasured_range(config, cache.dtype)
    if most - least < NARROW * (pixel_range.high[0] - pixel_range.low[0]):
        logger.warning(
            "the 16-bit images of %s use only %d to %d of 0 to 65535; for 12-bit data give value_range 0 4095, or "
            "give percentiles, or the network sees them nearly uniform",
            config.data,
            least,
            most,
        )
    return pixel_range


def _unmeasured_range(config: ImageOptions, dtype: DTypeName) -> PixelRange:
    if config.value_range is not None:
        low, high = config.value_range
        return PixelRange((float(low),), (float(high),), dtype)
    return PixelRange.full(dtype)


def _measured_values(cache: ImageCache, rows: np.ndarray) -> np.ndarray:
    """Values (C, n) of evenly spaced images, so many that a channel has about `MEASURED_VALUES` at most."""
    step = math.ceil(cache.sizes[rows].prod(axis=1).sum() / MEASURED_VALUES)
    return np.concatenate([cache.image(row).reshape(cache.channels, -1) for row in rows[::step]], axis=1)


def _stream_images(config: DataConfig, seed: int, process_index: int, num_processes: int) -> ImageSets:
    dataset = open_rows(config, config.data, config.split, streaming=True)
    assert isinstance(dataset, IterableDataset)
    if config.max_images is not None:
        dataset = dataset.take(config.max_images)
    name = _name(config.data, config.split)
    first = first_usable(dataset, config.preparation, name)
    key = json.dumps([config.data, config.split, config.max_images, asdict(config.preparation)])
    assert config.side is not None
    train = StreamingImages(
        dataset,
        config.preparation,
        (config.side, config.side),
        _unmeasured_range(config, cast(DTypeName, first.dtype.name)),
        channels=first.shape[2],
        name=name,
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        seed=seed,
        flip=config.flip,
        shuffle_buffer=config.shuffle_buffer,
        max_broken=config.max_broken,
        process_index=process_index,
        num_processes=num_processes,
    )
    return ImageSets(train, _named_validation(config, train) if config.names_validation else None)
