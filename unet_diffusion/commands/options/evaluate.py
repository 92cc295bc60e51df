"""The options of `unet-diffusion evaluate`."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from unet_diffusion.checks import is_number, require, set_plain
from unet_diffusion.data.config import SourceOptions
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.files import check_absent, check_output
from unet_diffusion.network.config import Precision
from unet_diffusion.saved_index import check_run_for

LOADING = ("cache_dir", "num_workers")  # options of how images are loaded, whichever they are


@dataclass
class EvaluationData(MaskedOptions):
    """The images with masks to score on."""

    data: str | None = None  # type: ignore[assignment]
    """A folder of images, a file, glob or folder of Parquet, Arrow or WebDataset tar files, a `save_to_disk` folder,
    or the name of a data set on the Hugging Face Hub; by default the images that the run held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alone(self)


def check_alone(options: SourceOptions) -> None:
    """Raises a ValueError for data options without `data`, since the run's own images are used as the run used them."""
    if options.data is not None:
        return
    for each in fields(options):
        value = getattr(options, each.name)
        if each.name not in ("data", *LOADING) and value != each.default:
            raise ValueError(
                f"{each.name} is {value!r}, but data is not given, and the run's own images are read as it read them; "
                f"give data, or leave {each.name} out."
            )


@dataclass
class Evaluate:
    """Score the masks of a trained run on images with masks, each at its own size; by default those it held out."""

    data: MaskedOptions = field(default_factory=EvaluationData)
    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    output: Path | None = None
    """Folder for `evaluation.json` and `evaluation.md`; by default the run's."""
    tile_size: int | None = None
    """Output pixels a side of a tile of large images; by default a tile takes about 64 MiB."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    boundary_tolerance: float = 2.0
    """Distance in pixels by which a predicted boundary may miss the true one, in the boundary F1."""
    membrane: str | int | None = None
    """Class of the membrane between cells, by name, or by index if the classes have no names. With it, cells are scored
    too, by adapted Rand error and variation of information. Objects are always scored if the set has instance maps."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    mixed_precision: Precision = "auto"
    """Precision of the network: "no" (float32), "bf16" or "fp16"; "auto" is bf16 where the device has it."""
    overwrite: bool = False
    """Replace an evaluation that is already there."""

    def __post_init__(self) -> None:
        set_plain(self)
        valid = is_number(self.boundary_tolerance) and self.boundary_tolerance >= 0
        require(valid, "boundary_tolerance", self.boundary_tolerance, "must be a number of pixels, at least 0")

    @property
    def files(self) -> tuple[Path, Path]:
        """The files of the scores, as JSON and as Markdown."""
        folder = self.output or self.run
        return folder / "evaluation.json", folder / "evaluation.md"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run or set, or an output that exists or cannot be written."""
        check_run_for(self.run, "SegmentationPipeline")
        check_output(self.files[0].parent)
        check_absent(*self.files, overwrite=self.overwrite)
        check_sources(self.data)
