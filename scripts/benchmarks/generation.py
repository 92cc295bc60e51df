"""G1: images a second of our pipeline with a fast sampler, against the stock DDPM pipeline, at equal quality.

Both generate from one checkpoint in batches of one size, in turn. The quality is the Frechet distance to real images.
Every batch is kept as a file, so that a stopped run can resume.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts import NETWORKS
from scripts.benchmarks.result_row import Row
from scripts.benchmarks.timing import ratio, synchronise
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
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline
from unet_diffusion.training.config import TrainingConfig

BATCH = 64  # for both pipelines
BATCHES = 8  # 512 images
REAL = 1024  # images, the same for all cases; more of them make the distances more certain
TARGET = 50.0  # times as fast
PEER = "stock DDPMPipeline"
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
SOLVERS: tuple[SamplerName, ...] = ("dpm-solver++", "sde-dpm-solver++", "unipc")
FAST = tuple(Case(name, steps) for name in SOLVERS for steps in (10, 15, 20, 30))


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
) -> Iterator[Row]:
    """The ratio of images a second for every case; the target is for the fewest steps at equal quality.

    A case has equal quality if its distance is not above the stock pipeline's by more than the error of the difference,
    the root of the sum of the squares of both standard errors. That overestimates the error, since both are compared
    with the same real images.

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
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(training.output.glob("unet/*")))).hexdigest()
    folder /= f"{weights[:8]}-{features.name}"  # other weights have other images
    generators = {stock: stock_generator(training.output, stock.steps)}
    generators |= {case: our_generator(training.output, case) for case in fast}
    parts: dict[Case, list[dict[str, Tensor]]] = {case: [] for case in generators}
    for index in range(batches):
        for case, generate in generators.items():
            parts[case].append(kept_batch(folder / f"{case}" / f"{index}.safetensors", generate, features, index))
    real = features_of(features, drawn(load_images(training.data).train, REAL))
    distances = {
        case: frechet_distance(real, torch.cat([part["features"] for part in each])) for case, each in parts.items()
    }
    seconds = {case: [part["seconds"].item() for part in each] for case, each in parts.items()}
    yield from compare(stock, distances, seconds)


def stock_generator(run: Path, steps: int) -> Generate:
    """The pipeline of diffusers, called as a user would."""
    pipe = DDPMPipeline.from_pretrained(run).to(best_device("auto"))
    pipe.set_progress_bar_config(disable=True)
    return lambda count, generator: pipe(count, generator, steps, output_type="np").images


def our_generator(run: Path, case: Case) -> Generate:
    """Our pipeline with a fast sampler."""
    pipe = load_pipeline(ImageGenerationPipeline, run).to(best_device("auto"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler(case.sampler, pipe.scheduler)
    return lambda count, generator: pipe(count, case.steps, generator=generator, output_type="np").images


def kept_batch(path: Path, generate: Generate, features: FeatureNetwork, index: int) -> dict[str, Tensor]:
    """The images (B, C, H, W) in [-1, 1] of a batch, their features (B, D), and the seconds to generate them."""
    if not path.is_file():
        generator = keyed_generator(0, "generation", index)
        started = clock()
        images = generate(BATCH, generator)
        seconds = clock() - started
        batch = {"images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1}
        batch |= {"features": features_of(features, batch["images"]), "seconds": torch.tensor([seconds])}
        with written_aside(path) as aside:
            save_file(batch, aside)
    return load_file(path)


def clock() -> float:
    """The time in seconds: CPU time if one thread computes, so that other work on the machine does not count."""
    synchronise()
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if one_thread else time.perf_counter()


def compare(stock: Case, distances: dict[Case, Measurement], seconds: dict[Case, list[float]]) -> Iterator[Row]:
    """A row for each fast case; the first of those with the fewest steps at equal quality has the target."""
    fast = [case for case in distances if case != stock]
    equal = [case for case in fast if is_equal(distances[case], distances[stock])]
    chosen = min(equal, key=lambda case: case.steps, default=None)
    details = {
        "seconds": {str(case): each for case, each in seconds.items()},
        "distances": {str(case): (each.value, each.error) for case, each in distances.items()},
    }
    count = distances[stock].generated_count
    for case in fast:
        faster = ratio(seconds[stock], seconds[case])
        ours, theirs = (distances[each] for each in (case, stock))
        figure = (
            f"{faster} times the images a second, {count / sum(seconds[case]):.3g} against "
            f"{count / sum(seconds[stock]):.3g}; Frechet distance {ours.value:.2f} (error {ours.error:.2f}) against "
            f"{theirs.value:.2f} ({theirs.error:.2f}), {'equal' if case in equal else 'worse'}"
        )
        target, met = (f"{TARGET}x", faster.median >= TARGET) if case == chosen else ("", None)
        work = f"{count} images, {case}"
        yield Row("G1", work, PEER, figure, faster.median, target, met, details, (faster.low, faster.high))
    if chosen is None:
        work = f"{count} images, any case"
        yield Row("G1", work, PEER, "none is as good", target=f"{TARGET}x", met=False, details=details)


def is_equal(ours: Measurement, theirs: Measurement) -> bool:
    """Returns whether our distance is below theirs, or above it by no more than the error of the difference."""
    return ours.value <= theirs.value + math.hypot(ours.error, theirs.error)
