"""The options that commands share which work through image files."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.commands.inputs import Inputs


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
    overwrite: bool = False
    """Replace files that are already there."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs is empty; give image files, folders or globs.")

    @abstractmethod
    def checked_inputs(self) -> Inputs:
        """Returns the images, after the run and the output are checked."""

    def check_paths(self) -> None:
        """Raises the errors of `checked_inputs`."""
        self.checked_inputs()
