"""Trains our network and its peers for the same number of steps, and compares their validation losses.

Shows whether a faster network learns less from each step. Every network learns from the same images in the same order,
with the same noise, timesteps, optimizer and moving average, and is validated on the same held-out images with the same
noise. Each gets the best of the same learning rates, by its validation loss after a short run; that run is then
continued, and other seeds follow.

    python -m scripts.experiments.equal_steps --data shared/data/cifar10 --output runs/equal-steps

Prints a table and writes it, all figures as JSON, and a plot. The same command resumes a stopped comparison.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from scripts.benchmarks.compared_networks import CONTENDERS, OURS, SIZES, Contender
from scripts.experiments.cases import short_hash
from scripts.experiments.timed_trainer import TimedTrainer
from scripts.reports import content_hash, markdown_table, save_figure
from unet_diffusion import UNetOutput
from unet_diffusion.checks import require, require_choice, require_each
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import ImageSets, load_images
from unet_diffusion.files import write_json, write_text
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics

OBJECTIVES = {"ddpm": DiffusionConfig(recipe="ddpm"), "default": DiffusionConfig()}
WARMUP = 20  # steps
Points = dict[int, dict[str, float]]  # by step: validation_loss, and cpu_seconds of the training steps until then


@dataclass
class EqualSteps:
    """Train networks of equal size for the same number of steps, each on one thread, and compare their losses."""

    data: Path
    """Folder with `train.parquet` and `test.parquet`, images of 32x32 RGB."""
    output: Path
    """Folder for the runs and the results."""
    networks: tuple[str, ...] = CONTENDERS[:2]
    """Names of the contenders."""
    size: Literal["9m", "ddpm-32"] = "9m"
    """Size of the networks: those of T1, or the larger ones of T2."""
    objective: Literal["ddpm", "default"] = "ddpm"
    """Recipe of all networks: unweighted noise prediction with AdamW (Ho et al. 2020), or the default of `train-ddpm`,
    with Muon."""
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3)
    """Learning rates that are tried for each network."""
    search_steps: int = 100
    """Optimizer steps after which the best learning rate is chosen."""
    steps: int = 400
    """Optimizer steps with the best learning rate."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights, order and noise; the search uses the first."""
    batch_size: int = 16
    """Images per step."""
    validate_every: int = 50
    """Steps between validations."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in self.networks:
            require_choice("networks", name, CONTENDERS)
        valid = 1 <= self.search_steps <= self.steps
        require(valid, "search_steps", self.search_steps, f"must be from 1 to steps, {self.steps}")
        require_each(self, ("networks", "learning_rates", "seeds"), bool, "needs at least one value")

    def folder(self, name: str, learning_rate: float, seed: int) -> Path:
        """The folder of a run, whose name follows from all that the run depends on but for its length."""
        config = {
            "size": self.size,
            "objective": asdict(OBJECTIVES[self.objective]),
            "learning_rate": learning_rate,
            "warmup_steps": self.warmup_steps,
            "batch_size": self.batch_size,
            "validate_every": self.validate_every,
            "data": content_hash(self.data / f"{part}.parquet" for part in ("train", "test")),
        }
        label = f"rate-{learning_rate:g}-seed-{seed}-{short_hash(config)}"
        return self.output / name.replace(" ", "-") / label

    @property
    def warmup_steps(self) -> int:
        """Steps until the learning rate is reached, within the search."""
        return min(WARMUP, self.search_steps - 1)


class NoisePredictor(nn.Module):
    """A contender with the methods of our networks that the training loop calls."""

    segmentation_head = instance_head = None

    def __init__(self, contender: Contender) -> None:
        super().__init__()
        self.network, self.predict = contender.network, contender.predict

    def forward(self, noisy: Tensor, timesteps: Tensor, class_labels: None, head: str) -> UNetOutput:
        """Predicts for noisy images (B, C, H, W) at timesteps (B,); the prediction is (B, C, H, W)."""
        return UNetOutput(sample=self.predict(noisy, timesteps))

    def to_diffusion(self) -> "NoisePredictor":
        """Returns itself, since it has no other head."""
        return self

    def register_to_config(self, **values: Any) -> None:
        """Does nothing, since it has no config."""


class LossAlone(DiffusionTask):
    """Noise prediction without previews and without a saved pipeline."""

    def check_network(self, unet: Any) -> None:
        """Checks nothing, since the network has no config."""

    def preview(self, unet: Any, path: Path) -> None:
        """Writes nothing."""

    def export(self, unet: Any, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Writes nothing."""


class RecordingTrainer(TimedTrainer):
    """Records with each validation the processor seconds of all training steps so far."""

    def _record(self, **values: float) -> None:
        super()._record(**values, cpu_seconds=round(self.cpu_seconds, 2))


def validated(run: Path) -> Points:
    """The validations of a run, without those of steps that it will repeat when it resumes."""
    path = run / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return {
        row["step"]: {key: row[key] for key in ("validation_loss", "cpu_seconds")}
        for row in rows
        if "validation_loss" in row
    }


def compare(options: EqualSteps) -> str:
    """Trains what is not finished, writes `equal_steps.json`, `.md` and `.png`, and returns the table."""
    torch.set_num_threads(1)
    images = load_images(
        DataConfig(data=str(options.data / "train.parquet"), validation_data=str(options.data / "test.parquet"))
    )
    first, *_ = options.seeds
    search = {
        name: {
            rate: train(options, images, name, rate, first, options.search_steps)[options.search_steps]
            for rate in options.learning_rates
        }
        for name in options.networks
    }
    best = {name: min(rates, key=lambda rate: rates[rate]["validation_loss"]) for name, rates in search.items()}
    runs: dict[str, dict[int, Points]] = {name: {} for name in options.networks}
    for seed in options.seeds:
        for name in options.networks:
            runs[name][seed] = train(options, images, name, best[name], seed, options.steps)
            write_json(
                options.output / "equal_steps.json",
                {"options": asdict(options), "search": search, "learning_rate": best, "runs": runs},
            )
    text = search_table(search) + "\n" + table(runs)
    write_text(options.output / "equal_steps.md", text)
    save_plot(runs, options.output / "equal_steps.png")
    return text


def train(options: EqualSteps, images: ImageSets, name: str, learning_rate: float, seed: int, steps: int) -> Points:
    """Trains a run to the given step, if it is not there yet, and returns its validations up to that step."""
    output = options.folder(name, learning_rate, seed)
    if steps not in validated(output):
        config = TrainingConfig(
            steps=steps,
            batch_size=options.batch_size,
            learning_rate=learning_rate,
            warmup_steps=options.warmup_steps,
            schedule="constant",  # so that a short run is the beginning of a long one
            seed=seed,
            log_every=options.validate_every,
            validate_every=options.validate_every,
            preview_every=steps,
            checkpoint_every=options.validate_every,
            keep_checkpoints=1,
            trackers=(),
        )
        torch.manual_seed(keyed_seed(seed, "initialisation"))
        network = NoisePredictor(SIZES[options.size](name, images.train.width))
        objective = OBJECTIVES[options.objective]
        task = LossAlone(network, images, objective)  # type: ignore[arg-type]
        resolved = {"network": name, "objective": asdict(objective), "training": asdict(config)}
        RecordingTrainer(task, config, output, resolved, make_accelerator(config, output)).run()
    return {step: point for step, point in validated(output).items() if step <= steps}


def search_table(search: dict[str, dict[float, dict[str, float]]]) -> str:
    """The validation losses of all learning rates, as Markdown."""
    rates = list(next(iter(search.values())))
    lines = ([name, *(f"{points[rate]['validation_loss']:.4f}" for rate in rates)] for name, points in search.items())
    return markdown_table(("learning rate", *(f"{rate:g}" for rate in rates)), lines)


def table(runs: dict[str, dict[int, Points]]) -> str:
    """Losses at each validation, mean and range over seeds, and the ratio of ours to each other at the same seed."""
    others = [name for name in runs if name != OURS and OURS in runs]
    header = [*(f"{name}: loss, CPU seconds" for name in runs), *(f"ours / {name}" for name in others)]
    lines = []
    for step in sorted(set.intersection(*(set(points) for seeds in runs.values() for points in seeds.values()))):
        cells = []
        for seeds in runs.values():
            losses = [points[step]["validation_loss"] for points in seeds.values()]
            seconds = statistics.mean(points[step]["cpu_seconds"] for points in seeds.values())
            cells.append(f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}), {seconds:.0f}")
        for name in others:
            shares = [
                points[step]["validation_loss"] / runs[name][seed][step]["validation_loss"]
                for seed, points in runs[OURS].items()
            ]
            cells.append(f"{statistics.mean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
        lines.append([str(step), *cells])
    return markdown_table(("steps", *header), lines)


def save_plot(runs: dict[str, dict[int, Points]], path: Path) -> None:
    """Draws validation losses against steps and against processor seconds, a line for each seed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for position, what in enumerate(("optimizer steps", "CPU seconds of training, one thread"), start=1):
        axes = figure.add_subplot(1, 2, position)
        for colour, (name, seeds) in enumerate(runs.items()):
            for index, points in enumerate(seeds.values()):
                across = list(points) if position == 1 else [point["cpu_seconds"] for point in points.values()]
                losses = [point["validation_loss"] for point in points.values()]
                axes.plot(across, losses, f"C{colour}.-", alpha=0.8, label=None if index else name)
        axes.set(xlabel=what, ylabel="validation loss", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    print(compare(tyro.cli(EqualSteps, description=__doc__)))
