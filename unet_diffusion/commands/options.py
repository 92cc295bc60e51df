"""The options of every command, and the checks of their paths, which need neither torch nor diffusers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tyro.conf import Positional

from unet_diffusion.checks import require, require_choice
from unet_diffusion.commands.inputs import find_inputs
from unet_diffusion.data.config import DataConfig, SourceOptions
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig, MaskedOptions
from unet_diffusion.diffusion.config import SamplerName, check_sides
from unet_diffusion.files import check_absent, check_output
from unet_diffusion.network.config import check_model
from unet_diffusion.saved_index import check_run, check_run_for
from unet_diffusion.tasks.config import (
    DiffusionConfig,
    FrozenFeaturesConfig,
    JointConfig,
    SegmentationConfig,
    SuperResolutionConfig,
)
from unet_diffusion.training.config import TrainingConfig

TaskName = Literal["generation", "super-resolution"]
ExportFormat = Literal["self-contained", "onnx", "torch-export", "safetensors-single"]
GRAPHS = ("onnx", "torch-export")  # formats that hold a graph of each head, rather than weights to train


@dataclass
class TrainDDPM:
    """Train a U-Net to generate or enlarge images (DDPM). To resume a stopped run, give the same command again."""

    output: Path = Path("runs/ddpm")
    """Folder of the run. It becomes a diffusers pipeline."""
    model: str = "small-32"
    """Network to train: a preset, a JSON file of config values, or the folder of an earlier run to start from."""
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    task: TaskName = "generation"
    """"generation" makes images from noise; "super-resolution" makes small images `scale` times larger a side."""
    super_resolution: SuperResolutionConfig = field(default_factory=SuperResolutionConfig)

    def __post_init__(self) -> None:
        require_choice("task", self.task, get_args(TaskName))
        scale = self.super_resolution.scale
        if self.task == "generation" and self.super_resolution != SuperResolutionConfig():
            raise ValueError(
                f"scale is {scale} and condition_noise {self.super_resolution.condition_noise}, but task is "
                "'generation', which starts from noise alone; set task to super-resolution, or leave them out."
            )
        if self.task == "super-resolution":
            if scale is None:
                raise ValueError("task is 'super-resolution', but there is no scale; set it to 2 or 4.")
            if self.data.side is not None:
                check_sides(self.data.side, self.data.side, scale)

    def check_paths(self) -> None:
        """Raises a ValueError for data or a model that does not exist, or an output that cannot be written."""
        check_output(self.output)
        check_model(self.model)
        check_sources(self.data)


@dataclass
class GenerationOptions:
    """Which images to generate. Image i depends on the seed and i alone."""

    run: Path = Path("runs/ddpm")
    """Folder of the run, or of any saved pipeline with a UNet."""
    count: int = 16
    """Number of images."""
    sampler: SamplerName = "dpm-solver++"
    """How the noise is removed; "ddpm" is the original, with --steps 1000."""
    steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """Seed of everything random."""
    class_labels: tuple[str, ...] = ()
    """Classes to generate, by name or index, in turn; for class-conditional runs."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 turns it off."""
    max_batch: int = 64
    """Images generated at once."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""

    def __post_init__(self) -> None:
        require(self.count >= 1, "count", self.count, "must be at least 1")


@dataclass
class Sample(GenerationOptions):
    """Generate images with a trained run. Image i depends on the seed and i alone."""

    output: Path | None = None
    """Folder for the images; by default `samples` in the run's folder."""
    overwrite: bool = False
    """Replace images that are already there."""

    @property
    def folder(self) -> Path:
        """The folder for the images."""
        return self.output or self.run / "samples"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, or an output that cannot be written or holds images."""
        check_run_for(self.run, "ImageGenerationPipeline")
        check_output(self.folder)
        check_absent(*sorted(self.folder.glob("[0-9]*.*")), overwrite=self.overwrite)


@dataclass
class FileOptions:
    """A run, and the image files that it works through."""

    run: Path
    """Folder of the run."""
    inputs: tuple[str, ...] = ()
    """Image files, folders (with their subfolders) and globs."""
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


@dataclass
class Upscale(FileOptions):
    """Enlarge image files with a super-resolution run. A file that fails is reported, and the others go on."""

    run: Path = Path("runs/super-resolution")
    """Folder of the run, or of any saved SuperResolutionPipeline."""
    output: Path | None = None
    """Folder for the large images; by default `upscaled` in the run's folder."""
    sampler: SamplerName = "dpm-solver++"
    """How the noise is removed; "ddpm" is the original, with --steps 1000."""
    steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """Seed of the noise, together with the name of each output."""
    condition_noise: float = 0.0
    """Standard deviation of noise that is added to the enlarged image, whose values lie in [-1, 1]; for images of lower
    quality than those of the training, such as compressed ones."""

    @property
    def folder(self) -> Path:
        """The folder for the large images."""
        return self.output or self.run / "upscaled"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, no image at all, or an output that cannot be written."""
        check_run_for(self.run, "SuperResolutionPipeline")
        check_output(self.folder)
        find_inputs(self.inputs, self.folder)


@dataclass
class TrainSegmentation:
    """Train a U-Net to give masks, from a DDPM run or from nothing. To resume, give the same command again."""

    data: MaskedDataConfig
    output: Path = Path("runs/segmentation")
    """Folder of the run. It becomes a SegmentationPipeline."""
    model: str = "small-32"
    """Where to start: the folder of a DDPM or segmentation run, or, for untrained weights, a preset or a JSON file of
    config values."""
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    frozen_features: FrozenFeaturesConfig = field(default_factory=FrozenFeaturesConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    augment: bool = True
    """Vary images and masks in training, as the next options say."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=2000, batch_size=8, warmup_steps=100, validate_every=100)
    )

    def check_paths(self) -> None:
        """Raises a ValueError for data or a model that does not exist, or an output that cannot be written."""
        check_output(self.output)
        check_model(self.model)
        check_sources(self.data)
        if self.joint.unlabelled is not None:
            check_sources(SourceOptions(self.joint.unlabelled))


@dataclass
class Segment(FileOptions):
    """Segment image files with a trained run. A file that cannot be segmented is reported, and the others go on."""

    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    output: Path | None = None
    """Folder for the masks; by default `masks` in the run's folder."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    timesteps: tuple[int, ...] = ()
    """Timesteps at which noise is added and the masks are averaged; by default the clean image."""
    num_draws: int = 1
    """Noisy versions per timestep."""
    opacity: float = 0.5
    """Opacity of the colours in the overlays, from 0 to 1."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.opacity <= 1, "opacity", self.opacity, "must be from 0 to 1")

    @property
    def folder(self) -> Path:
        """The folder for the masks."""
        return self.output or self.run / "masks"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, no image at all, or an output that cannot be written or is there."""
        check_run_for(self.run, "SegmentationPipeline")
        check_output(self.folder)
        check_absent(self.folder / "areas.csv", overwrite=self.overwrite)
        find_inputs(self.inputs, self.folder)


@dataclass
class Evaluate:
    """Score the masks of a trained run on images with masks, each at its own size."""

    data: MaskedOptions
    run: Path = Path("runs/segmentation")
    """Folder of the run, or of any saved SegmentationPipeline."""
    output: Path | None = None
    """Folder for `evaluation.json` and `evaluation.md`; by default the run's."""
    tile_size: int | None = None
    """Output pixels a side of a tile of large images; by default a tile takes about 64 MiB."""
    augment: bool = False
    """Average over 8 flips and rotations, at 8 times the cost."""
    boundary_tolerance: float = 2.0
    """Pixels by which a predicted boundary may miss the true one, in the boundary F1."""
    membrane: int | None = None
    """Class of the membrane between cells: also score the cells, by adapted Rand error and variation of information.
    Instances are always scored where the set has them."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    overwrite: bool = False
    """Replace an evaluation that is already there."""

    @property
    def files(self) -> tuple[Path, Path]:
        """The files of the scores, as JSON and as Markdown."""
        folder = self.output or self.run
        return folder / "evaluation.json", folder / "evaluation.md"

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run or set, or an output that cannot be written or is there."""
        check_run_for(self.run, "SegmentationPipeline")
        check_output(self.files[0].parent)
        check_absent(*self.files, overwrite=self.overwrite)
        check_sources(self.data)


@dataclass
class EvaluateGeneration(GenerationOptions):
    """Compare generated images with real ones through a feature network."""

    data: DataConfig = field(default_factory=DataConfig)
    count: int = 512
    """Number of images to generate, and of real images to compare them with, if there are that many."""
    features: str = "efficientnet-lite0"
    """Network whose features are compared: "efficientnet-lite0" (offline, extra `metrics`), "inception" (downloads,
    extra `inception`), or the folder of a finished run of `train-classifier`, for images like those that it learned
    from. Figures of different networks cannot be compared."""
    training_images: int = 10_000
    """Training images among which the nearest one to each generated image is searched."""
    output: Path | None = None
    """File of the figures; by default `generation.json` in the run's folder. A PNG of the same name shows the generated
    images that are nearest to a training image, each beside that one."""
    overwrite: bool = False
    """Replace figures that are already there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.training_images >= 1, "training_images", self.training_images, "must be at least 1")

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
        """Raises a ValueError for a missing run or set, or an output that cannot be written or is there."""
        check_run_for(self.run, "ImageGenerationPipeline")
        check_output(self.files[0].parent)
        check_absent(*self.files, overwrite=self.overwrite)
        check_sources(self.data)


@dataclass
class TrainClassifier:
    """Train a small classifier of whole images. To resume a stopped run, give the same command again."""

    output: Path = Path("runs/classifier")
    """Folder of the run; `evaluate-generation --features` takes it."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels at each resolution, full resolution first; the last is the number of features."""
    dropout: float = 0.1
    """Share of the features dropped in training before the last layer."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=1000, learning_rate=1e-2, warmup_steps=100, validate_every=250)
    )

    def check_paths(self) -> None:
        """Raises a ValueError for data that do not exist, or an output that cannot be written."""
        check_output(self.output)
        check_sources(self.data)


@dataclass
class Export:
    """Write a trained run in another form, for use without this package."""

    run: Positional[Path]
    """Folder of the run, or of any saved pipeline with a network of this package."""
    target: Positional[Path]
    """Folder to write, which must not exist yet; "safetensors-single" writes a file, such as masks.safetensors."""
    format: ExportFormat = "self-contained"
    """"self-contained": the code beside the weights, for diffusers with `trust_remote_code=True`. "onnx" and
    "torch-export": a graph of each head for any batch and size, compared with the network. "safetensors-single": one
    file of all weights and configs, for `load_single_file` of this package."""
    head: Literal["segmentation", "noise"] | None = None
    """The head that "onnx" and "torch-export" write; by default all heads of the run."""

    def __post_init__(self) -> None:
        require_choice("format", self.format, get_args(ExportFormat))
        if self.head is not None and self.format not in GRAPHS:
            raise ValueError(f"head is {self.head!r}, but {self.format!r} writes all of a run; leave head out.")
        if self.format == "safetensors-single" and self.target.suffix != ".safetensors":
            raise ValueError(f"target is {self.target}, but must be a file ending in .safetensors; name it so.")

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, or a target that exists or cannot be written."""
        check_run(self.run)
        check_output(self.target.parent)
        if self.target.exists():
            raise ValueError(f"{self.target} exists already; remove it, or choose another name.")


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

    def check_paths(self) -> None:
        """Raises a ValueError for a set that does not exist."""
        check_sources(self)


@dataclass
class Demo:
    """Open a page to try a run in a browser: generate, segment or enlarge, as the run was trained."""

    run: Positional[Path]
    """Folder of the run, or of any saved pipeline with a UNet."""
    examples: Path | None = None
    """Folder whose first 24 images visitors can pick, for runs that segment or enlarge."""
    host: str = "127.0.0.1"
    """Address to serve on; by default only this machine can open the page, with "0.0.0.0" all in its network."""
    port: int | None = None
    """Port to serve on; by default the first free one from 7860."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""

    def __post_init__(self) -> None:
        rule = "must be from 1 to 65535; leave it out for a free one"
        require(self.port is None or 1 <= self.port <= 65535, "port", self.port, rule)

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run or folder of examples."""
        check_run(self.run)
        if self.examples is not None and not self.examples.is_dir():
            raise ValueError(f"examples is {self.examples}, but there is no such folder; give one with images.")
