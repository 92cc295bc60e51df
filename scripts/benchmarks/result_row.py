"""The lines of the tables of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from scripts.benchmarks.timing import COLUMNS, Ratio
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


@dataclass(frozen=True)
class Comparison:
    """The speed of ours against a peer's, at equal precision and as they come.

    Attributes:
        id: the benchmark, such as "T1".
        work: the work that was timed.
        against: the network or program that ours was compared with.
        ratios: times as fast, by column (`timing.COLUMNS`); columns that were not measured are missing.
        targets: the ratios to reach, by column.
        missing: why nothing was measured.
        details: everything that was measured, for the JSON.
    """

    id: str
    work: str
    against: str
    ratios: dict[str, Ratio] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    missing: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def figure(self) -> str:
        """The result in words."""
        return self.missing or "; ".join(f"{column} {ratio}" for column, ratio in self.ratios.items())

    def missed(self, column: str) -> bool:
        """Returns whether a column was measured and does not reach its target."""
        return column in self.ratios and self.ratios[column].median < self.targets.get(column, 0)


def row_of(values: dict[str, Any]) -> Row | Comparison:
    """The row with values as `asdict` gave them; others are left out."""
    kind = Comparison if "ratios" in values else Row
    known = {each.name: values[each.name] for each in fields(kind)}
    if kind is Comparison:
        known["ratios"] = {column: Ratio(**ratio) for column, ratio in values["ratios"].items()}
    return kind(**known)


def table(rows: Sequence[Row | Comparison]) -> str:
    """The rows as Markdown: a table of the comparisons, where a missed target is bold, and one of the others."""
    cells = []
    for row in rows:
        if isinstance(row, Comparison):
            bold = ["**" if row.missed(column) else "" for column in COLUMNS]
            figures = [f"{mark}{row.ratios.get(column, 'not run')}{mark}" for mark, column in zip(bold, COLUMNS)]
            targets = ", ".join(f"{column} {target:g}" for column, target in row.targets.items())
            cells.append((row.id, row.work, row.against, *figures, targets))
    met = {None: "", True: "yes", False: "**no**"}
    others = [
        (row.id, row.work, row.against, row.figure, row.target, met[row.met]) for row in rows if isinstance(row, Row)
    ]
    tables = (
        (("id", "work", "against", *COLUMNS, "target"), cells),
        (("id", "work", "against", "figure", "target", "met"), others),
    )
    return "\n".join(markdown_table(head, lines) for head, lines in tables if lines)
