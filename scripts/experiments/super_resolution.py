"""Compares ways to enlarge images: nearest pixel, bicubic, a U-Net that regresses, and diffusion (SR3).

Both U-Nets learn from `train.parquet` with the same layers, steps, batches, optimizer and seed. Images of
`test.parquet` are shrunk, enlarged in each way, rounded as for a file and compared with the originals by PSNR, SSIM and
the distance of features of a network that was trained on ImageNet, which depends less on single pixels. All three
compare pairs and favour blur where the detail is unknown. The kernel distance of the same features compares the two
sets: it says whether enlarged images look like real ones, with the right detail or not.

    python -m scripts.experiments.super_resolution --data shared/data/fruits64 --scale 4 --output runs/larger/fruits64

`--tuning-steps` adds the diffusion run in two steps, and the same run after tuning for a few steps in one and in two.

Writes `comparison.md`, `comparison.json` (with the scores of every image) and `comparison.png`. The same command
resumes a stopped comparison.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from scripts import NETWORKS
from scripts.experiments.cases import half_interval
from scripts.experiments.regression_task import RegressionTask, regressed
from scripts.reports import content_hash, markdown_table
from unet_diffusion import UNet
from unet_diffusion.checks import is_count, require, require_each
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.tune_few_steps import tune_few_steps
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.drawn_images import drawn
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.config import SamplerName, check_sides
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import SMALLEST_SAMPLE, Measurement, kernel_distance
from unet_diffusion.files import write_json, write_text
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.pipelines import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator, keyed_seed
from unet_diffusion.saved_runs import best_device, load_pipeline, load_unet, load_weights
from unet_diffusion.tasks.config import DiffusionConfig, SuperResolutionConfig
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.trainer import Trainer

FEATURES = "efficientnet-lite0"
AT_ONCE = 64  # images
ROWS = 8  # images in comparison.png
FIGURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "distance": f"distance of {FEATURES} features"}  # of each image

Enlarge = Callable[[Tensor, range], Tensor]  # stored images (B, C, h, w) and their indices to images in [-1, 1]


@dataclass(frozen=True)
class Scores:
    """The figures of each test image, and the kernel distance of all if there are enough."""

    images: dict[str, list[float]]
    kernel_distance: Measurement | None


@dataclass
class Comparison:
    """Train two networks, and compare ways to enlarge images."""

    data: Path
    """Folder with `train.parquet` and `test.parquet`, of images of one size."""
    output: Path
    """Folder for the runs and the results."""
    scale: int = 4
    """Factor of the sides."""
    model: str = str(NETWORKS / "fruits64.json")
    """Network of both U-Nets: a preset or a JSON file of config values."""
    steps: int = 5000
    """Optimizer steps of each U-Net."""
    batch_size: int = 32
    """Images per step."""
    learning_rate: float = 1e-3
    """Learning rate at its peak, the same for both U-Nets."""
    condition_noise: float = 0.05
    """As for `unet-diffusion train-ddpm`; for diffusion alone."""
    sampler: SamplerName = "dpm-solver++"
    """Sampler of diffusion."""
    sampling_steps: int = 20
    """Steps of the sampler."""
    tuning_steps: int = 0
    """Optimizer steps that tune the diffusion run for a few steps; 0 leaves it out."""
    tuning_rate: float = 3e-4
    """Learning rate of the tuning, which falls to 0 at its end."""
    max_images: int | None = None
    """Train only on this many images, the first of the set."""
    test_images: int = 512
    """Number of test images, the first of a fixed random order."""
    seed: int = 0
    """Determines initialisation, order and noise."""
    device: str = "auto"
    """Device that enlarges the test images."""

    def __post_init__(self) -> None:
        """Checks the numbers that nothing else checks before training."""
        require_each(self, ("test_images", "sampling_steps"), is_count, "must be at least 1")
        require(is_count(self.tuning_steps, 0), "tuning_steps", self.tuning_steps, "must be at least 0")


def compare(options: Comparison) -> str:
    """Trains and scores what is not finished, and returns the table."""
    test = load_images(DataConfig(data=str(options.data / "test.parquet"), validation_fraction=0)).train
    check_sides(test.height, test.width, options.scale)
    features = feature_network(FEATURES).to(best_device(options.device))
    features.check_channels(test.channels)
    clean = drawn(test, options.test_images)[:]
    small = shrunk(clean, options.scale, test.pixel_range)
    methods = make_methods(options, test.pixel_range)
    scores = {name: scored(options, name, methods[name], small, clean, features, test.pixel_range) for name in methods}
    first = range(min(ROWS, len(clean)))
    shown = [enlarge(small[: len(first)], first) for enlarge in methods.values()]
    save_image(side_by_side([*shown, clean[: len(first)]]), options.output / "comparison.png")
    found = {name: asdict(each) for name, each in scores.items()}
    write_json(options.output / "comparison.json", {"options": asdict(options), "features": FEATURES, "scores": found})
    text = table(scores)
    write_text(options.output / "comparison.md", text)
    return text


def make_methods(options: Comparison, pixel_range: PixelRange) -> dict[str, Enlarge]:
    """The ways to enlarge, by their names; trains the networks unless they are finished."""
    scale, device = options.scale, best_device(options.device)
    regression = load_weights(UNet, train_regression(options) / "unet").eval().to(device)
    run = train_diffusion(options)
    few_steps = {}
    if options.tuning_steps:
        tuned = tune_diffusion(options, run)
        few_steps = {
            "diffusion, 2 steps": by_diffusion(options, run, options.sampler, 2),
            "tuned, 2 steps": by_diffusion(options, tuned, "lcm", 2),
            "tuned, 1 step": by_diffusion(options, tuned, "lcm", 1),
        }

    @torch.no_grad()
    def by_regression(small: Tensor, indices: range) -> Tensor:
        condition = enlarged(small, scale, pixel_range).to(device)
        return regressed(regression, channels_last(condition)).contiguous().cpu()

    return {
        "nearest pixel": lambda small, _: F.interpolate(pixel_range.to_model(small), scale_factor=scale),
        "bicubic": lambda small, _: enlarged(small, scale, pixel_range),
        "regression": by_regression,
        "diffusion": by_diffusion(options, run, options.sampler, options.sampling_steps),
        **few_steps,
    }


def by_diffusion(options: Comparison, run: Path, name: SamplerName, steps: int) -> Enlarge:
    """The way to enlarge with a run, in a number of steps of a sampler."""
    pipe = load_pipeline(SuperResolutionPipeline, run).to(best_device(options.device))
    pipe.scheduler = sampler(name, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def enlarge(small: Tensor, indices: range) -> Tensor:
        generators = [keyed_generator(options.seed, "test image", index) for index in indices]
        (images,) = pipe(small, steps, generators, output_type="pt", return_dict=False)
        return torch.stack(images).cpu() * 2 - 1

    return enlarge


def train_diffusion(options: Comparison) -> Path:
    """Trains by diffusion and returns the folder of the run."""
    config = TrainDDPM(
        output=options.output / "diffusion",
        task="super-resolution",
        model=options.model,
        data=data_config(options),
        super_resolution=SuperResolutionConfig(options.scale, options.condition_noise),
        training=training_config(options),
    )
    return train_ddpm(config)


def tune_diffusion(options: Comparison, run: Path) -> Path:
    """Tunes the diffusion run to enlarge in a few steps, and returns the folder of the tuned run."""
    training = replace(
        training_config(options),
        steps=options.tuning_steps,
        optimizer="auto",
        learning_rate=options.tuning_rate,
        ema_decay=0.99,
    )
    return tune_few_steps(TuneFewSteps(run, options.output / "tuned", training=training))


def train_regression(options: Comparison) -> Path:
    """Trains by regression and returns the folder of the run."""
    training, config, output = training_config(options), data_config(options), options.output / "regression"
    accelerator = make_accelerator(training, output)
    data = load_images(config, options.seed)
    torch.manual_seed(keyed_seed(options.seed, "initialisation"))
    channels = data.train.channels
    unet = load_unet(options.model, {"in_channels": channels, "out_channels": channels})
    task = RegressionTask(unet, data, options.scale, DiffusionConfig())
    resolved = {"model": options.model, "scale": options.scale, "data": asdict(config), "training": asdict(training)}
    return Trainer(task, training, output, resolved, accelerator, make_record(data, config.preparation)).run()


def data_config(options: Comparison) -> DataConfig:
    """The training images."""
    return DataConfig(data=str(options.data / "train.parquet"), max_images=options.max_images)


def training_config(options: Comparison) -> TrainingConfig:
    """The training options of both networks."""
    return TrainingConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        optimizer="muon",  # for both
        learning_rate=options.learning_rate,
        checkpoint_every=200,
        keep_checkpoints=1,
        seed=options.seed,
    )


def scored(
    options: Comparison,
    name: str,
    enlarge: Enlarge,
    small: Tensor,
    clean: Tensor,
    features: FeatureNetwork,
    pixel_range: PixelRange,
) -> Scores:
    """The scores of a method, which are kept in a file until an option or the data change."""
    path = options.output / "scores" / f"{name.replace(' ', '-')}.json"
    files = content_hash(options.data / f"{part}.parquet" for part in ("train", "test"))
    values = {"scores of": name, **asdict(options), "output": None, "device": None, "files": files}
    asked = json.loads(json.dumps(values, default=str))
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["options"] == asked:
            distance = kept["kernel_distance"]
            return Scores(kept["images"], None if distance is None else Measurement(**distance))
    parts: list[dict[str, list[float]]] = []
    seen: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(clean), AT_ONCE):
        indices = range(start, min(start + AT_ONCE, len(clean)))
        large, wanted = enlarge(small[start : indices.stop], indices), clean[start : indices.stop]
        stored = pixel_range.to_model(pixel_range.to_stored(large))
        seen.append((features_of(features, stored), features_of(features, wanted)))
        parts.append(scores_of(stored, wanted, *seen[-1]))
    images = {figure: [value for part in parts for value in part[figure]] for figure in FIGURES}
    ours, theirs = (torch.cat(each) for each in zip(*seen))
    scores = Scores(images, kernel_distance(theirs, ours) if len(clean) >= SMALLEST_SAMPLE else None)
    write_json(path, {"options": asked, **asdict(scores)})
    return scores


def scores_of(found: Tensor, clean: Tensor, ours: Tensor, theirs: Tensor) -> dict[str, list[float]]:
    """The figures of a batch of images; SSIM with its Gaussian window of 11 pixels.

    Equal images have an infinite PSNR, which has no mean. They get the PSNR of an image with a single value that is off
    by one of 256 levels.

    Args:
        found: enlarged images (B, C, H, W) in [-1, 1].
        clean: the originals, like `found`.
        ours: features (B, D) of the enlarged images.
        theirs: features (B, D) of the originals.
    """
    least = (2 / 255) ** 2 / clean[0].numel()  # mean squared error
    psnr = peak_signal_noise_ratio(found, clean, data_range=2.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(found, clean, data_range=2.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return {
        "psnr": psnr.clamp(max=10 * math.log10(2.0**2 / least)).tolist(),
        "ssim": ssim.reshape(-1).tolist(),
        "distance": (ours - theirs).norm(dim=1).tolist(),
    }


def side_by_side(columns: list[Tensor]) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], a column for each method and a row for each image, at twice their size."""
    rows = torch.stack(columns, dim=1).flatten(0, 1).permute(0, 2, 3, 1)
    return grid(array_images((rows / 2 + 0.5).numpy()), columns=len(columns), scale=2)


def table(scores: dict[str, Scores]) -> str:
    """Means over the images with 95% intervals, and the kernel distance with its standard error, as Markdown."""
    heads = ["method", *FIGURES.values(), "kernel distance", "images"]
    lines = []
    for name, each in scores.items():
        cells = [mean_and_interval(each.images[figure]) for figure in FIGURES]
        distance = each.kernel_distance
        cells.append("" if distance is None else f"{distance.value:.3g} ± {distance.error:.1g}")
        lines.append([name, *cells, str(len(each.images["psnr"]))])
    return markdown_table(heads, lines)


def mean_and_interval(values: list[float]) -> str:
    """The mean and the half width of its 95% interval, as text; a single value has no interval."""
    found = np.array(values)
    return f"{found.mean():.4g}" + (f" +- {half_interval(found):.2g}" if len(found) > 1 else "")


if __name__ == "__main__":
    print(compare(tyro.cli(Comparison, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))))
