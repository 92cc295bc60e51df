"""Tables and figures of measurements, and the circumstances that they depend on."""

import hashlib
import os
import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, NullLocator

from unet_diffusion.files import written_aside


def circumstances() -> dict[str, Any]:
    """The date, the machine and the version of PyTorch."""
    return {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def content_hash(paths: Iterable[Path]) -> str:
    """Eight hexadecimal digits that identify the content of files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as Markdown, with a line break at its end."""
    head = list(head)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label_ticks(axis: Axis, locator: Locator, form: str = "g") -> None:
    """Labels the major ticks of a logarithmic axis in plain text and removes the minor ones.

    By default the labels are mathematical text, whose parser keeps its last errors and with them all that its callers
    held.

    Args:
        axis: x or y of some axes.
        locator: where the ticks are.
        form: the format of the numbers.
    """
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda number, _: format(number, form)))
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> Path:
    """Writes a figure as PNG, whole or not at all, and returns the path."""
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=dpi)
    return path
