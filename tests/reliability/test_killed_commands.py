"""Segmenting, enlarging and generating that are killed or stopped at any moment, and started again."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from tests.reliability import children
from tests.support import segmentation, super_resolution, tiny
from unet_diffusion.cli import run
from unet_diffusion.pipelines import ImageGenerationPipeline, SuperResolutionPipeline

PROMISE = "Nothing lost"
IMAGES = 24
UNNAMED = {".lock", "segment.jsonl", "upscale.jsonl", "sample.jsonl"}  # records hold times
COMMANDS = {
    "segment": ("--tile-size", "16"),
    "upscale": ("--steps", "3"),
    "sample": ("--count", str(IMAGES), "--max-batch", "5", "--steps", "3"),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run for each command, and images with equal names in several folders, one of which is broken."""
    folder = tmp_path_factory.mktemp("commands")
    segmentation.saved(folder / "segment")
    SuperResolutionPipeline(super_resolution.network(), DDPMScheduler(), 2).save_pretrained(folder / "upscale")
    ImageGenerationPipeline(tiny.network(), DDPMScheduler()).save_pretrained(folder / "sample")
    for i in range(IMAGES):
        path = folder / "images" / f"{i % 5}" / f"{i // 10}.{('png', 'tif')[i // 5 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "images" / "3" / "broken.png").write_bytes(b"no image")
    return folder


def job(command: str, runs: Path, output: Path) -> Callable[[], None]:
    inputs = () if command == "sample" else ("--inputs", str(runs / "images"))
    arguments = ["--run", str(runs / command), "--output", str(output), "--device", "cpu", *inputs, *COMMANDS[command]]

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            run(command, arguments)
        except SystemExit as ended:
            if "1 of 25 inputs failed" not in str(ended.code):
                raise

    return work


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNNAMED)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_killed_or_stopped_ends_like_an_undisturbed_one(
    command, runs, tmp_path, full, record_property
):
    started = time.monotonic()
    assert children.run(tmp_path / "log", job(command, runs, tmp_path / "whole")) == ""
    seconds = time.monotonic() - started
    whole, count = tree(tmp_path / "whole"), 20 if full else 4
    assert len(whole) == {"segment": 2 * IMAGES + 1, "upscale": IMAGES, "sample": IMAGES + 1}[command]
    draw, found, stopped = random.Random(command), [], 0
    for number in range(count):
        output = tmp_path / f"{number}"
        for signal_number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
            process = children.start(tmp_path / f"{number}.log", job(command, runs, output))
            process.join((number + draw.random()) / count * seconds)
            if process.exitcode is None:
                stopped += 1
                os.kill(process.pid, signal_number)
                process.join(60)
            found.append(len(tree(output)))
        assert children.run(tmp_path / f"{number}.log", job(command, runs, output)) == ""
        assert tree(output) == whole
    record_property("fault", f"{command} of {IMAGES} images killed, stopped by Ctrl-C, and killed again")
    assert stopped >= count
    record_property(
        "figure",
        f"{count} of {count} ended with the same files and table, after {stopped} stops at {min(found)} to "
        f"{max(found)} files",
    )
