"""The findings of an examination, as sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unet_diffusion.data.folders import MOST_EXAMPLES

Severity: TypeAlias = Literal["error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One fault or remarkable property of a data set.

    Attributes:
        severity: "error": a run would stop, or learn something else than intended. "warning": a run would be worse than
            it could be. "note": worth knowing.
        sentence: the fault and the fix.
        examples: rows or files that show it.
    """

    severity: Severity
    sentence: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = len(self.examples) - MOST_EXAMPLES
        lines = [f"{self.severity}: {self.sentence}", *(f"    {example}" for example in self.examples[:MOST_EXAMPLES])]
        return "\n".join([*lines, f"    and {more} more"] if more > 0 else lines)


@dataclass(frozen=True)
class Report:
    """All findings, most severe first; as text for people by `str`.

    Attributes:
        findings: findings in all parts of the data set.
        examined: the parts, such as "20 images with masks of cells (train)".
    """

    findings: tuple[Finding, ...]
    examined: tuple[str, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Returns the findings that should keep a run from starting."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def __str__(self) -> str:
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in SEVERITIES]
        summary = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in zip(counts, SEVERITIES))
        return "\n".join([f"examined: {'; '.join(self.examined)}", *map(str, self.findings), summary])


def about(severity: Severity, sentence: str, examples: Sequence[str]) -> list[Finding]:
    """Returns one finding if there are examples, else none; "{count}" becomes the number of examples."""
    if not examples:
        return []
    return [Finding(severity, sentence.replace("{count}", str(len(examples))), tuple(examples))]
