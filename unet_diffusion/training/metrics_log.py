"""The numbers of a run: `metrics.jsonl`, one JSON object a line, each with its step; and their curves."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_diffusion.files import named_errors, write_text, written_aside


class MetricsLog:
    """Appends lines to the file, which may not exist yet.

    A run that resumes at a step first drops the lines after that step, so that every step is there exactly once.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, step: int, **values: Any) -> None:
        """Adds one line, which is on disk before any later checkpoint.

        Raises:
            OSError: the line could not be written, for example because the disk is full.
        """
        with named_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns all whole lines of a `metrics.jsonl`; a last line that a killed run left torn is dropped.

    Raises:
        ValueError: a line before the last is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is damaged; mend or remove it: {error}") from error
    return rows


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which a quantity was logged, and its values there."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def save_curves(rows: list[dict[str, Any]], path: Path, panels: Mapping[str, Sequence[str]]) -> None:
    """Plots quantities against the step, losses on a logarithmic axis.

    Args:
        rows: the lines of a `metrics.jsonl`.
        path: the PNG to write.
        panels: the quantities in each panel, by its title; quantities that were not logged are left out.
    """
    from matplotlib.figure import Figure  # here, since it takes a tenth of the package's import time
    from matplotlib.ticker import LogFormatter

    panels = {title: [name for name in names if series(rows, name)[0]] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    width = 5 * max(len(panels), 1)  # in inches, as are the borders; a search for these would draw all twice
    figure = Figure(figsize=(width, 3.2))
    figure.subplots_adjust(left=0.65 / width, right=1 - 0.1 / width, bottom=0.15, top=0.91, wspace=0.18)
    for position, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        if all(name.endswith("loss") for name in names):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # plain text: the parser of mathematical text keeps its last
            axes.yaxis.set_minor_formatter(LogFormatter())  # errors, and with them everything that its callers held
        for name in names:
            steps, values = series(rows, name)
            axes.plot(steps, values, label=name.replace("_", " "), marker="." if len(steps) < 40 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)
