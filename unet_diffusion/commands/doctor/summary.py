"""The summary of a data set. Commands print it before they work, and model cards contain it."""

from dataclasses import dataclass

LEFT = ("class", "value", "name")  # left-aligned columns; numbers are right-aligned


@dataclass(frozen=True)
class Table:
    """Cells of text in rows, all as long as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without(self, column: str) -> "Table":
        """Returns the table without one of its columns."""
        at = self.header.index(column)
        header, *rows = [row[:at] + row[at + 1 :] for row in (self.header, *self.rows)]
        return Table(header, tuple(rows))

    def lines(self) -> list[str]:
        """Returns the header and the rows with aligned columns."""
        aligned = []
        for column in zip(self.header, *self.rows):
            width = max(map(len, column))
            aligned.append([cell.ljust(width) if column[0] in LEFT else cell.rjust(width) for cell in column])
        return ["  ".join(cells).rstrip() for cells in zip(*aligned)]


@dataclass(frozen=True)
class Section:
    """One part of a data set, such as its training images.

    Attributes:
        heading: the name of the part, and its most important figures.
        notes: further facts, as sentences or parts of them.
        table: figures in rows, if there are any.
    """

    heading: str
    notes: tuple[str, ...] = ()
    table: Table | None = None

    def lines(self) -> list[str]:
        """Returns the heading, and below it the table and the notes, indented."""
        table = self.table.lines() if self.table else []
        return [self.heading, *(f"  {line}" for line in [*table, *self.notes])]


@dataclass(frozen=True)
class Summary:
    """The facts about a data set; `str` gives them as text for people."""

    sections: tuple[Section, ...]

    def lines(self) -> tuple[str, ...]:
        """Returns the lines as they are printed, kept in `data.json` and shown by the model card."""
        return tuple(line for section in self.sections for line in section.lines())

    def __str__(self) -> str:
        return "\n".join(self.lines())
