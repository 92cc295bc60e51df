"""Times our networks against those of other libraries, side by side in one process, and prints a table.

Competing pieces of work take turns (A B A B ...), so that a noisy machine disturbs all of them alike. A figure is the
median of the ratios of the rounds, with their quartiles. A peer that does not load on this machine is reported.

    python -m scripts.benchmarks.speed --output runs/benchmark
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from scripts.benchmarks import data_delivery, generation, growth, inference, training_step
from scripts.benchmarks.bar_chart import save_bars
from scripts.benchmarks.compared_networks import CONTENDERS, nine_million
from scripts.benchmarks.result_row import Row, table
from scripts.reports import circumstances
from unet_diffusion.checks import require
from unet_diffusion.files import write_json, write_text

STOCK, MONAI, LUCIDRAINS = CONTENDERS[1:]


@dataclass
class Benchmark:
    """Time our networks beside those of other libraries."""

    output: Path
    """Folder for `benchmark.json`, `benchmark.md` and `benchmark.png`."""
    only: tuple[str, ...] = ()
    """Benchmarks to run, such as T1; by default all: T1 (with T3), T2, T4, L1, G2, S1, S2 and, with `data`, D1, G1."""
    data: Path | None = None
    """Parquet file of Fashion-MNIST, for D1 and G1."""
    rounds: int = 15
    """How many times each piece of work is timed."""
    seed: int = 0
    """Determines weights, images and noise."""

    def __post_init__(self) -> None:
        """Checks every value."""
        known = benchmarks(self)
        for name in self.only:
            require(name in known, "only", name, f"must be among {', '.join(known)}; D1 and G1 need the option data")
        require(self.rounds >= 3, "rounds", self.rounds, "must be at least 3, since quartiles are reported")


def benchmarks(config: Benchmark) -> dict[str, Callable[[], Iterator[Row]]]:
    """The functions of all benchmarks, by id."""
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
    """Measures and prints; the files are written after every row, so that a stopped run leaves its rows."""
    rows: list[Row] = []
    facts = circumstances()
    facts["options"] = {"rounds": config.rounds, "seed": config.seed, "data": str(config.data)}
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
