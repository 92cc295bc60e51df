"""What a check of a promise finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        promise: which promise was tried, such as "Nothing lost".
        check: what was done.
        figure: what was measured.
        held: whether the promise held.
    """

    promise: str
    check: str
    figure: str
    held: bool
