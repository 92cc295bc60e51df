"""Load: many images and many steps in one process, and whether what the process holds stays the same."""

import logging
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tifffile
import torch
from diffusers import DDPMScheduler
from fault_checks.finding import Finding
from fault_checks.gauge import SAMPLES, SETTLING, Gauge, Reading, new_process
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.commands.options import TrainDDPM
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics
from unet_diffusion.training.trainer import Trainer

PROMISE = "Load"
IMAGES = 10_000
STEPS = 20_000
RUNS = 10
BATCH = 5  # images generated at once
SLOWER = 0.1  # share of a step's time that it may grow by over the run
SLOWER_REDUCED = 0.5  # in a run of seconds, of which another program may take a good part
LOG_EVERY = 20
COMPRESSED_SLOPE = 4  # KiB that a compressed TIFF may leave behind; about 1 was seen, in the libraries that read it
SIDE = 8  # of the images that are learnt and generated


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """All measurements; the reduced ones have a twentieth of the images and a fortieth of the steps."""
    images, steps = (IMAGES // 20, STEPS // 40) if reduced else (IMAGES, STEPS)
    with new_process() as process:
        for name, measure, count in (
            ("generated and written as PNG", generate, images),
            ("segmented from arrays, PNG and TIFF files, then written as PNG, in the same process", segment, images),
            ("segmented in windows from file to file, .npy and TIFF", segment_files, max(images // 5, SAMPLES)),
            ("segmented, no two of one size", segment_sizes, images),
        ):
            reading = process.submit(measure, count, work).result()
            yield Finding(PROMISE, f"{count:,} images {name}", str(reading), reading.flat)
        count = max(images // 10, SAMPLES)
        reading = process.submit(segment_compressed, count, work).result()
        held = reading.same and reading.growth <= SETTLING + COMPRESSED_SLOPE * count
        yield Finding(PROMISE, f"{count:,} compressed TIFF files segmented in windows", str(reading), held)
    with new_process() as process:
        slower = SLOWER_REDUCED if reduced else SLOWER
        yield from process.submit(train, steps, 0, slower, work / "alone").result()
        yield from process.submit(train, steps // 2, 1, slower, work / "worker").result()
        yield process.submit(train_again, RUNS // 2 if reduced else RUNS, work / "again").result()


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
    """The same with compressed TIFF files, read through zarr, whose event loop does not give back all memory."""
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
    """Segments images of as many sizes, the largest first.

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


def train(steps: int, num_workers: int, slower: float, work: Path) -> list[Finding]:
    """A long run: memory, time and the log."""
    loop = trainer(steps, num_workers, work / "images", work / "run")
    gauge = loop.task.gauge = Gauge(steps)
    loop.run()
    reading, helpers = gauge.reading(), f"{num_workers} data workers"
    tenths = [1000 * np.median(tenth) for tenth in np.array_split(reading.seconds, 10)]
    times = (
        f"{min(tenths):.2f} to {max(tenths):.2f} ms; against fixed work beside it {reading.slowing:+.1%} by the line"
    )
    path = work / "run" / "metrics.jsonl"
    rows = read_metrics(path)
    logged = [row["step"] for row in rows if "loss" in row]
    complete = logged == [*range(LOG_EVERY, steps, LOG_EVERY), steps]
    longest = max(len(line) for line in path.read_text().splitlines())
    log = f"{len(logged)} lines of losses, {path.stat().st_size / steps:.1f} bytes a step, no line above {longest}"
    return [
        Finding(PROMISE, f"memory of {steps:,} training steps, {helpers}", str(reading), reading.flat),
        Finding(PROMISE, f"CPU time of a step over {steps:,}, {helpers}", times, reading.slowing <= slower),
        Finding(PROMISE, f"log of {steps:,} training steps, {helpers}", log, complete),
    ]


def train_again(runs: int, work: Path) -> Finding:
    """Runs with data workers, one after the other in one process: nothing of a finished one goes on."""
    process = psutil.Process()
    held = []
    for number in range(runs):
        trainer(2, 1, work / "images", work / f"run-{number}").run()
        held.append((len(process.children()), process.num_fds(), process.num_threads()))
    children, handles, threads = zip(*held)
    others = f"handles {handles[0]} -> {handles[-1]}, threads {threads[0]} -> {threads[-1]}"
    figure = f"{max(children)} data workers left, {others}"
    still = max(children) == 0 and handles[-1] <= handles[0] and threads[-1] <= threads[0]
    return Finding(PROMISE, f"{runs} training runs one after the other in one process", figure, still)
