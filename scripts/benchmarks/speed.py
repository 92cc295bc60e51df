"""Times our networks against what a user would pick instead, side by side in one process, and prints a table.

Competing pieces of work are taken in turn (A B A B ...), so that a noisy machine disturbs all of them alike; a figure
is the median of the ratios of the rounds, with their quartiles. A peer that does not load on this machine is named, not
guessed.

    python -m scripts.benchmarks.speed --output runs/benchmark
"""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import tyro

from scripts.benchmarks import data_delivery, generation, growth, inference, training_step
from scripts.benchmarks.bars import save_bars
from scripts.benchmarks.contenders import CONTENDERS, nine_million
from scripts.benchmarks.row import Row, table
from unet_diffusion.files import write_json, write_text

STOCK, MONAI, LUCIDRAINS = CONTENDERS[1:]


@dataclass
class Benchmark:
    """What is measured."""

    output: Path
    """Folder for `benchmark.json`, `benchmark.md` and `benchmark.png`."""
    only: tuple[str, ...] = ()
    """Ids of benchmarks, such as T1; by default all: T1 (with T3), T2, T4, L1, G2, S1, S2 and, with `data`, D1, G1."""
    data: Path | None = None
    """Parquet file of Fashion-MNIST, for D1 and G1."""
    rounds: int = 15
    """Times that each piece of work is taken."""
    seed: int = 0
    """Weights, images and noise follow from it."""

    def __post_init__(self) -> None:
        """Checks every value."""
        known = benchmarks(self)
        for name in self.only:
            if name not in known:
                raise ValueError(f"only is {name!r}, but must be among {', '.join(known)}; D1 and G1 need data.")
        if self.rounds < 3:
            raise ValueError(f"rounds is {self.rounds}, but must be at least 3, or quartiles mean nothing.")


def benchmarks(config: Benchmark) -> dict[str, Callable[[], Iterator[Row]]]:
    """The benchmarks by id."""
    rounds, data, folder = config.rounds, config.data, config.output / "generation"
    faster = {STOCK: 2.0, MONAI: 1.5, LUCIDRAINS: 1.5}
    step = training_step.speed
    of_images: dict[str, Callable[[], Iterator[Row]]] = {}
    if data is not None:
        of_images = {
            "D1": partial(data_delivery.rows, data, rounds),
            "G1": partial(generation.speed, generation.recipe(data, folder / "run"), folder),
        }
    return {
        "T1": partial(
            step, "T1", "training step, 32x32, batch 16", partial(nine_million, side=32), 32, 16, rounds, faster
        ),
        "T2": partial(training_step.larger, rounds),
        "T4": training_step.memory,
        "L1": partial(growth.growth, rounds),
        "G2": partial(inference.evaluations, rounds),
        "S1": partial(inference.segmentation, rounds),
        "S2": inference.memory,
        **of_images,
    }


def run(config: Benchmark) -> list[Row]:
    """Measures, prints and writes; a run that is stopped leaves what was measured until then."""
    rows: list[Row] = []
    facts = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "options": {"rounds": config.rounds, "seed": config.seed, "data": str(config.data)},
    }
    for name, measure in benchmarks(config).items():
        if config.only and name not in config.only:
            continue
        torch.manual_seed(config.seed)
        for row in measure():
            rows.append(row)
            print(f"{row.id}  {row.work}  against {row.against}: {row.figure}", flush=True)
            write_json(config.output / "benchmark.json", {**facts, "rows": [asdict(row) for row in rows]})
            write_text(config.output / "benchmark.md", table(rows))
            save_bars(rows, config.output / "benchmark.png")
    return rows


if __name__ == "__main__":
    run(tyro.cli(Benchmark, description=__doc__))
