"""The peak memory of segmenting one large image; `tiling memory` runs it in a new process for every case."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
import tyro

from scripts.benchmarks.processes import resident
from unet_diffusion import UNet
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_seed

ROWS_AT_ONCE = 256  # of a generated image


def peak_memory(preset: str, height: int, width: int, seed: int) -> dict[str, Any]:
    """Segments a generated image from file to file in a fresh process, and returns memory (MiB) and time (seconds).

    The peak is that of the whole process, the interpreter and PyTorch included, as the kernel counts it (VmHWM;
    ru_maxrss of a new process begins with that of its parent). Files count while they are mapped. The largest anonymous
    memory, which excludes files and the code of libraries, is sampled.
    """
    torch.manual_seed(keyed_seed(seed, "network"))
    pipe = SegmentationPipeline(UNet.from_preset(preset, num_classes=2).eval())
    with TemporaryDirectory() as folder:
        image = Path(folder) / "image.npy"
        write_image(image, (height, width, pipe.unet.config.in_channels), seed)
        before = {name: int(resident(name)) for name in ("VmHWM", "RssAnon")}
        started, cpu = time.monotonic(), time.process_time()
        with sampled("RssAnon") as most:
            pipe.segment_file(image, Path(folder) / "mask.npy")
        return {
            "image_mib": round(image.stat().st_size / 2**20, 1),
            "before_mib": before["VmHWM"],
            "peak_mib": int(resident("VmHWM")),
            "anonymous_before_mib": before["RssAnon"],
            "anonymous_mib": int(most["RssAnon"]),
            "wall_seconds": round(time.monotonic() - started),
            "cpu_seconds": round(time.process_time() - cpu),
        }


def write_image(path: Path, shape: tuple[int, int, int], seed: int) -> None:
    """Writes 8-bit noise (H, W, C) block by block without a memory map, so that none of it stays resident."""
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], ROWS_AT_ONCE):
            block = random.integers(0, 256, (min(ROWS_AT_ONCE, shape[0] - start), *shape[1:]), dtype=np.uint8)
            file.write(block.data)


@contextmanager
def sampled(name: str, seconds: float = 0.02) -> Iterator[dict[str, float]]:
    """Yields a dictionary in which a thread keeps the largest `resident(name)` until the block ends."""
    most = {name: resident(name)}
    stop = Event()

    def look() -> None:
        while not stop.wait(seconds):
            most[name] = max(most[name], resident(name))

    thread = Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    print(json.dumps(tyro.cli(peak_memory)))
