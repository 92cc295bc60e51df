"""Times training steps beside busy programs: with PyTorch's own threads, and with those that our commands choose.

Each measurement is a process of its own, in which the steps of a network (forward, backward, AdamW) on random images
are timed after the first ones. The ways take turns; a figure is the median of the rounds, with least and most.

    python -m scripts.benchmarks.threads --output runs/benchmark-threads
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from scripts import NETWORKS
from scripts.benchmarks.processes import start
from scripts.reports import circumstances, markdown_table
from unet_diffusion.checks import is_count, require
from unet_diffusion.files import write_json, write_text

WAYS = {"default": "PyTorch's default", "ours": "as our commands"}
BUSY = "while True: pass"


@dataclass
class BenchmarkThreads:
    """Time training steps beside busy programs."""

    output: Path
    """Folder for `benchmark_threads.json` and `benchmark_threads.md`."""
    model: Path = NETWORKS / "digits.json"
    """JSON file of config values."""
    busy: tuple[int, ...] = (0, 1, 2)
    """Numbers of other programs, each of which keeps a core busy."""
    steps: int = 20
    """Steps that are timed in each round."""
    batch_size: int = 32
    """Images of 28 x 28 in a step."""
    rounds: int = 3
    """How many times each way is timed."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("steps", "batch_size", "rounds"):
            require(is_count(getattr(self, name)), name, getattr(self, name), "must be at least 1")
        require(all(is_count(each, 0) for each in self.busy), "busy", self.busy, "each must be 0 or more")


def run(options: BenchmarkThreads) -> str:
    """Times all cases, writes the rows and the table, and returns the table.

    Raises:
        ValueError: the environment says how many threads there are.
    """
    stated = os.environ.get("OMP_NUM_THREADS")
    require(stated is None, "OMP_NUM_THREADS", stated, "must not be set, since the number of threads is compared")
    rows = []
    for count in options.busy:
        with busy_programs(count):
            for number in range(options.rounds):
                for way in WAYS:
                    made = json.loads(start("threaded_steps", way, options.model, options.steps, options.batch_size))
                    rows.append({"busy": count, "round": number, "way": way, **made})
    write_json(options.output / "benchmark_threads.json", {"rows": rows, "circumstances": circumstances()})
    table = []
    for count in options.busy:
        cells = []
        for way in WAYS:
            chosen = [row for row in rows if (row["busy"], row["way"]) == (count, way)]
            threads = "/".join(map(str, sorted({row["threads"] for row in chosen})))
            cells.append(f"{shown([row['seconds'] for row in chosen])}, {threads} threads")
        table.append([str(count), *cells])
    text = markdown_table(("busy programs", *(f"seconds a step, {name}" for name in WAYS.values())), table)
    write_text(options.output / "benchmark_threads.md", text)
    return text


def shown(seconds: Sequence[float]) -> str:
    """The median, with least and most."""
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})"


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Keeps a core busy with each of some programs, for the length of a block."""
    # a session of its own, as a program in another terminal has, between which Linux divides the processor
    programs = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


if __name__ == "__main__":
    print(run(tyro.cli(BenchmarkThreads, description=__doc__)))
