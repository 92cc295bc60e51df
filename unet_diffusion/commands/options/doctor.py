"""The options of `unet-diffusion doctor`."""

from dataclasses import dataclass

from tyro.conf import Positional

from unet_diffusion.data.config import Data
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.unused_options import check_used


@dataclass
class Doctor(MaskedDataConfig):
    """Examine a data set before training, and report what is wrong with it."""

    data: Positional[Data]
    """A folder of images, a file, glob or folder of Parquet, Arrow or WebDataset tar files, a `save_to_disk` folder,
    or the name of a data set on the Hugging Face Hub."""
    plain: bool = False
    """Examine only the images; use this if they have no masks, or the masks do not matter."""
    label_column: str | None = None
    """Column of the classes, as for `train-ddpm`; "label" also declares that subfolders are classes. Only with
    `plain`."""
    errors_only: bool = False
    """Report only errors, without warnings and notes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_used(self)

    def check_paths(self) -> None:
        """Raises a ValueError for a data set that does not exist."""
        check_sources(self)
