"""What an examination found, as sentences."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
SHOWN = 5  # examples of a finding in the text


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: "error": a run would stop, or learn something else than is meant. "warning": it would be worse than
            it could be. "note": what a user may want to know.
        sentence: what it is, and what to do.
        examples: rows or files.
    """

    severity: Severity
    sentence: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = len(self.examples) - SHOWN
        lines = [f"{self.severity}: {self.sentence}", *(f"    {example}" for example in self.examples[:SHOWN])]
        return "\n".join([*lines, f"    and {more} more"] if more > 0 else lines)


@dataclass(frozen=True)
class Report:
    """All that was found, the severest first; its text is for people.

    Attributes:
        findings: of all parts of the data set.
        examined: what was looked at, such as "20 images with masks of cells (train)".
    """

    findings: tuple[Finding, ...]
    examined: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that should keep a run from starting."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def __str__(self) -> str:
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in SEVERITIES]
        summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in zip(counts, SEVERITIES))
        return "\n".join([f"examined: {'; '.join(self.examined)}", *map(str, self.findings), summary])


def sort_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings, the severest first, otherwise in their order."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


def about(severity: Severity, sentence: str, examples: Sequence[str]) -> list[Finding]:
    """A finding if there is any example, else none; "{count}" in the sentence becomes the number of examples."""
    if not examples:
        return []
    return [Finding(severity, sentence.replace("{count}", str(len(examples))), tuple(examples))]
