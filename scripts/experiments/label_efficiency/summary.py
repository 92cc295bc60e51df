"""The results of the experiment with few labels: the rows that are kept, tables, paired differences, a plot."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.stats import t as student

from scripts.experiments.label_efficiency.experiment import METHODS, Run
from unet_diffusion.files import write_json, written_aside

Row = dict[str, Any]  # as `few_labels.training.train_and_test` gives it
BASE = "scratch"  # the method that others are compared with
FEW, MANY = 10, 40  # labelled images: what a method makes of few is compared with what the base makes of many
KEY = ("data", "method", "labels", "seed", "config")


def read_rows(path: Path) -> list[Row]:
    """The runs that are finished.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= {*KEY} for row in rows):
        raise ValueError(f"results is {path}, but it holds no list of runs; give another file.")
    return rows


def add_row(path: Path, row: Row) -> None:
    """Writes a run beside those that are there, which another process may have written meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        write_json(path, [*read_rows(path), row])


def row_of(rows: Sequence[Row], run: Run) -> Row | None:
    """The row of a run, if it is finished."""
    return next((row for row in rows if all(row[name] == getattr(run, name) for name in KEY)), None)


def paired_difference(rows: Sequence[Row], base: Sequence[Row]) -> tuple[float, float]:
    """How far a method lies above another in the mean IoU of a test image, as mean and half of a 95% interval.

    The differences d[s, p] are those of seed s, which both methods have, on image p, where both are defined. The mean
    is that over all of them. Seeds and images are both taken for samples: the variance of the mean is that of the S
    means over the images divided by S, plus that of the P means over the seeds divided by P (a little too large, as
    both hold the remaining noise once). The interval is Student's, with the degrees of freedom of Welch and
    Satterthwaite: few seeds that disagree make it wide. With one seed it knows the images alone. It says nothing of
    other labelled images or another pretraining, which all runs share.

    Returns:
        NaN for both without a common seed, and for the interval with one seed and one image.
    """
    by_seed = {row["seed"]: row["images"] for row in base}
    pairs = [(row["images"], by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not pairs:
        return float("nan"), float("nan")
    scores = np.array(pairs, dtype=float)  # (S, 2, P); None becomes NaN
    differences = scores[:, 0] - scores[:, 1]
    differences = differences[:, ~np.isnan(differences).any(axis=0)]
    if not differences.size:
        return float("nan"), float("nan")
    parts = [(means.var(ddof=1) / len(means), len(means) - 1) for means in axis_means(differences) if len(means) > 1]
    variance = sum(part for part, _ in parts)
    if not parts or variance == 0:
        return differences.mean(), 0.0 if parts else float("nan")
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(differences.mean()), float(student.ppf(0.975, freedom) * variance**0.5)


def axis_means(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means (S,) over the images, and (P,) over the seeds."""
    return differences.mean(axis=1), differences.mean(axis=0)


def cells(rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """The rows of one set by method and number of labels."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    labels = sorted({row["labels"] for row in rows})
    return {
        method: {count: [row for row in rows if (row["method"], row["labels"]) == (method, count)] for count in labels}
        for method in methods
    }


def summary(rows: Sequence[Row]) -> str:
    """Tables of each set as Markdown: mean IoU, differences from scratch, and what the runs cost."""
    names = dict.fromkeys(row["data"] for row in rows)
    return "\n".join(set_summary(name, cells([row for row in rows if row["data"] == name])) for name in names)


def set_summary(name: str, found: Mapping[str, Mapping[int, list[Row]]]) -> str:
    """The tables of one set."""
    counts = list(next(iter(found.values())))
    seeds = sorted({row["seed"] for by_count in found.values() for rows in by_count.values() for row in rows})
    header = ["| method | " + " | ".join(f"{count} label{'s' * (count != 1)}" for count in counts) + " |"]
    header += ["| --- " * (len(counts) + 1) + "|"]
    lines = [
        f"## {name}",
        "",
        f"Mean IoU on the test images, mean (least to most) of seeds {', '.join(map(str, seeds))}:",
        "",
    ]
    lines += header
    for method, by_count in found.items():
        lines.append(f"| {method} | {' | '.join(shown(rows, len(seeds)) for rows in by_count.values())} |")
    if BASE in found and len(found) > 1:
        lines += ["", f"Above {BASE}, mean IoU of an image, paired by seed and image, with 95% intervals:", ""]
        lines += header
        for method, by_count in found.items():
            if method != BASE:
                differences = (paired_difference(rows, found[BASE][count]) for count, rows in by_count.items())
                texts = ("" if np.isnan(mean) else f"{mean:+.3f} +- {half:.3f}" for mean, half in differences)
                lines.append(f"| {method} | {' | '.join(texts)} |")
    if found.get(BASE, {}).get(MANY) and len(found) > 1 and FEW in counts:
        lines += ["", f"With {FEW} labels above {BASE} with {MANY}, likewise:", "", "| method | difference |"]
        lines += ["| --- | --- |"]
        for method, by_count in found.items():
            mean, half = paired_difference(by_count[FEW], found[BASE][MANY])
            if not np.isnan(mean):
                lines.append(f"| {method} | {mean:+.3f} +- {half:.3f} |")
    lines += ["", "| method | parameters | CPU seconds of a run | of its pretraining |", "| --- | --- | --- | --- |"]
    for method, by_count in found.items():
        every = [row for rows in by_count.values() for row in rows]
        seconds, before = (statistics.mean(row[key] for row in every) for key in ("seconds", "pretraining_seconds"))
        lines.append(f"| {method} | {every[0]['parameters']:,} | {seconds:.0f} | {f'{before:.0f}' if before else ''} |")
    return "\n".join(lines) + "\n"


def shown(rows: Sequence[Row], seeds: int) -> str:
    """Mean and range of the rows of a cell, and how many there are where some of the seeds are missing."""
    values = [row["mean_iou"] for row in rows]
    if not values:
        return ""
    remarks = []
    if len(values) > 1:
        remarks.append(f"{min(values):.3f} to {max(values):.3f}")
    if len(values) < seeds:
        remarks.append(f"{len(values)} of {seeds} seeds")
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({', '.join(remarks)})" if remarks else mean


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a panel for each set: mean IoU against the number of labels, a line with the range over seeds a method.

    Args:
        rows: at least one.
        path: the PNG to write.
    """
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(5.2 * len(names), 4.4), layout="constrained")
    lines = {}
    for position, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), position)
        found = cells([row for row in rows if row["data"] == name])
        for method, by_count in found.items():
            values = {count: [row["mean_iou"] for row in each] for count, each in by_count.items() if each}
            colour = f"C{METHODS.index(method)}"  # the same in every plot
            means = [statistics.mean(each) for each in values.values()]
            (lines[method],) = axes.plot([*values], means, ".-", color=colour)
            low, high = ([limit(each) for each in values.values()] for limit in (min, max))
            axes.fill_between([*values], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([*next(iter(found.values()))]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))  # plain text, as in figures.py
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=name, xlabel="labelled images", ylabel="mean IoU, test")
        axes.grid(alpha=0.3)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=4, fontsize="small")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)
