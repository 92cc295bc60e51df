"""Times our networks against those of other libraries, side by side in one process, and prints a table.

Competing pieces of work take turns (A B A B ...), so that a noisy machine disturbs all of them alike. A figure is the
median of the ratios of the rounds, with their quartiles. Both sides are timed in float32 and, where the device has it,
in bfloat16; a third ratio is that of ours in the precision that our commands take to the peer in float32. A peer that
does not load on this machine is reported.

    python -m scripts.benchmarks.speed --output runs/benchmark
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from scripts.benchmarks import data_delivery, generation, growth, inference, training_step
from scripts.benchmarks.compared_networks import CONTENDERS, nine_million
from scripts.benchmarks.ratio_chart import save_ratios
from scripts.benchmarks.result_row import Comparison, Row, row_of, table
from scripts.benchmarks.timing import AS_THEY_COME
from scripts.reports import circumstances
from unet_diffusion.checks import require
from unet_diffusion.files import write_json, write_text
from unet_diffusion.network.precision import PRECISIONS

STOCK, MONAI, LUCIDRAINS = CONTENDERS[1:]
Rows = Iterator[Row] | Iterator[Comparison]


@dataclass
class Benchmark:
    """Time our networks beside those of other libraries."""

    output: Path
    """Folder for `benchmark.json`, `benchmark.md` and `benchmark.png`; rows of other benchmarks stay in them."""
    only: tuple[str, ...] = ()
    """Benchmarks to run, such as T1; by default all: T1, T2, T3, T4, L1, G2, S1, S2 and, with `data`, D1, G1."""
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


def benchmarks(config: Benchmark) -> dict[str, Callable[[], Rows]]:
    """The functions of all benchmarks, by id."""
    rounds, data, folder = config.rounds, config.data, config.output / "generation"
    float32 = PRECISIONS["no"]
    faster = {STOCK: {float32: 2.0, AS_THEY_COME: 5.0}, MONAI: {float32: 1.5}, LUCIDRAINS: {float32: 1.5}}
    make = partial(nine_million, side=32)
    of_images: dict[str, Callable[[], Rows]] = {}
    if data is not None:
        of_images = {
            "D1": partial(data_delivery.rows, data, rounds),
            "G1": partial(generation.speed, generation.recipe(data, folder / "run"), folder),
        }
    return {
        "T1": partial(
            training_step.speed, "T1", "training step, 32x32, batch 16", make, 32, 16, rounds, faster, muon=True
        ),
        "T2": partial(training_step.larger, rounds),
        "T3": partial(training_step.share, make, 32, 16, rounds),
        "T4": training_step.memory,
        "L1": partial(growth.growth, rounds),
        "G2": partial(inference.evaluations, rounds),
        "S1": partial(inference.segmentation, rounds),
        "S2": inference.memory,
        **of_images,
    }


def run(config: Benchmark) -> list[Row | Comparison]:
    """Measures and prints; the files are written after every row, so that a stopped run leaves its rows.

    Rows of other benchmarks stay in the files; each row has the circumstances in which it was measured.
    """
    path = config.output / "benchmark.json"
    written = read_rows(path)
    facts = circumstances()
    facts["options"] = {"rounds": config.rounds, "seed": config.seed, "data": str(config.data)}
    for name, measure in benchmarks(config).items():
        if config.only and name not in config.only:
            continue
        written = [row for row in written if row["id"] != name]
        torch.manual_seed(config.seed)
        for row in measure():
            written.append({**asdict(row), **facts})
            print(f"{row.id}  {row.work}  against {row.against}: {row.figure}", flush=True)
            rows = [row_of(values) for values in written]
            write_json(path, {"rows": written})
            write_text(config.output / "benchmark.md", table(rows))
            save_ratios(rows, config.output / "benchmark.png")
    return [row_of(values) for values in written]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are on disk; earlier files have the circumstances once for all of them."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = found.pop("rows")
    return [{**found, **row} for row in rows]


if __name__ == "__main__":
    run(tyro.cli(Benchmark, description=__doc__))
