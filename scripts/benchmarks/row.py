"""What a benchmark measures, as a line of its table."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        id: of the benchmark, such as "T1".
        work: what was done.
        against: what ours was compared with.
        figure: what was measured, in words.
        value: the number that the target is about; None: it could not be measured, and `figure` says why.
        target: what it should be, such as "2.0x" or "75%".
        met: whether it is; None where there is no target or no number.
        details: everything measured, for the JSON.
        quartiles: the lower and the upper one of what `value` is the median of; None: it was measured once.
    """

    id: str
    work: str
    against: str
    figure: str
    value: float | None = None
    target: str = ""
    met: bool | None = None
    details: dict[str, Any] = field(default_factory=dict)
    quartiles: tuple[float, float] | None = None

    @property
    def aim(self) -> float | None:
        """The target as a number, of the scale of `value`."""
        if not self.target:
            return None
        return float(self.target[:-1]) / 100 if self.target.endswith("%") else float(self.target.removesuffix("x"))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| id | work | against | figure | target | met |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "**no**"
        cells = (row.id, row.work, row.against, row.figure, row.target, met)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
