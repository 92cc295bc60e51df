"""Examination of a data set before training, whose findings are sentences."""

from dataclasses import dataclass, fields

from tyro.conf import Positional

from unet_diffusion.commands.doctor.findings import Report
from unet_diffusion.data.config import DataConfig, ImageOptions
from unet_diffusion.data.masked.config import MaskedDataConfig


@dataclass
class Doctor(MaskedDataConfig):
    """Examine a data set before training, and report what is wrong with it."""

    data: Positional[str]
    """A folder of images, a file, glob or folder of Parquet, Arrow or WebDataset tar files, a `save_to_disk` folder,
    or the name of a data set on the Hugging Face Hub."""
    plain: bool = False
    """Examine the images alone; they have no masks, or the masks do not matter."""
    errors_only: bool = False
    """Report errors only, without warnings and notes."""


def doctor(options: Doctor) -> Report:
    """Examines the data set that the options name.

    Raises:
        ValueError: there is no such source, split or column.
    """
    from unet_diffusion.commands.doctor.examination import examine  # here, since it takes seconds to import

    config: ImageOptions = options
    if options.plain:
        shared = {field.name: getattr(options, field.name) for field in fields(ImageOptions)}
        config = DataConfig(**shared, crop_size=options.crop_size, max_images=options.max_labels)
    return examine(config, options.errors_only)
