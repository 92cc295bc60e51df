"""A line of the table of a benchmark."""

from dataclasses import dataclass, field
from typing import Any

from scripts.reports import markdown_table


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        id: the benchmark, such as "T1".
        work: the work that was timed or weighed.
        against: the network or program that ours was compared with.
        figure: the result in words.
        value: the number to compare with the target; None if it could not be measured (`figure` says why).
        target: the value to reach, such as "2.0x" or "75%".
        met: whether it was reached; None without a target or a number.
        details: everything that was measured, for the JSON.
        quartiles: the lower and the upper quartile where `value` is a median; None if it was measured once.
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
        """The target as a number on the scale of `value`."""
        if not self.target:
            return None
        return float(self.target[:-1]) / 100 if self.target.endswith("%") else float(self.target.removesuffix("x"))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    met = {None: "", True: "yes", False: "**no**"}
    cells = [(row.id, row.work, row.against, row.figure, row.target, met[row.met]) for row in rows]
    return markdown_table(("id", "work", "against", "figure", "target", "met"), cells)
