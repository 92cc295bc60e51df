"""The rows of a benchmark as bars."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scripts.benchmarks.result_row import Row
from scripts.reports import label_ticks, save_figure

ROW_HEIGHT = 0.32  # inches


def save_bars(rows: list[Row], path: Path) -> None:
    """Draws a horizontal bar for every row that has both a number and a target.

    The axis is logarithmic. Bars begin at 1, "as much as the peer"; a black mark is the target, a line the quartiles.

    Args:
        rows: the rows of the table; rows without a number or a target are left out.
        path: the PNG to write.
    """
    drawn = [row for row in rows if row.value and row.aim]
    figure = Figure(figsize=(11, 1.0 + ROW_HEIGHT * len(drawn)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    for place, row in enumerate(drawn):
        axes.barh(place, row.value - 1, left=1, height=0.6, color="tab:green" if row.met else "tab:orange")
        if row.quartiles:
            axes.plot(row.quartiles, (place, place), color="0.25", linewidth=1.5)
        axes.vlines(row.aim, place - 0.42, place + 0.42, color="black", linewidth=2.5)
    axes.axvline(1, color="0.5", linewidth=0.8)
    labels = [f"{row.id}  {row.work} | {row.against} | {row.value:.2f} ({row.target})" for row in drawn]
    axes.set_yticks(range(len(drawn)), labels, fontsize="small")
    label_ticks(axes.xaxis, LogLocator(base=2), ".3g")
    axes.set(xlabel="ours against the peer; black: the target; green: met", ylim=(len(drawn) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
