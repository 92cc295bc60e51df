"""Injects faults into training and inference, and shows which promises hold: a table, JSON, and the exit status.

python scripts/faults.py --output runs/faults            # all of it, under half an hour on 2 cores
python scripts/faults.py --output runs/faults --reduced  # a few minutes
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from fault_checks import bad_input, hostile_files, kills, load, numbers, processes, state
from fault_checks.finding import Finding

from unet_diffusion.files import write_json, write_text

PARTS = {
    "kills": kills.checks,
    "state": state.checks,
    "numbers": numbers.checks,
    "processes": processes.checks,
    "bad_input": bad_input.checks,
    "hostile_files": hostile_files.checks,
    "load": load.checks,
}


@dataclass
class Faults:
    """What is tried."""

    output: Path
    """Folder for `faults.json` and `faults.md`."""
    only: tuple[str, ...] = tuple(PARTS)
    """Which parts: kills, state, numbers, processes, bad_input, hostile_files, load."""
    reduced: bool = False
    """Fewer kills, processes, images and steps."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in self.only:
            if name not in PARTS:
                raise ValueError(f"only is {name!r}, but must be among {', '.join(PARTS)}.")


def run(config: Faults) -> bool:
    """Tries one part after the other and writes what was found; returns whether all promises held."""
    findings: list[Finding] = []
    seconds = {}
    for name in config.only:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            for finding in checked(name, config.reduced, Path(work)):
                findings.append(finding)
                print("held  " if finding.held else "BROKEN", f"{finding.check}: {finding.figure}", flush=True)
        seconds[name] = round(time.perf_counter() - started, 1)
    facts = {"reduced": config.reduced, "torch": torch.__version__, "cores": os.cpu_count(), "seconds": seconds}
    write_json(config.output / "faults.json", {**facts, "findings": [asdict(finding) for finding in findings]})
    write_text(config.output / "faults.md", table(findings))
    return all(finding.held for finding in findings)


def checked(name: str, reduced: bool, work: Path) -> Iterator[Finding]:
    """The findings of one part; what keeps it from being tried is one that did not hold."""
    try:
        yield from PARTS[name](reduced, work)
    except Exception as error:
        yield Finding(name, "the check itself", f"{type(error).__name__}: {error}", held=False)


def table(findings: list[Finding]) -> str:
    """The findings as Markdown."""
    lines = ["| promise | fault | figure | held |", "| --- | --- | --- | --- |"]
    for each in findings:
        cells = (each.promise, each.check, each.figure, "yes" if each.held else "**no**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(not run(tyro.cli(Faults, description=__doc__)))
