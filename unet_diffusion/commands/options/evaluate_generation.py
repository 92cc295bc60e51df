"""The options of `unet-diffusion evaluate-generation`."""

from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.checks import is_count, require, set_plain
from unet_diffusion.commands.options.evaluate import check_alone
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_sources
from unet_diffusion.files import check_absent, check_output
from unet_diffusion.saved_index import check_run_for
from unet_diffusion.unused_options import check_used


@dataclass
class RealData(DataConfig):
    """The real images to compare with."""

    data: str | None = None  # type: ignore[assignment]
    """"mnist-5000" (5,000 digits, extra `digits`), a folder of images, a file, glob or folder of Parquet, Arrow or
    WebDataset tar files, a `save_to_disk` folder, or the name of a data set on the Hugging Face Hub; by default the
    images of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alone(self)


@dataclass
class EvaluateGeneration(GenerationOptions):
    """Compare generated images with real ones through a feature network."""

    data: DataConfig = field(default_factory=RealData)
    count: int = 512
    """Number of images to generate, and of real images to compare them with if there are that many."""
    features: str = "efficientnet-lite0"
    """Network whose features are compared: "efficientnet-lite0" (offline, extra `metrics`), "inception" (downloads,
    extra `inception`), or the folder of a finished run of `train-classifier`, for images like those that it learnt
    from. Figures from different networks cannot be compared."""
    training_images: int = 10_000
    """Number of training images in which the one nearest to each generated image is searched."""
    output: Path | None = None
    """File of the figures; by default `generation.json` in the run's folder. A PNG of the same name shows the generated
    images that are nearest to a training image, each beside that image."""
    overwrite: bool = False
    """Replace figures that are already there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        set_plain(self)
        require(is_count(self.training_images), "training_images", self.training_images, "must be at least 1")
        check_used(self)

    @property
    def files(self) -> tuple[Path, Path]:
        """The files of the figures, as JSON, and of the nearest pairs, as PNG; a ValueError if they are one file."""
        output = self.output or self.run / "generation.json"
        if output.suffix == ".png":
            raise ValueError(
                f"output is {output}, but .png is for the pairs beside the figures; give it another suffix."
            )
        return output, output.with_suffix(".png")

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run or set, or an output that exists or cannot be written."""
        check_run_for(self.run, "ImageGenerationPipeline")
        check_output(self.files[0].parent)
        check_absent(*self.files, overwrite=self.overwrite)
        check_sources(self.data)
