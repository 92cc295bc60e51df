"""D1: the share of training that waits for images, and the time until a program holds its first batch."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scripts import NETWORKS
from scripts.benchmarks.first_batch import BATCH, example, ours
from scripts.benchmarks.processes import start
from scripts.benchmarks.result_row import Row
from scripts.benchmarks.timing import alternate, ratio
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import RunContext, make_accelerator
from unet_diffusion.training.batches import Batches
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.trainer import Trainer

PEER = "diffusers' example"
SHARE = 0.03  # the largest part of a step that may wait for data
SOONER = 2.0  # times


class TimedTask(DiffusionTask):
    """Records when the training loop asks for each batch, and how long it waits."""

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """The batches, timed."""
        self.asked: list[float] = []
        self.waited: list[float] = []
        batches = super().batches(context, start_step)
        while True:
            self.asked.append(time.perf_counter())
            batch = next(batches)
            self.waited.append(time.perf_counter() - self.asked[-1])
            yield batch

    def shares(self) -> list[float]:
        """The part of each step that waited, without the first and the last step."""
        periods = [later - earlier for earlier, later in zip(self.asked, self.asked[1:])]
        return [waited / period for waited, period in zip(self.waited, periods)][1:]


def rows(data: Path, rounds: int) -> Iterator[Row]:
    """The rows of D1. Processes take long to start, so fewer rounds of them are timed."""
    yield from delivery(data, 2 * rounds)
    yield from first_batch(data, max(3, rounds // 5))


def delivery(data: Path, rounds: int) -> Iterator[Row]:
    """The share of our training loop that waits, with the smallest network, and the speed of both loaders alone.

    Args:
        data: Parquet files of grey images.
        rounds: number of batches that are timed.
    """
    with TemporaryDirectory() as folder:
        shares, step = waiting(data, Path(folder), rounds)
        low, share, high = statistics.quantiles(shares, n=4, method="inclusive")
        figure = f"{share:.2%} ({low:.2%} to {high:.2%}) of a step of {step:.3f} s waits for data"
        work = f"training loop, {BATCH} images a step, 0.38M parameters"
        details: dict[str, Any] = {"shares": shares}
        yield Row("D1", work, "itself", figure, share, f"{SHARE:.0%}", share <= SHARE, details, (low, high))

        loaders = {"ours": ours(str(data), folder), "example": example(str(data), folder)}
        seconds = alternate({name: partial(next, batches) for name, batches in loaders.items()}, rounds)
        faster = ratio(seconds["example"], seconds["ours"])
        rates = {name: BATCH / statistics.median(each) for name, each in seconds.items()}
        figure = f"{faster} times the images a second, {rates['ours']:,.0f} against {rates['example']:,.0f}"
        details = {"seconds": seconds}
        work = "images delivered by the loader alone"
        yield Row("D1", work, PEER, figure, faster.median, details=details, quartiles=(faster.low, faster.high))


def waiting(data: Path, folder: Path, steps: int) -> tuple[list[float], float]:
    """The waiting share of each step of our training loop, and the median seconds of a step."""
    config = TrainDDPM(
        output=folder / "run",
        data=DataConfig(data=str(data), cache_dir=str(folder), validation_fraction=0),
        diffusion=DiffusionConfig(preview_images=1),
        training=TrainingConfig(steps=steps + 2, batch_size=BATCH, trackers=()),
    )
    accelerator = make_accelerator(config.training, config.output)
    images = load_images(config.data)
    size = {"sample_size": images.train.height, "in_channels": 1, "out_channels": 1}
    task = TimedTask(load_unet(str(NETWORKS / "fashion-mnist-small.json"), size), images, config.diffusion)
    Trainer(task, config.training, config.output, asdict(config), accelerator).run()
    return task.shares(), statistics.median(later - earlier for earlier, later in zip(task.asked, task.asked[1:]))


def first_batch(data: Path, rounds: int) -> Iterator[Row]:
    """The time from the start of a process to its first batch, with an empty and with a full cache.

    The cache is the files that the programs themselves keep; the operating system holds those of the libraries in
    memory either way. The figure counts processor seconds, which other work on the machine does not lengthen; the
    details have wall-clock seconds too.

    Args:
        data: Parquet files of grey images.
        rounds: number of processes of each kind.
    """
    reports: dict[str, dict[str, list[dict[str, float]]]] = {
        cache: {"ours": [], "example": []} for cache in ("cold", "warm")
    }
    for _ in range(rounds):
        with TemporaryDirectory() as folder:
            for each in reports.values():
                for name, done in each.items():
                    done.append(report(name, data, Path(folder) / name))
    for cache, each in reports.items():
        sooner = ratio(*([one["processor"] for one in each[name]] for name in ("example", "ours")))
        medians = {
            name: [statistics.median(one[key] for one in done) for key in ("processor", "imports")]
            for name, done in each.items()
        }
        figure = f"{sooner} times as soon; " + " against ".join(
            f"{whole:.2f} s, {imports:.2f} s of it imports" for whole, imports in medians.values()
        )
        work = f"first batch from the start of a process, {cache} cache"
        met = sooner.median >= SOONER
        yield Row("D1", work, PEER, figure, sooner.median, f"{SOONER}x", met, dict(each), (sooner.low, sooner.high))


def report(name: str, data: Path, cache: Path) -> dict[str, float]:
    """The seconds that a new process takes until its first batch, as it prints them."""
    printed = start("first_batch", name, data, cache, time.time(), HF_DATASETS_OFFLINE="1")
    return json.loads(printed.splitlines()[-1])
