"""The results of the experiment: rows on disk, tables, paired differences, a plot."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from scipy.stats import t as student

from scripts.experiments.label_efficiency.experiment import FILES, METHODS, Run
from scripts.reports import label_ticks, markdown_table, save_figure
from unet_diffusion.files import write_text

Row = dict[str, Any]  # as `training.train_and_test` returns it
BASE = "scratch"  # the method that the others are compared with
FEW, MANY = 10, 40  # labelled images: a method with few is compared with the base with many
KEY = ("data", "method", "labels", "seed", "config")  # and the draw; earlier results name neither it nor the files


def read_rows(path: Path) -> list[Row]:
    """The finished runs.

    Raises:
        ValueError: the file does not hold a list of runs.
    """
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= {*KEY} for row in rows):
        raise ValueError(f"results is {path}, but it does not hold a list of runs; give another file.")
    return rows


def add_row(path: Path, row: Row) -> None:
    """Adds a run to those on disk, some of which another process may have written in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read_rows(path)
        if not any(is_same_run(row, other) for other in rows):
            lines = ",\n".join(map(json.dumps, [*rows, row]))  # one for each run
            write_text(path, f"[\n{lines}\n]\n")


def row_of(rows: Sequence[Row], run: Run) -> Row | None:
    """The row of a run, or None if it is not finished."""
    return next((row for row in rows if is_same_run(row, vars(run))), None)


def is_same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows are of the same run."""
    if FILES not in one["config"] or FILES not in other["config"]:
        one, other = ({**row, "config": row["config"] | {FILES: None}} for row in (one, other))
    return draw_of(one) == draw_of(other) and all(one[name] == other[name] for name in KEY)


def draw_of(row: Mapping[str, Any]) -> int:
    """The choice of labelled images of a run."""
    return row.get("draw", 0)


def paired_difference(rows: Sequence[Row], base: Sequence[Row]) -> tuple[float, float]:
    """The difference of two methods in the mean IoU of a test image: its mean and half of its 95% interval.

    d[s, p] is the difference for a common seed s on image p, where both are defined; the mean is taken over all. Seeds
    and images both count as samples: the variance of the mean is that of the S means over the images divided by S, plus
    that of the P means over the seeds divided by P (slightly too large, since both contain the remaining noise). The
    interval is Student's, with the degrees of freedom of Welch and Satterthwaite, so that few seeds that disagree make
    it wide. With one seed it covers the images alone. If there are several draws of the labelled images, these take
    the place of the seeds, each with the mean over its seeds. It does not cover another pretraining, which all runs
    share.

    Returns:
        Mean and half interval; both are NaN without a common seed, the interval is NaN with one seed and one image.
    """
    of_base = {(draw_of(row), row["seed"]): row["images"] for row in base}
    paired: dict[int, list[Any]] = defaultdict(list)  # by draw
    for row in rows:
        other = of_base.get((draw_of(row), row["seed"]))
        if other is not None:
            scores = np.array((row["images"], other), dtype=float)  # (2, P); None becomes NaN
            paired[draw_of(row)].append(scores[0] - scores[1])
    if not paired:
        return float("nan"), float("nan")
    draws = list(paired.values())
    differences = np.array([np.mean(each, axis=0) for each in draws] if len(draws) > 1 else draws[0])
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
    """The rows of one set, by method and number of labels."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    labels = sorted({row["labels"] for row in rows})
    return {
        method: {count: [row for row in rows if (row["method"], row["labels"]) == (method, count)] for count in labels}
        for method in methods
    }


def summary(rows: Sequence[Row]) -> str:
    """Tables of each set as Markdown: mean IoU, differences from scratch, and the costs of the runs."""
    names = dict.fromkeys(row["data"] for row in rows)
    return "\n".join(set_summary(name, cells([row for row in rows if row["data"] == name])) for name in names)


def set_summary(name: str, found: Mapping[str, Mapping[int, list[Row]]]) -> str:
    """The tables of one set."""
    counts = list(next(iter(found.values())))
    every = [row for by_count in found.values() for rows in by_count.values() for row in rows]
    seeds, draws = (sorted({of(row) for row in every}) for of in (lambda row: row["seed"], draw_of))
    runs = {(draw_of(row), row["seed"]) for row in every}
    head = ["method", *(f"{count} label{'s' * (count != 1)}" for count in counts)]
    lines = [[method, *(shown(rows, len(runs)) for rows in by_count.values())] for method, by_count in found.items()]
    of_draws = f" and draws {', '.join(map(str, draws))} of the labelled images" if draws != [0] else ""
    title = f"Mean IoU on the test images, mean (least to most) of seeds {', '.join(map(str, seeds))}{of_draws}:\n"
    parts = [f"## {name}\n", title, markdown_table(head, lines)]
    if BASE in found and len(found) > 1:
        lines = [
            [method, *(difference(rows, found[BASE][count]) for count, rows in by_count.items())]
            for method, by_count in found.items()
            if method != BASE
        ]
        by = "draw, seed and image" if draws != [0] else "seed and image"
        title = f"Difference from {BASE} in the mean IoU of an image, paired by {by}, with 95% intervals:\n"
        parts += [title, markdown_table(head, lines)]
    if found.get(BASE, {}).get(MANY) and len(found) > 1 and FEW in counts:
        texts = {method: difference(by_count[FEW], found[BASE][MANY]) for method, by_count in found.items()}
        lines = [[method, text] for method, text in texts.items() if text]
        title = f"Difference of each method with {FEW} labels from {BASE} with {MANY}:\n"
        parts += [title, markdown_table(("method", "difference"), lines)]
    lines = []
    for method, by_count in found.items():
        every = [row for rows in by_count.values() for row in rows]
        seconds, before = (statistics.mean(row[key] for row in every) for key in ("seconds", "pretraining_seconds"))
        lines.append([method, f"{every[0]['parameters']:,}", f"{seconds:.0f}", f"{before:.0f}" if before else ""])
    parts.append(markdown_table(("method", "parameters", "CPU seconds of a run", "of its pretraining"), lines))
    return "\n".join(parts)


def difference(rows: Sequence[Row], base: Sequence[Row]) -> str:
    """The paired difference as text, empty without a common seed."""
    mean, half = paired_difference(rows, base)
    return "" if np.isnan(mean) else f"{mean:+.3f} +- {half:.3f}"


def shown(rows: Sequence[Row], runs: int) -> str:
    """Mean and range of the rows of a cell, and their number if some of the runs are missing."""
    values = [row["mean_iou"] for row in rows]
    if not values:
        return ""
    remarks = []
    if len(values) > 1:
        remarks.append(f"{min(values):.3f} to {max(values):.3f}")
    if len(values) < runs:
        remarks.append(f"{len(values)} of {runs} runs")
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({', '.join(remarks)})" if remarks else mean


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draws mean IoU against the number of labels: a panel for each set, a line with its range for each method.

    Args:
        rows: rows of the runs, at least one.
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
        label_ticks(axes.xaxis, FixedLocator([*next(iter(found.values()))]))
        axes.set(title=name, xlabel="labelled images", ylabel="mean IoU, test")
        axes.grid(alpha=0.3)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)
