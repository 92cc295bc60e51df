#!/usr/bin/env python
"""Which parts of the recipe of `train-ddpm` make good images soon: one change at a time, on one thread.

Every variant sees as many images. Its averaged weights at the end are judged by the Frechet distance of their
images, and its time is CPU seconds of the training steps.

    OMP_NUM_THREADS=1 python scripts/recipe_search.py --data fashion_mnist/train.parquet --output runs/recipes

Writes `recipes.json` and `recipes.md`. The same command goes on where it was stopped.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from benchmarks.quality import Point, judge
from benchmarks.quality_training import snapshot_path, train_ours
from time_to_quality import TimeToQuality, our_network, real_features
from torch import Tensor

from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.sets import load_images
from unet_diffusion.files import write_json, write_text
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask

STEPS, BATCH = 360, 16  # of the defaults, here


class EvenlySpread(DiffusionTask):
    """The timesteps of a step lie in as many equal parts of all timesteps, one in each (Kingma et al. 2021, I.1)."""

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        places = [(i + torch.rand((), generator=each)) / len(generators) for i, each in enumerate(generators)]
        return (torch.stack(places) * self.config.num_train_timesteps).long()


class LogitNormal(DiffusionTask):
    """Timesteps in the middle come more often: a sigmoid of normal numbers (Esser et al. 2024, equation 19)."""

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        normal = torch.stack([torch.randn((), generator=each) for each in generators])
        return (normal.sigmoid() * self.config.num_train_timesteps).long()


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults."""

    diffusion: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    task: type[DiffusionTask] = DiffusionTask


def batches_of(size: int) -> Variant:
    """As many images in steps of another size."""
    steps = STEPS * BATCH // size
    return Variant(training={"batch_size": size, "steps": steps, "warmup_steps": steps // 10})


VARIANTS = {
    "defaults": Variant(),
    "the noise predicted": Variant({"prediction_type": "epsilon"}),
    "the clean image predicted": Variant({"prediction_type": "sample"}),
    "no weighting": Variant({"min_snr_gamma": None}),
    "gamma 1": Variant({"min_snr_gamma": 1.0}),
    "gamma 20": Variant({"min_snr_gamma": 20.0}),
    "linear betas": Variant({"beta_schedule": "linear"}),
    "zero terminal signal": Variant({"zero_terminal_snr": True}),
    "classic recipe": Variant({"recipe": "ddpm"}),
    "timesteps evenly spread": Variant(task=EvenlySpread),
    "timesteps logit-normal": Variant(task=LogitNormal),
    "learning rate 5e-4": Variant(training={"learning_rate": 5e-4}),
    "learning rate 2e-3": Variant(training={"learning_rate": 2e-3}),
    "learning rate constant": Variant(training={"schedule": "constant"}),
    "no warm-up": Variant(training={"warmup_steps": 0}),
    "8 images a step": batches_of(8),
    "32 images a step": batches_of(32),
    "64 images a step": batches_of(64),
    "average with decay 0.99": Variant(training={"ema_decay": 0.99}),
    "average with decay 0.9999": Variant(training={"ema_decay": 0.9999}),
}


@dataclass
class RecipeSearch:
    """What is tried."""

    data: str
    """Images to learn from, such as Fashion-MNIST."""
    output: Path
    """Folder of the runs and the results."""
    only: tuple[str, ...] = ()
    """Variants, by default all."""
    images: int = 1000
    """Images generated for each, and real ones."""
    seed: int = 0
    """Everything random follows from it."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in self.only:
            if name not in VARIANTS:
                raise ValueError(f"only is {name!r}, but must be among {', '.join(VARIANTS)}.")


def search(config: RecipeSearch) -> str:
    """Trains what is not trained, judges it, and returns the table."""
    torch.set_num_threads(1)
    quality = TimeToQuality(config.data, config.output, batch_size=BATCH, images=config.images, seed=config.seed)
    data = load_images(DataConfig(data=config.data)).train
    assert isinstance(data, ImageDataset)
    features = real_features(quality)
    points: dict[str, Point] = {}
    for name in config.only or VARIANTS:
        variant, folder = VARIANTS[name], config.output / name.replace(" ", "-")
        ours = quality.ours(STEPS)
        training = replace(ours.training, **variant.training)
        run = replace(ours, output=folder, diffusion=DiffusionConfig(**variant.diffusion), training=training)
        score = folder / f"score-{config.images}.json"
        if not score.exists():
            if not snapshot_path(folder, training.steps).exists():
                train_ours(run, variant.task)
            network, scheduler = our_network(quality, data), run.diffusion.make_scheduler()
            write_json(score, asdict(judge(folder, training.steps, network, scheduler, *features)))
        points[name] = Point(**json.loads(score.read_text(encoding="utf-8")))
        text = table(points)
        write_json(
            config.output / "recipes.json",
            {"options": asdict(config), "points": {name: asdict(point) for name, point in points.items()}},
        )
        write_text(config.output / "recipes.md", text)
    return text


def table(points: dict[str, Point]) -> str:
    """A line for each variant, the nearest to the real images first, as Markdown."""
    lines = ["| recipe | steps | seconds | Frechet distance |", "| --- | --- | --- | --- |"]
    for name, point in sorted(points.items(), key=lambda item: item[1].distance):
        lines.append(f"| {name} | {point.step} | {point.seconds:.1f} | {point.distance:.1f} ± {point.error:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(search(tyro.cli(RecipeSearch, description=__doc__)))
