"""Timing of competing pieces of work that take turns, so that a noisy machine disturbs all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Work = Callable[[], object]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two figures: the median over rounds, with its quartiles.

    Attributes:
        median: median of the ratios of the rounds.
        low: their lower quartile.
        high: their upper quartile.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """For example "2.10 (2.04 to 2.15)"."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def alternate(works: Mapping[K, Work], rounds: int, warm_up: int = 2) -> dict[K, list[float]]:
    """Seconds of each piece of work in each round: A B C, then A B C again, and so on.

    Args:
        works: pieces of work by name; each is called once a round.
        rounds: number of rounds that are timed.
        warm_up: number of rounds before these, which are not timed.
    """
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for index in range(warm_up + rounds):
        for name, work in works.items():
            synchronise()
            started = time.perf_counter()
            work()
            synchronise()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronise() -> None:
    """Waits for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(numerators: list[float], denominators: list[float]) -> Ratio:
    """The ratio of two lists of figures from the same rounds."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)
