"""The options that commands share which work through image files."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.checks import set_plain
from unet_diffusion.commands.inputs import Inputs
from unet_diffusion.data.folders import check_outside, sources_of_run
from unet_diffusion.files import check_output
from unet_diffusion.network.config import Precision
from unet_diffusion.saved_index import check_run_for
from unet_diffusion.unused_options import check_used


@dataclass
class FileOptions(ABC):
    """A run, and the image files that it works through."""

    run: Path
    """Folder of the run."""
    inputs: tuple[str, ...] = ()
    """Image files, folders (with their subfolders, but without files that look like masks of others) and globs."""
    output: Path | None = None
    """Folder for the results."""
    tile_size: int | None = None
    """Output pixels a side of a tile of large images; by default a tile takes about 64 MiB."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    mixed_precision: Precision = "auto"
    """"no" (float32), "bf16" or "fp16", in which the network computes; "auto" is bf16 where the device has it."""
    overwrite: bool = False
    """Replace files that the command has not made; what it has made is only made again if it has to change."""
    _found: Inputs | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_plain(self)
        if isinstance(self.inputs, (str, Path)):  # in Python; a string is not the sequence of its letters
            self.inputs = (str(self.inputs),)
        if not self.inputs:
            raise ValueError("inputs is empty; give image files, folders or globs.")
        check_used(self)

    @abstractmethod
    def checked_inputs(self) -> Inputs:
        """Returns the images, after the run and the output are checked."""

    def check_paths(self) -> None:
        """Raises the errors of `checked_inputs`."""
        self._found = self.checked_inputs()

    def take_inputs(self) -> Inputs:
        """Returns the images that `check_paths` has just found, since to find many takes seconds, or finds them."""
        found, self._found = self._found, None
        return found or self.checked_inputs()


def check_results(run: Path, pipeline: str, output: Path) -> None:
    """Raises a ValueError unless a pipeline of this class may load a run, and its results may be written to a folder.

    The folder must not be among the images that the run was trained on.
    """
    check_run_for(run, pipeline)
    check_output(output)
    check_outside(output, *sources_of_run(run))
