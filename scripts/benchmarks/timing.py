"""Timing of competing pieces of work that take turns, so that a noisy machine disturbs all of them alike.

Both sides are timed in float32 and, where the device has it, in bfloat16, in the same rounds.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import PRECISIONS, has_bfloat16

AS_THEY_COME = "as they come"  # ours in the precision that our commands take, a peer in float32
COLUMNS = (PRECISIONS["no"], PRECISIONS["bf16"], AS_THEY_COME)
Work = Callable[[], object]
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


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


def alternate(
    works: Mapping[K, Work], rounds: int, warm_up: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[K, list[float]]:
    """Seconds of each piece of work in each round: A B C, then A B C again, and so on.

    Args:
        works: pieces of work by name; each is called once a round.
        rounds: number of rounds that are timed.
        warm_up: number of rounds before these, which are not timed.
        clock: gives the time in seconds.
    """
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for index in range(warm_up + rounds):
        for name, work in works.items():
            synchronise()
            started = clock()
            work()
            synchronise()
            if index >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def synchronise() -> None:
    """Waits for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compute_clock() -> float:
    """The time in seconds: CPU time if one thread computes, so that other work on the machine does not count."""
    synchronise()
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if one_thread else time.perf_counter()


def ratio(numerators: list[float], denominators: list[float]) -> Ratio:
    """The ratio of two lists of figures from the same rounds."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)


def timed_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions in which work is timed; the last is the one that our commands take on this device."""
    return ("no", "bf16") if has_bfloat16(device) else ("no",)


def ratios(
    seconds: Mapping[tuple[str, Precision], list[float]], ours: str, peer: str, peer_comes_in: Precision | None = "no"
) -> dict[str, Ratio]:
    """How many times as fast ours is as a peer, for each of `COLUMNS` that was timed.

    Args:
        seconds: times of each round, by name and precision.
        ours: name of ours.
        peer: name of the peer.
        peer_comes_in: the precision of the peer as it comes; None leaves that column out.
    """
    timed = [precision for name, precision in seconds if name == ours]
    found = {PRECISIONS[each]: ratio(seconds[peer, each], seconds[ours, each]) for each in timed}
    if peer_comes_in is not None:
        found[AS_THEY_COME] = ratio(seconds[peer, peer_comes_in], seconds[ours, timed[-1]])
    return found


def by_name(values: Mapping[tuple[str, Precision], V]) -> dict[str, V]:
    """The same values with names that JSON can have."""
    return {f"{name}, {PRECISIONS[precision]}": value for (name, precision), value in values.items()}
