"""The comparisons of a benchmark as points."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scripts.benchmarks.result_row import Comparison, Row
from scripts.benchmarks.timing import COLUMNS
from scripts.reports import label_ticks, save_figure

ROW_HEIGHT = 0.42  # inches
COLOURS = dict(zip(COLUMNS, ("tab:blue", "tab:orange", "tab:green")))


def save_ratios(rows: Sequence[Row | Comparison], path: Path) -> None:
    """Draws the medians of every comparison that was measured, in a colour for each column, on a logarithmic axis.

    A line of the same colour has the quartiles, an upright mark of the same colour is the target.

    Args:
        rows: the rows of the tables; only comparisons are drawn, and nothing is written without any.
        path: the PNG to write.
    """
    drawn = [row for row in rows if isinstance(row, Comparison) and row.ratios]
    if not drawn:
        return
    figure = Figure(figsize=(11, 1.5 + ROW_HEIGHT * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    for column, (name, colour) in enumerate(COLOURS.items()):
        shown = [(place + 0.22 * (column - 1), row) for place, row in enumerate(drawn) if name in row.ratios]
        found = [row.ratios[name] for _, row in shown]
        axes.plot([ratio.median for ratio in found], [place for place, _ in shown], "o", color=colour, label=name)
        for (place, row), ratio in zip(shown, found):
            axes.plot((ratio.low, ratio.high), (place, place), color=colour, linewidth=1.5)
            if name in row.targets:
                axes.vlines(row.targets[name], place - 0.18, place + 0.18, color=colour, linewidth=2.5)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(drawn)), [f"{row.id}  {row.work} | {row.against}" for row in drawn], fontsize="small")
    label_ticks(axes.xaxis, LogLocator(base=2), ".3g")
    axes.set(xlabel="times as fast as the peer; upright marks: targets", ylim=(len(drawn) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=len(COLUMNS), fontsize="small")
    save_figure(figure, path)
