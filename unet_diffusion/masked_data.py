"""The pictures and masks of a segmentation run: from what a user names to training and validation sets.

The pieces are `open_masked_source` (where they come from), `MaskedCache` (decoded once), `find_encoding` (what the
masks' values mean) and `MaskedDataset` (items); `GlobalBatches` orders them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset

from unet_diffusion.data import find_range, hold_out
from unet_diffusion.data_config import PictureOptions
from unet_diffusion.mask_encoding import MaskEncoding, check_encoding, find_encoding, parse_colours
from unet_diffusion.masked_cache import MaskedCache, cache_masked
from unet_diffusion.masked_dataset import MaskedDataset, border_weights
from unet_diffusion.masked_sources import open_masked_source
from unet_diffusion.masks import Colour
from unet_diffusion.pixels import PixelRange
from unet_diffusion.resizing import Preparation
from unet_diffusion.segmentation import IGNORE_INDEX

__all__ = ["MaskedDataConfig", "MaskedDataset", "MaskedSets", "load_masked"]

logger = logging.getLogger(__name__)

SHOWN = 5  # rows or files named one by one


@dataclass
class MaskedDataConfig(PictureOptions):
    """Which pictures with masks, and what is done to both before they reach the network."""

    validation_fraction: float = 0.1
    """Share of the pictures held out, at least one, if no validation set is named."""
    image_size: int | None = None
    """Pictures are resized (Lanczos; masks by nearest neighbour) until the shorter side has so many pixels, and without
    crop_size cut to the square in the middle; by default they keep their size, which without crop_size must then be the
    same for all that are trained on."""
    crop_size: int | None = None
    """Train on squares of so many pixels a side, cut at another place in every epoch; smaller pictures are mirrored
    beyond their border, which is then ignored. Validation pictures stay whole."""
    mask_column: str | None = None
    """Column of the masks; by default `mask`, or the only other one of type Image."""
    instances_column: str | None = None
    """Column of instance maps (0: background); where two touch, training masks get background between them."""
    masks: str | None = None
    """Folder of masks, named like their pictures but for the ending; `data` is then a folder of pictures."""
    mask_suffix: str | None = None
    """What the names of masks have in addition before the ending, such as "_mask"; without `masks`, they lie beside
    their pictures."""
    validation_masks: str | None = None
    """Folder of the masks of `validation_data`."""
    mask_encoding: str = "auto"
    """What mask values mean: "indices" of classes (255: ignored), "binary" (two values), "palette" (each colour or
    value a class, black first), "instances" (0: background, above: class 1). "auto" takes colours for a palette,
    exactly 0 and 255 for binary, and the rest for indices."""
    mask_colours: dict[str, int] | None = None
    """Class of each colour, such as "#000000" 0 "#ff0000" 1; 255 ignores. By default the colours that are found."""
    num_classes: int | None = None
    """Classes, background included; by default as many as the training masks show."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their indices."""
    max_labels: int | None = None
    """Train on the first so many rows only, as if the others had no masks."""
    border_weights: bool = False
    """Give the weight map of the 2015 paper with each training picture, which presses for the background between
    neighbouring instances (connected components where there are no instance maps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names_validation and self.validation_fraction == 0:
            raise ValueError(
                "there is nothing to validate on, and the best weights are chosen by validation; give "
                "validation_split, validation_data, or a validation_fraction above 0."
            )
        for name in ("crop_size", "max_labels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed.")
        if self.num_classes is not None and not 2 <= self.num_classes <= IGNORE_INDEX:
            raise ValueError(f"num_classes is {self.num_classes}; it is from 2 to {IGNORE_INDEX}, background included.")
        if self.class_names is not None:
            if self.num_classes not in (None, len(self.class_names)):
                raise ValueError(
                    f"class_names has {len(self.class_names)} entries, but num_classes is {self.num_classes}; give one "
                    "name each."
                )
            if len(self.class_names) < 2:
                raise ValueError(f"class_names are {self.class_names}; name 2 classes or more, the background first.")
        if self.mask_suffix == "" or (self.mask_suffix is not None and "/" in self.mask_suffix):
            raise ValueError(f"mask_suffix is {self.mask_suffix!r}; it is a part of a name, such as '_mask'.")
        if self.mask_encoding == "instances" and self.instances_column is not None:
            raise ValueError(
                "mask_encoding is 'instances', so that the masks are the instance maps; leave out instances_column."
            )
        if (self.validation_masks is not None) != (self.masks is not None and self.validation_data is not None):
            raise ValueError(
                f"validation_masks is {self.validation_masks}; it is given if, and only if, masks and validation_data "
                "are: each names a folder of its own."
            )
        check_encoding(self.mask_encoding, self.colours)

    @property
    def colours(self) -> dict[Colour, int] | None:
        """`mask_colours` as red, green and blue."""
        return None if self.mask_colours is None else parse_colours(self.mask_colours)

    @property
    def mask_reading(self) -> str:
        """How mask files are read: `mask_encoding`, or "palette" where colours are given."""
        return self.mask_encoding if self.mask_colours is None else "palette"

    @property
    def known_classes(self) -> int | None:
        """The number of classes, where the user states it or their names."""
        return self.num_classes if self.class_names is None else len(self.class_names)

    @property
    def preparation(self) -> Preparation:
        """What is done to every picture and mask before they are stored."""
        return Preparation(self.image_size, "center" if self.crop_size is None else "random", self.channels)


@dataclass(frozen=True)
class MaskedSets:
    """The pictures to train on and those to validate on, and what their masks mean.

    Attributes:
        train: items (epoch, index) are crops, if a crop size is given.
        validation: items come whole, may differ in size, and are masked as the source says: instances that touch are
            not separated.
        num_classes: the background included.
        class_names: one each, or None.
        palette: red, green and blue of each class, or None where the masks do not say.
        pixel_range: what maps stored values to [-1, 1].
    """

    train: MaskedDataset
    validation: MaskedDataset
    num_classes: int
    class_names: tuple[str, ...] | None
    palette: tuple[Colour, ...] | None
    pixel_range: PixelRange


def load_masked(config: MaskedDataConfig, seed: int = 0) -> MaskedSets:
    """Opens, decodes (or finds decoded) and splits the pictures and masks of a run.

    What the masks' values mean, and how many classes there are, is taken from the training masks alone, the first
    `max_labels` rows; with few of them, state `num_classes`.

    Args:
        config: which pictures.
        seed: of the run; it sets the crops, not what is held out.

    Raises:
        ValueError: if the source, a split or a column does not exist; if too many rows are broken; if sizes differ and
            there is no crop size; if mask values are no class, or fewer than two classes occur; if validation pictures
            have other channels, dtype or mask values.
        ImportError: if a file needs a package that is not installed.
    """
    cache, name = _cached(config, "train")
    encoding = find_encoding(
        cache.keys,
        config.mask_encoding,
        num_classes=config.known_classes,
        colours=config.colours,
        palette=cache.palette,
    )
    table = _table(encoding, cache, name)
    rows, held_out = hold_out(len(cache), config)
    if config.crop_size is None:
        _check_sizes(cache, rows)
    pixel_range = find_range(config, cache.pictures, rows)
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
        cache, name = _cached(config, "validation")
        _check_agreement(cache, train, name)
        table, held_out = _table(encoding, cache, name), np.arange(len(cache))
    validation = MaskedDataset(cache, held_out, table, encoding.num_classes, pixel_range, name=name)
    return MaskedSets(train, validation, encoding.num_classes, config.class_names, encoding.palette, pixel_range)


def open_part(config: MaskedDataConfig, part: Literal["train", "validation"]) -> tuple[Dataset, list[Path], str]:
    """The rows to train on, or those of a validation set that is named.

    Returns:
        The undecoded rows, masks without a picture, both as `open_masked_source` gives them, and a name for messages.
    """
    source, split, masks = config.data, config.split, config.masks
    if part == "validation":
        source, split = config.validation_data or config.data, config.validation_split or "train"
        masks = config.validation_masks or config.masks
    dataset, orphans = open_masked_source(
        source,
        split,
        image_column=config.image_column,
        mask_column=config.mask_column,
        instances_column=config.instances_column,
        masks=masks,
        mask_suffix=config.mask_suffix,
        cache_dir=config.cache_dir,
    )
    if part == "train" and config.max_labels is not None and config.max_labels < len(dataset):
        dataset = dataset.select(range(config.max_labels))
    return dataset, orphans, f"{source} ({split})"


def _cached(config: MaskedDataConfig, part: Literal["train", "validation"]) -> tuple[MaskedCache, str]:
    dataset, orphans, name = open_part(config, part)
    if orphans:
        logger.warning(
            "%d masks of %s have no picture: %s", len(orphans), name, ", ".join(path.name for path in orphans[:SHOWN])
        )
    cache = cache_masked(
        dataset,
        config.preparation,
        name,
        encoding=config.mask_reading,
        max_broken=config.max_broken,
        cache_dir=config.cache_dir,
    )
    return cache, name


def _table(encoding: MaskEncoding, cache: MaskedCache, name: str) -> np.ndarray:
    try:
        return encoding.table(cache.keys)
    except ValueError as error:
        unknown = [position for position, key in enumerate(cache.keys) if key not in encoding.classes]
        rows = cache.rows[cache.counts[:, unknown].any(axis=1)]
        raise ValueError(
            f"{name}: {error} Found in {len(rows)} of {len(cache)} masks: rows {', '.join(map(str, rows[:SHOWN]))}."
        ) from error


def _check_sizes(cache: MaskedCache, rows: np.ndarray) -> None:
    different = rows[(cache.sizes[rows] != cache.sizes[rows[0]]).any(axis=1)]
    if len(different):
        (height, width), (other_height, other_width) = cache.sizes[rows[0]], cache.sizes[different[0]]
        raise ValueError(
            f"row {cache.rows[different[0]]} has {other_width}x{other_height} pixels, row {cache.rows[rows[0]]} "
            f"{width}x{height}; give crop_size to train on pieces of one size, or image_size to resize them."
        )


def _check_classes(train: MaskedDataset) -> None:
    occurring = np.flatnonzero(train.class_counts().numpy())
    if len(occurring) > 1:
        return
    only = f"no class but {occurring[0]}" if len(occurring) else "no class at all"
    ignored = ""
    if IGNORE_INDEX in train.cache.keys and train.table[train.cache.keys.index(IGNORE_INDEX)] == IGNORE_INDEX:
        ignored = " 255 was taken for pixels to ignore: if it means class 1, give mask_encoding='binary'."
    raise ValueError(f"the training masks of {train.name} hold {only}, so that there is nothing to learn.{ignored}")


def _check_agreement(cache: MaskedCache, train: MaskedDataset, name: str) -> None:
    found, expected = (cache.pictures.channels, cache.pictures.dtype), (train.channels, train.pixel_range.dtype)
    if found != expected:
        raise ValueError(
            f"validation pictures of {name} have {found[0]} channels of {found[1]}, "
            f"those to train on {expected[0]} of {expected[1]}; they must agree."
        )
