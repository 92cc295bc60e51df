"""The options that say which images a run uses."""

from dataclasses import dataclass

from unet_diffusion.images.resizing import Preparation


@dataclass
class SourceOptions:
    """Where images are, and what is done to each before it is stored."""

    data: str
    """A folder of images, a file, glob or folder of Parquet, Arrow or WebDataset tar files, a `save_to_disk` folder,
    or the name of a data set on the Hugging Face Hub."""
    split: str = "train"
    """Split to use; "train" where the source has no splits."""
    image_column: str | None = None
    """Column of the images; by default `image`, or the only one of type Image."""
    image_size: int | None = None
    """Length of the shorter side in pixels, to which images are resized (Lanczos); by default they keep their
    size."""
    channels: int | None = None
    """1 or 3 converts between grey and colour, laying alpha on white; by default the images' own are kept."""
    max_broken: float = 0.01
    """Share of the images that may be unusable; they are named in warnings and left out."""
    cache_dir: str | None = None
    """Where downloads and decoded images are kept; by default the cache of `datasets`."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}; an image has at least 1 pixel a side.")
        if self.channels not in (None, 1, 3):
            raise ValueError(
                f"channels is {self.channels}; give 1 or 3 to convert, or nothing to keep the images' own."
            )
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken is {self.max_broken}; it is a share, from 0 to 1.")


@dataclass
class ImageOptions(SourceOptions):
    """What every kind of image set of a run has besides: what is held out, and the range of values."""

    validation_fraction: float = 0.0
    """Share of the images held out, at least one, if no validation set is named; 0: none."""
    validation_data: str | None = None
    """Validation set: a source like `data`, read at `validation_split` or else "train"."""
    validation_split: str | None = None
    """Validation set: a split of `validation_data`, or else of `data`."""
    value_range: tuple[float, float] | None = None
    """Stored values that become -1 and 1; by default the whole range of 8 or 16 bits. Float images need it, or
    percentiles."""
    percentiles: tuple[float, float] | None = None
    """Take these percentiles of each channel of the training images as the range, such as 0.1 and 99.9."""
    num_workers: int = 0
    """Processes that load batches ahead; stored images rarely need any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it is from 0 to below 1.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it is 0 or more.")
        if self.value_range is not None and self.percentiles is not None:
            raise ValueError("value_range and percentiles are both given; each sets the range, so give one.")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range is {self.value_range}; the first value must be below the second.")
        if self.percentiles is not None and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles are {self.percentiles}; they lie in 0 to 100, the lower one first.")

    @property
    def names_validation(self) -> bool:
        """Whether a validation set is named, rather than held out."""
        return self.validation_data is not None or self.validation_split is not None


@dataclass
class DataConfig(ImageOptions):
    """Which images, and what is done to them before they reach the network."""

    data: str = "mnist-5000"
    """"mnist-5000" (5,000 digits, extra `digits`), a folder of images, a file, glob or folder of Parquet, Arrow or
    WebDataset tar files, a `save_to_disk` folder, or the name of a data set on the Hugging Face Hub."""
    validation_fraction: float = 0.02
    """Share of the images held out, at least one, if no validation set is named and nothing is streamed; 0: none."""
    image_size: int | None = None
    """Images are resized (Lanczos) until the shorter side has so many pixels; by default they keep their size, which
    without crop_size must then be the same for all."""
    label_column: str | None = None
    """Column of the classes; by default `label`, or the only one of type ClassLabel."""
    crop_size: int | None = None
    """Train on squares of so many pixels a side, cut at another place in every epoch from images of any size; smaller
    ones are mirrored beyond their border. Validation images are cut in the middle, and so are all that are resized
    without crop_size."""
    flip: bool = False
    """Mirror half of the images left to right, drawn anew in every epoch."""
    max_images: int | None = None
    """Use the first so many images only."""
    streaming: bool = False
    """Read the images while training instead of decoding them into the cache once."""
    shuffle_buffer: int = 10_000
    """Images among which the next one is drawn while streaming."""
    num_workers: int = 0
    """Processes that load batches ahead; stored images rarely need any, streamed ones take at most 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_size is not None and self.crop_size < 1:
            raise ValueError(f"crop_size is {self.crop_size}; at least 1 is needed.")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images is {self.max_images}; at least 1 image is needed.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {self.shuffle_buffer}; it holds at least 1 image.")
        if self.streaming and self.num_workers > 1:
            raise ValueError(f"num_workers is {self.num_workers}; it is 0 or 1 while streaming.")
        if self.streaming and self.image_size is None and self.crop_size is None:
            raise ValueError(
                "image_size is not given; while streaming, images are resized as they come, so give it, or crop_size."
            )
        if self.streaming and self.percentiles is not None:
            raise ValueError("percentiles cannot be measured while streaming; give value_range.")

    @property
    def side(self) -> int | None:
        """Pixels a side of what the network learns from; None: images keep the size that they have in common."""
        return self.crop_size or self.image_size

    @property
    def preparation(self) -> Preparation:
        """What is done to every image before it is stored."""
        return Preparation(self.image_size, "center" if self.crop_size is None else "random", self.channels)
