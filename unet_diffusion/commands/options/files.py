"""The options that are shared by commands that work through image files."""

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
    """A run, and the image files to process with it."""

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
    """Precision of the network: "no" (float32), "bf16" or "fp16"; "auto" is bf16 where the device has it."""
    overwrite: bool = False
    """Replace files that the command has not made. Files that it has made are only made again if they have to
    change."""
    _found: Inputs | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        set_plain(self)
        single = isinstance(self.inputs, (str, Path))  # in Python; a string is not the sequence of its letters
        self.inputs = (str(self.inputs),) if single else tuple(map(str, self.inputs))
        if not self.inputs:
            raise ValueError("inputs is empty; give image files, folders or globs.")
        check_used(self)

    @abstractmethod
    def checked_inputs(self) -> Inputs:
        """Checks the run and the output, then returns the images."""

    def check_paths(self) -> None:
        """Raises the errors of `checked_inputs`."""
        self._found = self.checked_inputs()

    def take_inputs(self) -> Inputs:
        """Returns the images that `check_paths` has just found, since finding many takes seconds; else finds them."""
        found, self._found = self._found, None
        return found or self.checked_inputs()


def check_results(run: Path, pipeline: str, output: Path) -> None:
    """Raises a ValueError unless a pipeline of this class can load a run, and results may be written to a folder.

    The folder must not be among the images that the run was trained on.
    """
    check_run_for(run, pipeline)
    check_output(output)
    check_outside(output, *sources_of_run(run))
