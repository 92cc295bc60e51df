"""The options of `unet-diffusion sample`."""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.commands.options.files import check_results
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.record import Record
from unet_diffusion.files import check_absent

GRID = "grid.png"


@dataclass
class Sample(GenerationOptions):
    """Generate images with a trained run. Image i depends only on the seed and i, up to rounding."""

    output: Path | None = None
    """Folder for the images; by default `samples` in the run's folder."""
    overwrite: bool = False
    """Replace files that the command has not made. Files that it has made are only made again if they have to
    change."""

    @property
    def folder(self) -> Path:
        """The folder for the images."""
        return self.output or self.run / "samples"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, or an output that cannot be written or holds images."""
        check_results(self.run, "ImageGenerationPipeline", self.folder)
        made = Record(self.folder, "sample").made
        found = [*sorted(self.folder.glob("[0-9]*.*")), self.folder / GRID]
        check_absent(*(file for file in found if file.name not in made), overwrite=self.overwrite)
