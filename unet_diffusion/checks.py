"""Checks of the values that a user gives: a `ValueError` names the value, the rule and, where it helps, the fix."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import fields
from functools import wraps
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


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
    """Returns whether `value` is an integer of at least `least`; NumPy's integers count, bools do not."""
    return is_integer(value) and value >= least


def is_integer(value: Any) -> bool:
    """Returns whether `value` is an integer; NumPy's integers count, bools do not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether `value` is a finite integer or float; NumPy's numbers count, bools do not."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """Converts numbers and arrays of NumPy and PyTorch to Python's own, also in lists, tuples and dictionaries.

    Arrays become tuples. Everything else is returned as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)([plain(each) for each in value])
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    if not hasattr(value, "tolist"):
        return value
    listed = value.tolist()
    return tuple(listed) if isinstance(listed, list) else listed


def set_plain(options: Any) -> None:
    """Converts the values of a dataclass's fields by `plain`, even if the dataclass is frozen.

    Raises:
        ValueError: a bool field has another value, such as a string, which would count as True.
    """
    for each in fields(options):
        value = plain(getattr(options, each.name))
        require(each.type not in (bool, "bool") or isinstance(value, bool), each.name, value, "must be True or False")
        object.__setattr__(options, each.name, value)


def takes_plain(method: Method) -> Method:
    """Decorates a method so that it gets its arguments as `plain` makes them."""

    @wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return wrapped  # type: ignore[return-value]  # of the same arguments


def require(valid: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError unless `valid`: "NAME is VALUE, but RULE."."""
    if not valid:
        raise ValueError(f"{name} is {value!r}, but {rule}.")


def require_each(options: object, names: Iterable[str], valid: Callable[[Any], bool], rule: str) -> None:
    """Raises a ValueError for the first named field of `options` that is neither None nor valid."""
    for name in names:
        value = getattr(options, name)
        require(value is None or valid(value), name, value, rule)


PERCENTILES = "must be two numbers from 0 to 100, the lower one first"


def are_percentiles(ends: Any) -> bool:
    """Returns whether these are two percentiles, the lower one first."""
    two = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(is_number, ends))
    return two and 0 <= ends[0] < ends[1] <= 100


def require_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises a ValueError unless `value` is one of the choices."""
    require(value in choices, name, value, f"must be one of {', '.join(map(repr, choices))}")


def class_index(label: str | int, names: Sequence[str] | None, option: str) -> int:
    """Returns the index of a class that is given by its name, or by its index.

    Text is a name; digits are an index only if classes have no names. An integer is always an index.
    """
    if not isinstance(label, str):
        require(is_count(label, 0), option, label, "a class is a name, or an integer of at least 0")
        return int(label)
    if names is None:
        require(label.isdecimal(), option, label, "the classes have no names; give an index, counted from 0")
        return int(label)
    require(label in names, option, label, f"the classes are {', '.join(names)}")
    return list(names).index(label)


def check_class_names(names: Sequence[str] | None, learnt: Sequence[str], source: str) -> None:
    """Raises a ValueError unless the classes of a source have the names, in this order, that a run has learnt.

    Args:
        names: of the classes of the source; None if they have none.
        learnt: of the classes of the run; empty if it has learnt no names, and then nothing is checked.
        source: name of the source.
    """
    if not learnt or list(names or ()) == list(learnt):
        return
    pairs = enumerate(zip_longest(learnt, names or ()))
    index, earlier, found = next((index, *pair) for index, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"class {index} of {source} is {'missing' if found is None else repr(found)}, but the run has learnt "
        f"{'no such class' if earlier is None else repr(earlier)}, and the classes of a run stay as they are; restore "
        "the names of folders or labels, or the file that lists them, or choose another output folder."
    )
