"""The options that choose the images with masks of a run, and how masks are read and varied."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from unet_diffusion.checks import is_count, is_number, require, require_choice, require_each, set_plain
from unet_diffusion.data.config import Data, ImageOptions, InMemory, SourceOptions
from unet_diffusion.data.masked.encoding import check_encoding, parse_colours
from unet_diffusion.data.masked.labelmap import LabelMap, find_class_list, find_labelmap, find_other_table
from unet_diffusion.images.masks import Colour
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.unused_options import check_used

Reading: TypeAlias = Literal["values", "colours", "brightness", "instances"]  # of mask files
READINGS: dict[str, Reading] = {
    "auto": "values",
    "indices": "values",
    "binary": "brightness",
    "palette": "colours",
    "instances": "instances",
}
SEVERAL = {"one": None, "objects": "instances", "classes": "indices"}  # encoding of the files of an image, merged


@dataclass
class MaskedOptions(SourceOptions):
    """Where images with masks are, and how the masks are read."""

    mask_column: str | None = None
    """Column of the masks; by default `mask`, or else the only other one of type Image."""
    instances_column: str | None = None
    """Column of instance maps, 0 for the background. In training, instances that touch are separated by background,
    unless `instances` is set."""
    masks: Data | None = None
    """Folder of masks, named like their images except for the ending; `data` is then a folder of images."""
    mask_suffix: str | None = None
    """End of the names of masks, before the file ending, such as "_mask"; without `masks`, masks lie beside their
    images."""
    mask_prefix: str | None = None
    """Beginning of the names of masks, such as "mask_"."""
    image_suffix: str | None = None
    """End of the names of images, before the file ending, that their masks lack, such as "_0000" or "_img"."""
    masks_per_image: Literal["one", "objects", "classes"] = "one"
    """"one"; "objects" if an image has a file for each object (these become instances); "classes" if it has a file for
    each class, whose name is the part of the file's name beyond the image's. In these files, 0 is neither object nor
    class."""
    mask_encoding: str = "auto"
    """Meaning of mask values: "indices" of classes (255: ignored), "binary" (two classes, split at mask_threshold),
    "palette" (each colour or value is a class, black first), "instances" (0: background, above: class 1). "auto" takes
    colours for a palette, exactly 0 and 255 for binary, and anything else for indices; an error asks if several are
    likely."""
    mask_threshold: float | None = None
    """Pixels of a binary mask are class 1 from this value on; by default the higher of two values, or half of the
    largest (128 for 0 to 255). Colours count by their brightest channel."""
    mask_colours: dict[str, int] | None = None
    """Class of each colour, such as "#000000" 0 "#ff0000" 1; 255: ignored. By default the colours of a labelmap.txt
    (CVAT) or class_dict.csv beside the masks or images, or those found in the masks, or those that a trained run
    knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        part = "must be part of a name, such as '_mask'"
        affixes = ["mask_suffix", "mask_prefix", "image_suffix"]
        require_each(self, affixes, lambda affix: affix != "" and "/" not in affix, part)
        require_choice("masks_per_image", self.masks_per_image, tuple(SEVERAL))
        self.mask_encoding = self._encoding_of_several()
        above = "must be a value above 0"
        require_each(self, ["mask_threshold"], lambda value: is_number(value) and 0 < value < math.inf, above)
        check_used(self, masks_in_memory=isinstance(self.masks, InMemory))
        check_encoding(self.mask_encoding, self.colours, self.mask_threshold)

    def _encoding_of_several(self) -> str:
        """Returns the encoding that the masks have once the files of an image are merged into one."""
        merged = SEVERAL[self.masks_per_image]
        if merged is None or (self.mask_encoding in ("auto", merged) and self.mask_colours is None):
            return merged or self.mask_encoding
        given = "mask_colours are given" if self.mask_colours else f"mask_encoding is {self.mask_encoding!r}"
        raise ValueError(
            f"{given}, but masks_per_image is {self.masks_per_image!r}, whose merged files are {merged!r}; leave that "
            "out."
        )

    @property
    def colours(self) -> dict[Colour, int] | None:
        """Returns `mask_colours` as red, green and blue."""
        return None if self.mask_colours is None else parse_colours(self.mask_colours)

    @property
    def mask_reading(self) -> Reading:
        """Returns how mask files are read."""
        return READINGS["palette" if self.mask_colours is not None else self.mask_encoding]

    @property
    def preparation(self) -> Preparation:
        """Returns the conversion of every image and mask before they are stored; it cuts nothing off."""
        return Preparation(self.image_size, "random", self.channels, self.axes)


@dataclass
class MaskedDataConfig(MaskedOptions, ImageOptions):
    """The images with masks of a run, and how both are converted before they reach the network."""

    validation_fraction: float = 0.1
    """Approximate share of the images that is held out if no validation set is named; 0: none, and the last weights are
    saved. Each image's content decides whether it is held out, so equal images stay together and adding an image moves
    no other, except where a small set holds out one image only."""
    image_size: int | None = None
    """Length in pixels to which the shorter side of images is resized (Lanczos; masks by nearest neighbour); without
    crop_size images are also cut to the square in the middle. By default images keep their size, which must then be the
    same for all training images unless crop_size is given."""
    crop_size: int | None = None
    """Side in pixels of the squares to train on, cut at a new random place in every epoch. Smaller images are mirrored
    beyond their border, where the mask is ignored. Validation images stay whole."""
    validation_masks: Data | None = None
    """Folder of the masks of `validation_data`."""
    num_classes: int | None = None
    """Number of classes, background included; by default that of the training masks."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their indices; by default those of a labelmap.txt, class_dict.csv or
    _classes.csv, if there is one. For masks in colour give mask_colours too."""
    max_labels: int | None = None
    """Number of rows to train on: the first ones that are not held out. The other rows count as images without masks.
    By default all."""
    border_weights: bool = False
    """Weight the loss by the map of the 2015 paper, which stresses the background between neighbouring instances
    (connected components if there are no instance maps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, ["crop_size", "max_labels"], is_count, "must be at least 1")
        possible = f"must be from 2 to {IGNORE_INDEX}, background included"
        require_each(self, ["num_classes"], lambda count: is_count(count, 2) and count <= IGNORE_INDEX, possible)
        if self.class_names is not None and self.num_classes not in (None, len(self.class_names)):
            raise ValueError(
                f"class_names has {len(self.class_names)} entries, but num_classes is {self.num_classes}; give one "
                "name per class."
            )
        several = "must name at least 2 classes, the background first"
        require_each(self, ["class_names"], lambda names: len(names) >= 2, several)
        if (self.validation_masks is not None) != (self.masks is not None and self.validation_data is not None):
            raise ValueError(
                f"validation_masks is {self.validation_masks!r}, but must be given if, and only if, masks and "
                "validation_data are: each names a folder of its own."
            )

    @property
    def labelmap(self) -> LabelMap | None:
        """Returns the labels from a file beside the masks, unless other options state the meaning of masks."""
        return find_labelmap(self.data, self.masks, self.split) if self._leaves_colours_open else None

    @property
    def other_table(self) -> Path | None:
        """Returns a class_dict.csv beside the masks that is not used because of its columns, or None."""
        return find_other_table(self.data, self.masks, self.split) if self._leaves_colours_open else None

    @property
    def _leaves_colours_open(self) -> bool:
        return self.mask_colours is None and self.mask_encoding in ("auto", "palette")

    @property
    def class_list(self) -> tuple[Path, tuple[str, ...]] | None:
        """Returns the names of class indices from a file beside the masks, unless the user states classes."""
        if self.known_classes is not None or self.mask_colours is not None:
            return None
        return find_class_list(self.data, self.masks, self.split) if self.mask_encoding in ("auto", "indices") else None

    @property
    def mask_reading(self) -> Reading:
        """Returns how mask files are read; colours count wherever a labelmap.txt names them."""
        return super().mask_reading if self.labelmap is None else "colours"

    @property
    def known_classes(self) -> int | None:
        """Returns the number of classes, if the user states it or their names."""
        return self.num_classes if self.class_names is None else len(self.class_names)

    @property
    def preparation(self) -> Preparation:
        """Returns the conversion of every image and mask before they are stored."""
        crop: Literal["center", "random"] = "center" if self.crop_size is None else "random"
        return Preparation(self.image_size, crop, self.channels, self.axes, self.image_percentiles)


ELASTIC = 10.0  # pixels (Ronneberger et al. 2015, section 3.1)
ELASTIC_SHARE = 1 / 8  # largest default deviation, as a share of the grid's spacing


@dataclass(frozen=True)
class AugmentationConfig:
    """Which variations are drawn for each sample, and how far they go; 0, False or (1, 1) switches a part off."""

    elastic: float | None = None
    """Standard deviation of the displacements in pixels. None: 10, as in the paper, or an eighth of the grid's spacing
    if that is less, so that small crops do not fold."""
    elastic_grid: int = 3  # displacement vectors per side of the image
    flip: bool = True  # mirror left-right and top-bottom, each in half of the samples
    rotate90: bool = True  # turn by 0, 90, 180 or 270 degrees; images that are not square by 0 or 180
    rotation: float = 15.0  # largest free rotation to either side, in degrees
    scale: tuple[float, float] = (0.8, 1.25)  # smallest and largest magnification, log-uniform
    brightness: float = 0.1  # largest shift, as a fraction of the value range
    contrast: float = 0.2  # largest change about the image's mean: factor between 1 / 1.2 and 1.2, log-uniform
    gamma: float = 0.2  # largest change of the exponent: between 1 / 1.2 and 1.2, log-uniform
    noise: float = 0.02  # largest standard deviation of Gaussian noise, as a fraction of the value range
    invert: float = 0.0  # share of the samples in which dark and bright are exchanged, for objects that occur as both
    colour: float = 0.0  # how far channels vary independently, for colours that a few masks do not show; 0.3 is strong

    def __post_init__(self) -> None:
        """Checks every value."""
        set_plain(self)
        strengths = ("elastic", "rotation", "brightness", "contrast", "gamma", "noise", "colour")
        require_each(self, strengths, lambda value: is_number(value) and value >= 0, "must be 0 (off) or positive")
        grid = is_count(self.elastic_grid, 2)
        require(grid, "elastic_grid", self.elastic_grid, "must be at least 2; the paper's is 3")
        share = is_number(self.invert) and 0 <= self.invert <= 1
        require(share, "invert", self.invert, "must be a share of the samples, from 0 (off) to 1")
        low, high = self.scale
        ordered = is_number(low) and is_number(high) and 0 < low <= high
        require(ordered, "scale", self.scale, "must be (smallest, largest) with 0 < smallest <= largest")
        check_used(self)

    def elastic_pixels(self, height: int, width: int) -> float:
        """Returns the standard deviation of the displacements, in pixels, in images of a size.

        With the default, none of 1,000 crops folded at 64, 128 and 256 pixels a side with grids of 2, 3 and 5 vectors a
        side. At a sixth of the spacing, up to 4 % folded, and at 10 pixels in a crop of 64, 46 %.
        """
        if self.elastic is not None:
            return self.elastic
        spacing = (min(height, width) - 1) / (self.elastic_grid - 1)
        return min(ELASTIC, ELASTIC_SHARE * spacing)
