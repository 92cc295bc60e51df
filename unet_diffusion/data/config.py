"""The options that choose the images of a run."""

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from unet_diffusion.checks import (
    PERCENTILES,
    are_percentiles,
    is_count,
    is_number,
    require,
    require_choice,
    require_each,
    set_plain,
)
from unet_diffusion.images.axes import AXIS_ORDERS, AxisOrder
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.unused_options import check_used

if TYPE_CHECKING:
    Data: TypeAlias = Any
else:
    Data = str  # on the command line
"""A name or path; in Python also a `datasets.Dataset`, a list of PIL images, arrays or paths, or one array (N, H, W) or
(N, H, W, C). Options keep it as text; for images in memory, the text is an `InMemory`."""
IN_MEMORY = " in memory (fingerprint "  # in the name of such images
SOURCES = ("data", "validation_data", "masks", "validation_masks")  # options of this type

Options = TypeVar("Options", bound="SourceOptions")


class InMemory(str):
    """A source whose images are in memory. Its text tells how many and which, so it can be compared and saved as JSON.

    Args:
        text: such as "12 images in memory (fingerprint ab12...)", equal for equal images.
        rows: a `datasets.Dataset` with a column `image` of undecoded images, or the data set that was given.
    """

    rows: Any

    def __new__(cls, text: str, rows: Any) -> "InMemory":
        """Makes a text with rows."""
        source = super().__new__(cls, text)
        source.rows = rows
        return source

    def __deepcopy__(self, memo: Any) -> "InMemory":
        return self  # neither the text nor the rows are ever changed

    def __reduce__(self) -> Any:
        return InMemory, (str(self), self.rows)


def part_name(source: str, split: str) -> str:
    """Returns the name of a split of a source, for messages."""
    return source if isinstance(source, InMemory) else f"{source} ({split})"


@dataclass
class SourceOptions:
    """Where images are, and how each is converted before it is stored."""

    data: Data
    """A folder of images, a file, glob or folder of Parquet, Arrow or WebDataset tar files, a `save_to_disk` folder,
    or the name of a data set on the Hugging Face Hub."""
    split: str = "train"
    """Split to use; "train" if the source has no splits."""
    image_column: str | None = None
    """Column of the images; by default `image`, or else the only one of type Image."""
    image_size: int | None = None
    """Length in pixels to which the shorter side of images is resized (Lanczos); by default images keep their size."""
    channels: int | None = None
    """1 or 3 converts between grey and colour, with alpha laid on white; by default images keep their channels.
    Commands that use the run convert their images in the same way."""
    axes: AxisOrder | None = None
    """Order of the axes of `.npy` files and arrays, and of TIFF files that do not name their axes: "HWC" (rows,
    columns, channels) or "CHW". By default a short last axis is the channels; if the order is unclear, an error asks
    for it."""
    max_broken: float = 0.01
    """Share of the images that may be unusable; these are named in warnings and left out."""
    cache_dir: str | None = None
    """Where downloads and decoded images are kept; by default the cache of `datasets`."""

    def __post_init__(self) -> None:
        for name in SOURCES:
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, str):
                from unet_diffusion.data.memory import as_source  # here, since it imports slow libraries

                setattr(self, name, as_source(value, name, self.axes))
        set_plain(self)
        self.cache_dir = None if self.cache_dir is None else os.path.expanduser(self.cache_dir)
        require_each(self, ["image_size"], is_count, "must be at least 1 pixel")
        require_each(self, ["channels"], lambda channels: channels in (1, 3), "must be 1 or 3, or not given")
        require_each(self, ["axes"], lambda axes: axes in AXIS_ORDERS, "must be 'HWC' or 'CHW', or not given")
        share = is_number(self.max_broken) and 0 <= self.max_broken <= 1
        require(share, "max_broken", self.max_broken, "must be a share from 0 to 1")

    def converted_like(self: Options, preparation: Preparation) -> Options:
        """Returns these options with the channels and the axes of a preparation, unless they state their own."""
        return replace(self, channels=self.channels or preparation.channels, axes=self.axes or preparation.axes)


@dataclass
class ImageOptions(SourceOptions):
    """Options of every image set of a run: what is held out for validation, and the range of values."""

    validation_fraction: float = 0.0
    """Approximate share of the images that is held out if no validation set is named; 0: none. Each image's content
    decides whether it is held out, so equal images stay together and adding an image moves no other, except where a
    small set holds out one image only."""
    group_column: str | None = None
    """Column of patients, slides or videos, whose images stay together when some are held out; "folder" groups the
    images of a folder by their folder. Groups that share equal images stay together too. The share is then about that
    of the groups."""
    validation_data: Data | None = None
    """Validation set: a source like `data`, from which `validation_split` is read, or else "train"."""
    validation_split: str | None = None
    """Validation set: a split of `validation_data`, or else of `data`."""
    value_range: tuple[float, float] | None = None
    """Stored values that become -1 and 1; by default the whole range of 8 or 16 bits. Float images need this or
    percentiles, and so do 16-bit images that use a small part of their range."""
    percentiles: tuple[float, float] | None = None
    """Percentiles of each channel that become -1 and 1, such as 0.1 and 99.9."""
    percentiles_of: Literal["training", "image"] = "training"
    """"training" measures the percentiles once, on about 16 million values of each channel at most, spread evenly over
    all training images. "image" measures them on every image by itself, also on later ones; use it for images whose
    brightness differs. If both percentiles are equal, the smallest and the largest value take their place."""
    num_workers: int = 0
    """Processes that load batches ahead; stored images rarely need any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction = is_number(self.validation_fraction) and 0 <= self.validation_fraction < 1
        require(fraction, "validation_fraction", self.validation_fraction, "must be from 0 to below 1")
        require(is_count(self.num_workers, 0), "num_workers", self.num_workers, "must be 0 or more")
        if self.value_range is not None and self.percentiles is not None:
            raise ValueError("value_range and percentiles are both given; each sets the range, so give one.")
        require_each(self, ["value_range"], lambda ends: ends[0] < ends[1], "the first value must be below the second")
        require_each(self, ["percentiles"], are_percentiles, PERCENTILES)
        if self.percentiles is not None:
            self.percentiles = (float(self.percentiles[0]), float(self.percentiles[1]))
            rule = "must be percent, such as 1 and 99.8, not shares of 1"
            require(self.percentiles[1] > 1, "percentiles", self.percentiles, rule)
        require_choice("percentiles_of", self.percentiles_of, ("training", "image"))

    @property
    def image_percentiles(self) -> tuple[float, float] | None:
        """Returns the percentiles of an image that become -1 and 1, if every image has its own range; else None."""
        return self.percentiles if self.percentiles_of == "image" else None

    @property
    def names_validation(self) -> bool:
        """Returns whether a validation set is named, rather than held out."""
        return self.validation_data is not None or self.validation_split is not None

    @property
    def holds_out(self) -> bool:
        """Returns whether there will be validation images, unless all images are equal."""
        return self.names_validation or self.validation_fraction > 0


@dataclass
class DataConfig(ImageOptions):
    """The images of a run, and how they are converted before they reach the network."""

    data: Data = "mnist-5000"
    """"mnist-5000" (5,000 digits, extra `digits`), a folder of images, a file, glob or folder of Parquet, Arrow or
    WebDataset tar files, a `save_to_disk` folder, or the name of a data set on the Hugging Face Hub."""
    validation_fraction: float = 0.02
    """Approximate share of the images that is held out if no validation set is named and nothing is streamed; 0: none.
    Each image's content decides whether it is held out, so equal images stay together and adding an image moves no
    other, except where a small set holds out one image only."""
    image_size: int | None = None
    """Length in pixels to which the shorter side of images is resized (Lanczos). By default images keep their size,
    which must then be the same for all unless crop_size is given."""
    label_column: str | None = None
    """Column of the classes; by default `label`, else the only one of type ClassLabel, else `cls`, else `json.label`.
    Integers and strings are the names of their classes. "label" also declares that subfolders are classes."""
    crop_size: int | None = None
    """Side in pixels of the squares to train on, cut at a new random place in every epoch from images of any size.
    Smaller images are mirrored beyond their border. Validation images are cut in the middle, and so are all images
    that are resized without crop_size."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2, drawn again in every epoch."""
    max_images: int | None = None
    """Number of images to use, from the first on; by default all."""
    streaming: bool = False
    """Read the images while training, instead of decoding them once into the cache."""
    shuffle_buffer: int = 10_000
    """Number of images that are shuffled at a time while streaming from Parquet files, tar files or the Hub. Folders of
    images and Arrow files are shuffled as a whole."""
    num_workers: int = 0
    """Processes that load batches ahead; stored images rarely need any. Streaming from tar files and the Hub allows at
    most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, ["crop_size", "max_images", "shuffle_buffer"], is_count, "must be at least 1")
        if self.streaming and self.image_size is None and self.crop_size is None:
            raise ValueError(
                "image_size is not given, but streamed images are resized as they come; give image_size or crop_size."
            )
        if self.streaming and self.percentiles is not None and self.percentiles_of == "training":
            raise ValueError(
                "percentiles of the training images cannot be measured while streaming; give value_range, or set "
                "percentiles_of to 'image'."
            )
        check_used(self)

    @property
    def holds_out(self) -> bool:
        """Returns whether there will be validation images, unless all are equal; none are held out from a stream."""
        return self.names_validation or (super().holds_out and not self.streaming)

    @property
    def side(self) -> int | None:
        """Returns the side in pixels of training images; None: they keep the size that they all have."""
        return self.crop_size or self.image_size

    @property
    def preparation(self) -> Preparation:
        """Returns the conversion of every image before it is stored."""
        crop: Literal["center", "random"] = "center" if self.crop_size is None else "random"
        return Preparation(self.image_size, crop, self.channels, self.axes, self.image_percentiles)
