"""G1: images a second of our pipeline with a fast sampler, against the stock DDPM pipeline, at equal quality.

Both generate from one checkpoint in batches of one size, in turn. The quality is the Frechet distance to real images.
Every batch is kept as a file, so that a stopped run can resume.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts import NETWORKS
from scripts.benchmarks.result_row import Comparison
from scripts.benchmarks.timing import by_name, compute_clock, ratios, timed_precisions
from scripts.reports import content_hash
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.drawn_images import drawn
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import Measurement, frechet_distance
from unet_diffusion.files import INDEX, written_aside
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import PRECISIONS, autocast
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline
from unet_diffusion.training.config import TrainingConfig

BATCH = 64  # for both pipelines
BATCHES = 4  # 256 images
REAL = 1024  # images, the same for all cases; more of them make the distances more certain
TARGET = 50.0  # times as fast, in float32
PEER = "stock DDPMPipeline, 1000 steps"
Generate = Callable[[int, torch.Generator], np.ndarray]  # number of images to (B, H, W, C) in [0, 1]


@dataclass(frozen=True)
class Case:
    """A sampler with a number of steps; "ddpm" runs in the stock pipeline."""

    sampler: SamplerName
    steps: int

    def __str__(self) -> str:
        """For example "unipc, 20 steps"."""
        return f"{self.sampler}, {self.steps} steps"


STOCK = Case("ddpm", 1000)
SOLVERS: tuple[SamplerName, ...] = ("dpm-solver++", "sde-dpm-solver++")
FAST = tuple(Case(name, steps) for name in SOLVERS for steps in (10, 15, 20))
Key = tuple[str, Precision]  # a case in words, and the precision in which it ran


def recipe(data: Path, run: Path) -> TrainDDPM:
    """The training of the checkpoint, which has 0.38M parameters."""
    return TrainDDPM(
        output=run,
        model=str(NETWORKS / "fashion-mnist-small.json"),
        data=DataConfig(data=str(data)),
        training=TrainingConfig(steps=3000, batch_size=32),
    )


def speed(
    training: TrainDDPM,
    folder: Path,
    features: FeatureNetwork | None = None,
    stock: Case = STOCK,
    fast: Sequence[Case] = FAST,
    batches: int = BATCHES,
) -> Iterator[Comparison]:
    """The ratio of images a second for every case; the target is for the fewest steps at equal quality.

    A case has equal quality if its distance, in every precision, is not above that of the stock pipeline in float32 by
    more than the error of the difference, the root of the sum of the squares of both standard errors. That
    overestimates the error, since both are compared with the same real images.

    Args:
        training: trains the checkpoint, unless it exists.
        folder: keeps the batches.
        features: feature network of the distance; by default efficientnet-lite0.
        stock: sampler and steps of the stock pipeline.
        fast: samplers and steps of our pipeline.
        batches: number of batches of `BATCH` images.
    """
    if not (training.output / INDEX).is_file():
        train_ddpm(training)
    features = features or feature_network("efficientnet-lite0")
    weights = content_hash(sorted(training.output.glob("unet/*")))
    folder /= f"{weights}-{features.name}"  # other weights have other images
    generators: dict[Key, Generate] = {}
    for precision in timed_precisions(best_device("auto")):
        generators[str(stock), precision] = stock_generator(training.output, stock.steps, precision)
        generators |= {(str(case), precision): our_generator(training.output, case, precision) for case in fast}
    parts: dict[Key, list[dict[str, Tensor]]] = {key: [] for key in generators}
    for index in range(batches):
        for (case, precision), generate in generators.items():
            path = folder / f"{case}, {PRECISIONS[precision]}" / f"{index}.safetensors"
            parts[case, precision].append(kept_batch(path, generate, features, index))
    real = features_of(features, drawn(load_images(training.data).train, REAL))
    distances = {
        key: frechet_distance(real, torch.cat([part["features"] for part in each])) for key, each in parts.items()
    }
    seconds = {key: [part["seconds"].item() for part in each] for key, each in parts.items()}
    yield from compare(stock, fast, distances, seconds)


def stock_generator(run: Path, steps: int, precision: Precision) -> Generate:
    """The pipeline of diffusers, called as a user would."""
    pipe = DDPMPipeline.from_pretrained(run).to(best_device("auto"))
    pipe.set_progress_bar_config(disable=True)

    def generate(count: int, generator: torch.Generator) -> np.ndarray:
        with autocast(pipe.device, precision):
            return pipe(count, generator, steps, output_type="np").images

    return generate


def our_generator(run: Path, case: Case, precision: Precision) -> Generate:
    """Our pipeline with a fast sampler."""
    pipe = load_pipeline(ImageGenerationPipeline, run).to(best_device("auto"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler(case.sampler, pipe.scheduler)
    return lambda count, generator: (
        pipe(count, case.steps, generator=generator, output_type="np", mixed_precision=precision).images
    )


def kept_batch(path: Path, generate: Generate, features: FeatureNetwork, index: int) -> dict[str, Tensor]:
    """The images (B, C, H, W) in [-1, 1] of a batch, their features (B, D), and the seconds to generate them."""
    if not path.is_file():
        generator = keyed_generator(0, "generation", index)
        started = compute_clock()
        images = generate(BATCH, generator)
        seconds = compute_clock() - started
        batch = {"images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1}
        batch |= {"features": features_of(features, batch["images"]), "seconds": torch.tensor([seconds])}
        with written_aside(path) as aside:
            save_file(batch, aside)
    return load_file(path)


def compare(
    stock: Case, fast: Sequence[Case], distances: dict[Key, Measurement], seconds: dict[Key, list[float]]
) -> Iterator[Comparison]:
    """A row for each fast case; the first of those with the fewest steps at equal quality has the target."""
    precisions = [precision for case, precision in distances if case == str(stock)]
    theirs = distances[str(stock), "no"]
    equal = [
        case for case in fast if all(is_equal(distances[str(case), precision], theirs) for precision in precisions)
    ]
    chosen = min(equal, key=lambda case: case.steps, default=None)
    details = {
        "seconds": by_name(seconds),
        "distances": by_name({key: (each.value, each.error) for key, each in distances.items()}),
    }
    images = f"{theirs.generated_count} images"
    for case in fast:
        quality = "as good" if case in equal else "worse"
        targets = {PRECISIONS["no"]: TARGET} if case == chosen else {}
        found = ratios(seconds, str(case), str(stock))
        yield Comparison("G1", f"{images}, {case}, {quality}", PEER, found, targets, details=details)
    if chosen is None:
        yield Comparison("G1", f"{images}, any case", PEER, missing="none is as good", details=details)


def is_equal(ours: Measurement, theirs: Measurement) -> bool:
    """Returns whether our distance is below theirs, or above it by no more than the error of the difference."""
    return ours.value <= theirs.value + math.hypot(ours.error, theirs.error)
