"""Checks of the values that a user gives: a `ValueError` names the value, the rule and, where it helps, the fix."""

from collections.abc import Callable, Collection, Iterable
from typing import Any


class Question(ValueError):
    """A question about the data, which an option answers; no run starts before it is answered.

    Attributes:
        question: the question and the options that answer it, the same for every file that raises it.
        found: what was found in this file; empty for a question about a whole set.
    """

    def __init__(self, question: str, found: str = "") -> None:
        super().__init__(f"{found}. {question}" if found else question)
        self.question, self.found = question, found


def is_count(value: Any, least: int = 1) -> bool:
    """Returns whether `value` is an integer (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Returns whether `value` is an int or a float (not a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require(valid: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError unless `valid`: "NAME is VALUE, but RULE."."""
    if not valid:
        raise ValueError(f"{name} is {value!r}, but {rule}.")


def require_each(options: object, names: Iterable[str], valid: Callable[[Any], bool], rule: str) -> None:
    """Raises a ValueError for the first named field of `options` that is neither None nor valid."""
    for name in names:
        value = getattr(options, name)
        require(value is None or valid(value), name, value, rule)


def require_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises a ValueError unless `value` is one of the choices."""
    require(value in choices, name, value, f"must be one of {', '.join(map(repr, choices))}")
