"""Many images and many steps in one process do not make it hold more."""

import gc
import logging
import os
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tifffile
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.reliability.gauge import SAMPLES, SETTLING, Gauge, Reading, new_process
from unet_diffusion import UNet
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, save_curves
from unet_diffusion.training.trainer import Trainer

PROMISE = "Load"
BATCH = 5  # images generated at once
LOG_EVERY = 20
COMPRESSED_SLOPE = 4  # KiB that a compressed TIFF may leave behind; about 1 was seen, in the libraries that read it
SIDE = 8  # of the images that are learnt and generated


@pytest.fixture(scope="module")
def images(full) -> int:
    return 10_000 if full else 500


@pytest.fixture(scope="module")
def inference() -> Iterator[ProcessPoolExecutor]:
    """The process of all tests that generate or segment."""
    with new_process() as process:
        yield process


@pytest.fixture(scope="module")
def training() -> Iterator[ProcessPoolExecutor]:
    """The process of all tests that train."""
    with new_process() as process:
        yield process


def network() -> UNet:
    """One of the smallest that have all kinds of layers, with both heads."""
    torch.set_num_threads(1)
    return UNet(SIDE, in_channels=1, out_channels=1, channels=(4, 8), head_channels=8, num_classes=2).eval()


def generate(count: int, work: Path) -> Reading:
    """Generates images in small batches."""
    pipe = ImageGenerationPipeline(network(), DDPMScheduler())
    pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    gauge = Gauge(count // BATCH, BATCH)
    for _ in range(count // BATCH):
        for image in pipe(batch_size=BATCH, num_inference_steps=3).images:
            image.save(work / "generated.png")
        gauge.see()
    return gauge.reading()


def segment(count: int, work: Path) -> Reading:
    """Segments small images from memory and from files in turn."""
    pipe = SegmentationPipeline(network())
    image = np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)
    Image.fromarray(image).save(work / "image.png")
    sources = [image, work / "image.png", *write_tiffs(work, image)]
    gauge = Gauge(count)
    for number in range(count):
        output = pipe(sources[number % len(sources)])
        output.masks[0].save(work / "mask.png")
        gauge.see()
    return gauge.reading()


def segment_files(count: int, work: Path) -> Reading:
    """Segments files in windows, into files."""
    pipe = SegmentationPipeline(network())
    image = np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)
    np.save(work / "image.npy", image)
    return segment_each(pipe, [work / "image.npy", write_tiffs(work, image)[0]], count, work)


def segment_compressed(count: int, work: Path) -> Reading:
    """The same with compressed TIFF files, read through zarr, whose event loop does not free all memory."""
    image = np.random.default_rng(0).integers(0, 256, (24, 20), dtype=np.uint8)
    return segment_each(SegmentationPipeline(network()), write_tiffs(work, image)[1:], count, work)


def segment_each(pipe: SegmentationPipeline, sources: list[Path], count: int, work: Path) -> Reading:
    """Segments files in turn, into files."""
    gauge = Gauge(count)
    for number in range(count):
        source = sources[number % len(sources)]
        target = work / f"mask{source.suffix}"
        pipe.segment_file(source, target)
        target.unlink()
        gauge.see()
    return gauge.reading()


def write_tiffs(work: Path, image: np.ndarray) -> list[Path]:
    """A TIFF that can be mapped into memory, and a compressed one that cannot."""
    paths = [work / "plain.tif", work / "compressed.tif"]
    for path, compression in zip(paths, (None, "zlib")):
        tifffile.imwrite(path, image, compression=compression)
    return paths


def segment_sizes(count: int, work: Path) -> Reading:
    """Segments images of many sizes, the largest first.

    The first half is the warm-up: an image larger than all before needs more working memory, and oneDNN keeps the
    compiled kernels of about as many sizes as its cache holds.
    """
    pipe = SegmentationPipeline(network())
    pipe.set_progress_bar_config(disable=True)
    random = np.random.default_rng(0)
    sides = range(1, int(np.ceil(count**0.5)) + 1)
    sizes = sorted(product(sides, sides), key=lambda size: -size[0] * size[1])[:count]
    gauge = Gauge(count)
    for size in sizes:
        pipe(random.integers(0, 256, size, dtype=np.uint8))
        gauge.see()
    return gauge.reading(warm_up=SAMPLES // 2)


class MeasuredTask(DiffusionTask):
    """Noise prediction that is measured at every step, with all that the loop did since the last."""

    gauge: Gauge | None = None

    def loss(self, *arguments: Any) -> torch.Tensor:
        """The loss of a batch."""
        if self.gauge is not None:
            self.gauge.see()
        return super().loss(*arguments)


def trainer(steps: int, num_workers: int, folder: Path, output: Path) -> Trainer:
    """A run as `train_ddpm` makes it, of a few tiny images, with few validations and previews and no checkpoint."""
    logging.disable(logging.WARNING)
    if not folder.exists():
        folder.mkdir(parents=True)
        for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE), dtype=np.uint8)):
            Image.fromarray(pixels).save(folder / f"{number}.png")
    rare = max(steps // 20, 1)  # twice in the warm-up
    options = TrainDDPM(
        output=output,
        data=DataConfig(str(folder), validation_fraction=0.25, cache_dir=f"{folder}-cache", num_workers=num_workers),
        diffusion=DiffusionConfig(preview_images=4),
        training=TrainingConfig(
            steps=steps,
            batch_size=2,
            warmup_steps=1,
            log_every=LOG_EVERY,
            validate_every=rare,
            preview_every=rare,
            checkpoint_every=steps,
        ),
    )
    accelerator = make_accelerator(options.training, output)
    task = MeasuredTask(network(), load_images(options.data), options.diffusion, num_workers)
    return Trainer(task, options.training, output, asdict(options), accelerator)


@dataclass(frozen=True)
class MeasuredRun:
    """A run, and what was measured in it.

    Attributes:
        reading: of memory and time, at every step.
        logged: steps whose losses are in metrics.jsonl.
        log: the sizes of the log: bytes, and bytes of its longest line.
    """

    reading: Reading
    logged: list[int]
    log: tuple[int, int]


def train(steps: int, num_workers: int, work: Path) -> MeasuredRun:
    """Trains for many steps."""
    loop = trainer(steps, num_workers, work / "images", work / "run")
    gauge = loop.task.gauge = Gauge(steps)
    loop.run()
    path = work / "run" / "metrics.jsonl"
    logged = [row["step"] for row in read_metrics(path) if "loss" in row]
    longest = max(len(line) for line in path.read_text().splitlines())
    return MeasuredRun(gauge.reading(), logged, (path.stat().st_size, longest))


def train_again(runs: int, work: Path) -> list[tuple[int, int, int]]:
    """Trains with data workers, again and again; returns the child processes, handles and threads after each run."""
    process = psutil.Process()
    held = []
    for number in range(runs):
        trainer(2, 1, work / "images", work / f"run-{number}").run()
        held.append((len(process.children()), process.num_fds(), process.num_threads()))
    return held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "share", "name"),
    [
        (generate, 1, "generated and written as PNG"),
        (segment, 1, "segmented from arrays, PNG and TIFF files, then written as PNG, in the same process"),
        (segment_files, 5, "segmented in windows from file to file, .npy and TIFF"),
        (segment_sizes, 1, "segmented, no two of one size"),
    ],
    ids=["generate", "segment", "segment_files", "segment_sizes"],
)
def test_memory_with_many_images(measure, share, name, images, inference, tmp_path, record_property):
    count = max(images // share, SAMPLES)
    record_property("fault", f"{count:,} images {name}")
    reading = inference.submit(measure, count, tmp_path).result()
    assert reading.flat, str(reading)
    record_property("figure", str(reading))


@pytest.mark.slow
def test_memory_with_compressed_TIFF_files(images, inference, tmp_path, record_property):
    count = max(images // 10, SAMPLES)
    record_property("fault", f"{count:,} compressed TIFF files segmented in windows")
    reading = inference.submit(segment_compressed, count, tmp_path).result()
    assert reading.same and reading.growth <= SETTLING + COMPRESSED_SLOPE * count, str(reading)
    record_property("figure", str(reading))


@pytest.fixture(scope="module", params=[0, 1], ids=["no data workers", "1 data worker"])
def long_run(request, full, training, tmp_path_factory) -> MeasuredRun:
    steps = (20_000 if full else 500) // (1 + request.param)
    return training.submit(train, steps, request.param, tmp_path_factory.mktemp("long")).result()


@pytest.mark.slow
def test_memory_of_many_training_steps(long_run, record_property):
    assert long_run.reading.flat, str(long_run.reading)
    record_property("figure", f"{long_run.logged[-1]:,} steps: {long_run.reading}")


@pytest.mark.slow
def test_CPU_time_of_a_training_step(long_run, full, record_property):
    """A run of a few seconds may grow by a larger share, since another program may take a good part of it."""
    slowing = long_run.reading.slowing
    assert slowing <= (0.1 if full else 0.5)
    tenths = [1000 * np.median(tenth) for tenth in np.array_split(long_run.reading.seconds, 10)]
    times = f"{min(tenths):.2f} to {max(tenths):.2f} ms"
    record_property("figure", f"{times}; {slowing:+.1%} against fixed work beside it, by the line")


@pytest.mark.slow
def test_log_of_many_training_steps(long_run, full, record_property):
    steps = long_run.reading.samples[-1, 0]
    assert long_run.logged == [*range(LOG_EVERY, steps, LOG_EVERY), steps]
    size, longest = long_run.log
    figure = f"{len(long_run.logged)} lines of losses, {size / steps:.1f} bytes a step, no line above {longest}"
    record_property("figure", figure)


@pytest.mark.slow
def test_training_runs_one_after_the_other_in_one_process(full, training, tmp_path, record_property):
    """No part of a finished run stays active."""
    held = training.submit(train_again, 10 if full else 5, tmp_path).result()
    children, handles, threads = zip(*held)
    assert max(children) == 0
    assert handles[-1] <= handles[0] and threads[-1] <= threads[0]
    others = f"handles {handles[0]} -> {handles[-1]}, threads {threads[0]} -> {threads[-1]}"
    record_property("figure", f"{len(held)} runs: no data workers left, {others}")


def test_a_plot_holds_nothing_of_its_caller(tmp_path):
    """The parser of mathematical text keeps its last errors, with all frames up to the training loop."""

    class Big:
        pass

    def plot() -> weakref.ref:
        big = Big()
        save_curves([{"step": step, "loss": 0.1**step} for step in range(1, 4)], tmp_path / "c.png", {"loss": ["loss"]})
        return weakref.ref(big)

    gc.disable()
    try:
        assert plot()() is None
    finally:
        gc.enable()


def test_segmenting_compressed_TIFFs_leaves_no_file_open(tmp_path):
    pipe = SegmentationPipeline(UNet.from_preset("tiny", num_classes=2).eval())
    source = tmp_path / "image.tif"
    tifffile.imwrite(source, np.zeros((20, 24), np.uint8), compression="zlib")

    def opened() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(link.exists() and link.samefile(source) for link in links)

    gc.disable()
    try:
        for number in range(3):
            pipe.segment_file(source, tmp_path / f"mask-{number}.npy")
        assert opened() == 0
    finally:
        gc.enable()
