"""The options of `unet-diffusion segment`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from unet_diffusion.checks import is_number, require, require_choice
from unet_diffusion.commands.inputs import Inputs, find_inputs
from unet_diffusion.commands.options.files import FileOptions, check_results
from unet_diffusion.commands.record import record_path
from unet_diffusion.files import check_absent

Unit: TypeAlias = Literal["pixel", "micrometre"]

TABLE = "areas.csv"
OBJECT_TABLES = ("objects.csv", "objects.parquet", "counts.csv")


@dataclass
class Segment(FileOptions):
    """Segment image files with a trained run. A file that fails is reported; the others are segmented."""

    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    output: Path | None = None
    """Folder for the masks; by default `masks` in the run's folder."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    timesteps: tuple[int, ...] = ()
    """Timesteps at which noise is added, with the masks averaged; by default the clean image is segmented."""
    num_draws: int = 1
    """Noisy versions per timestep."""
    opacity: float = 0.5
    """Opacity of the colours in the overlays, from 0 to 1."""
    overlays: bool = True
    """Write an overlay for each image, beside its mask."""
    instances: bool = False
    """Find the objects too; write a label image for each image, outlines in the overlays, and tables of all objects."""
    min_area: float | None = None
    """Leave out objects of a smaller area than this, in the unit. By default the area that 99 % of the training objects
    have, at most a tenth of their median area, or 0 for a run that did not learn objects."""
    max_hole: float = 0
    """Fill holes in objects of at most this area, in the unit."""
    unit: Unit = "pixel"
    """Unit of the two areas: pixels, or square micrometres; the latter needs TIFF files that state their pixel size."""
    seed: int = 0
    """Seed of the noise, together with the path of each image below the folder that was named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("unit", self.unit, get_args(Unit))
        require(0 <= self.opacity <= 1, "opacity", self.opacity, "must be from 0 to 1")
        for name in ("min_area", "max_hole"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.unit == "micrometre":
                require(is_number(value) and value >= 0, name, value, "must be 0 square micrometres or more")
            else:
                valid = is_number(value) and value >= 0 and value == int(value)
                require(valid, name, value, "must be a whole number of pixels, 0 or more")
                setattr(self, name, int(value))

    @property
    def folder(self) -> Path:
        """The folder for the masks."""
        return self.output or self.run / "masks"

    def checked_inputs(self) -> Inputs:
        """Returns the images; a ValueError for a missing run, no image, or an output not ours or not writable."""
        check_results(self.run, "SegmentationPipeline", self.folder)
        if not record_path(self.folder, "segment").exists():
            tables = (TABLE, *(OBJECT_TABLES if self.instances else ()))
            check_absent(*(self.folder / table for table in tables), overwrite=self.overwrite)
        return find_inputs(self.inputs, self.folder)
