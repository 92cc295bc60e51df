"""The findings of an examination, as sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unet_diffusion.checks import Question
from unet_diffusion.commands.doctor.summary import Summary
from unet_diffusion.data.folders import MOST_EXAMPLES
from unet_diffusion.images.axes import counted

Severity: TypeAlias = Literal["error", "question", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("error", "question", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One fault or remarkable property of a data set.

    Attributes:
        severity: "error": a run would stop, or learn something else than intended. "question": a run would probably
            learn something else, but only the user can tell; the sentence names the option that answers it. "warning":
            a run would be worse than it could be. "note": worth knowing.
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
    """The summary of a data set and all findings, most severe first; `str` gives it as text for people.

    Attributes:
        summary: the parts of the data set and their contents.
        findings: the findings in all parts.
    """

    summary: Summary
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Returns the findings of severity "error"."""
        return self._of("error")

    @property
    def questions(self) -> tuple[Finding, ...]:
        """Returns the findings of severity "question"."""
        return self._of("question")

    @property
    def refusal(self) -> str:
        """Returns the reasons why a run must not start, with all errors and questions; empty if it may start."""
        if not self.errors and not self.questions:
            return ""
        unanswered = "the data cannot be trained on before these questions are answered."
        first = "the data cannot be trained on." if self.errors else unanswered
        return "\n".join([first, *map(str, self.errors + self.questions)])

    @property
    def advice(self) -> tuple[Finding, ...]:
        """Returns the findings that do not stop a run from starting."""
        return self._of("warning") + self._of("note")

    def __str__(self) -> str:
        counts = [len(self._of(severity)) for severity in SEVERITIES]
        last = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in zip(counts, SEVERITIES))
        return "\n".join([*self.summary.lines(), *map(str, self.findings), last])

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)


def about(severity: Severity, sentence: str, examples: Sequence[str]) -> list[Finding]:
    """Returns one finding if there are examples, else none; "{count}" is replaced by the number of examples."""
    if not examples:
        return []
    return [Finding(severity, sentence.replace("{count}", str(len(examples))), tuple(examples))]


def asked(kind: str, name: str, rows: Sequence[tuple[str | None, str]]) -> list[Finding]:
    """Returns a finding for each question that images or masks raise.

    Args:
        kind: "image" or "mask".
        name: the name of their source and split.
        rows: pairs of a question, or None, and the example.
    """
    examples: dict[str, list[str]] = {}
    for question, example in rows:
        if question is not None:
            examples.setdefault(question, []).append(example)
    return [
        Finding("question", f"{question} It concerns {counted(len(names), kind)} of {name}.", tuple(names))
        for question, names in examples.items()
    ]


def judged(error: ValueError, what: str = "") -> Finding:
    """Turns an error about a whole data set into a finding: a question, if the error asks one."""
    return Finding("question" if isinstance(error, Question) else "error", f"{what}{error}")
