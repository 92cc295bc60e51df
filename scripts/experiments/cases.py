"""What comparisons of several sets, methods, numbers of labelled images and seeds share."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student

from unet_diffusion.checks import is_count, require, require_choice


def check_cases(options: Any, methods: tuple[str, ...]) -> None:
    """Raises a ValueError unless `sets`, `methods`, `labels`, `seeds` and, if any, `draws` name cases, each once."""
    numbers = {name: getattr(options, name) for name in ("seeds", "draws") if hasattr(options, name)}
    for name in ("sets", "methods", "labels", *numbers):
        values = getattr(options, name)
        require(values and len(set(values)) == len(values), name, values, "must name one or more, each once")
    for method in options.methods:
        require_choice("methods", method, methods)
    for count in options.labels:
        require(count == "all" or is_count(count), "labels", count, "each must be a number of at least 1, or 'all'")
    for name, values in numbers.items():
        for number in values:
            require(is_count(number, 0), name, number, "each must be at least 0")


def label_counts(labels: Sequence[int | Literal["all"]], images: int, name: str) -> list[int]:
    """Returns the numbers of labelled images that a set with so many has, ascending, each once.

    Raises:
        ValueError: it has fewer than each of them.
    """
    counts = {images if count == "all" else int(count) for count in labels}
    fitting = sorted(count for count in counts if 1 <= count <= images)
    if not fitting:
        raise ValueError(
            f"labels is {labels}, but {name} has {images} training images; give smaller numbers, or 'all'."
        )
    return fitting


def half_interval(values: np.ndarray) -> float:
    """Half of the 95% interval of the mean of two or more values, by Student's quantile."""
    return float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def short_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that identify a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
