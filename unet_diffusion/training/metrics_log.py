"""The numbers of a run as `metrics.jsonl`: one JSON object a line, each with its step."""

import json
import os
from pathlib import Path
from typing import Any

from unet_diffusion.files import named_errors, write_text


class MetricsLog:
    """Appends lines as they come; a resumed run drops those after the step that it goes on from.

    Args:
        path: the file, which may not exist yet.
        step: the step that the run goes on from; no step is then missing or doubled.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        else:
            write_text(path, "")

    def append(self, step: int, **values: Any) -> None:
        """Adds one line; it is on the disk before any later checkpoint is.

        Raises:
            OSError: it could not be written, such as on a full disk.
        """
        with named_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; a last line that a killed run left torn is dropped.

    Raises:
        ValueError: a line before it is damaged.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is damaged; mend or remove it: {error}") from error
    return rows


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, where it was logged."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]
