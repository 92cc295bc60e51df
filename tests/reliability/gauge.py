"""Measures whether memory, handles, threads, shared memory or time of a process grow while it works.

Measure in a new process, so that memory which was given back earlier cannot hide growth.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy import stats

SAMPLES = 100  # of a measurement
SETTLING = 512  # KiB
YARDSTICKS = 1000  # times that fixed work is timed among the calls
KINDS = ("handles", "threads", "mapped files of /dev/shm")


@contextmanager
def new_process() -> Iterator[ProcessPoolExecutor]:
    """Yields a freshly started process, which imports what it is asked to do; it forks its data workers, as usual."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_fork_workers) as process:
        yield process


def _fork_workers() -> None:
    set_start_method("fork", force=True)


class Gauge:
    """Samples what this process holds; a gauge itself does not grow.

    Args:
        calls: number of calls of `see` to come, at least `SAMPLES`.
        each: images or steps in each of them.
    """

    def __init__(self, calls: int, each: int = 1) -> None:
        assert calls >= SAMPLES
        self.each = each
        self.process = psutil.Process()
        self.seconds = np.ones(calls)  # every page is touched here, not later
        self.yardsticks = np.ones(calls)
        self.last = time.process_time()
        self.samples = np.ones((SAMPLES, 2 + len(KINDS)), dtype=np.int64)
        self.calls = self.taken = 0

    def see(self) -> None:
        """Takes a sample, if it is time for one; to be called after each batch of images, or step."""
        self.seconds[self.calls] = time.process_time() - self.last
        rarely = max(len(self.seconds) // YARDSTICKS, 1)
        if self.calls % rarely == 0:
            self.yardsticks[self.calls : self.calls + rarely] = yardstick()
        self.calls += 1
        if self.calls * SAMPLES >= (self.taken + 1) * len(self.seconds):
            resident = self.process.memory_info().rss // 1024
            shared = Path("/proc/self/maps").read_text().count("/dev/shm/")
            others = self.process.num_fds(), self.process.num_threads(), shared
            self.samples[self.taken] = self.calls * self.each, resident, *others
            self.taken += 1
        self.last = time.process_time()

    def reading(self, warm_up: int = SAMPLES // 10) -> "Reading":
        """Returns what was measured.

        Args:
            warm_up: number of samples at the start that are not judged.
        """
        assert self.taken == SAMPLES
        return Reading(self.samples, self.seconds[1:], self.yardsticks[1:], warm_up)


def yardstick() -> float:
    """Does fixed work like that of a small network, calls and a little arithmetic; returns its CPU seconds."""
    started, x = time.process_time(), torch.ones(64, 64)
    for _ in range(20):
        x = torch.addmm(x, x, x).clamp_(max=1)
    return time.process_time() - started


@dataclass(frozen=True)
class Reading:
    """The measurements of a process.

    Attributes:
        samples: int64 (SAMPLES, 5): images or steps done, resident KiB, and the number of each of `KINDS`.
        seconds: float64, CPU time from each call of `see` to the next.
        yardsticks: float64, CPU time of `yardstick` at these calls.
        warm_up: number of samples that are not judged.
    """

    samples: np.ndarray
    seconds: np.ndarray
    yardsticks: np.ndarray
    warm_up: int

    @property
    def slope(self) -> tuple[float, float]:
        """KiB per image or step after the warm-up, by least squares, and the standard error."""
        (slope, _), covariance = np.polyfit(*self.samples[self.warm_up :, :2].T, deg=1, cov=True)
        return float(slope), float(covariance[0, 0] ** 0.5)

    @property
    def flat(self) -> bool:
        """True if nothing grew after the warm-up.

        Memory may grow by `SETTLING` along the line, as it does in runs that hold nothing, when pages are touched for
        the first time. So the longer the run, the smaller the leak that is found: with 10,000 images, 60 bytes an
        image, about an empty list.
        """
        return self.same and self.growth <= SETTLING

    @property
    def growth(self) -> float:
        """Growth of memory after the warm-up in KiB, along the line."""
        return float(self.slope[0] * (self.samples[-1, 0] - self.samples[self.warm_up, 0]))

    @property
    def same(self) -> bool:
        """True if handles, threads and shared memory did not grow after the warm-up."""
        before, after = self.samples[: self.warm_up, 2:], self.samples[self.warm_up :, 2:]
        return bool((after.max(axis=0) <= before.max(axis=0)).all())

    def __str__(self) -> str:
        slope, error = self.slope
        (done, first, *before), (_, last, *after) = self.samples[self.warm_up - 1], self.samples[-1]
        others = ", ".join(f"{old} -> {new} {kind}" for kind, old, new in zip(KINDS, before, after))
        memory = f"{first / 1024:.1f} MiB after {done:,}, {last / 1024:.1f} MiB at the end"
        return f"{memory}, slope {1000 * slope:+.1f} +- {1000 * error:.1f} KiB per 1000; {others}"

    @property
    def costs(self) -> np.ndarray:
        """Time of a call in yardsticks: medians of a hundred parts, so that the machine's speed cancels out."""
        seconds, yardsticks = (np.array_split(each, SAMPLES) for each in (self.seconds, self.yardsticks))
        return np.array([np.median(part) / np.median(yard) for part, yard in zip(seconds, yardsticks)])

    @property
    def slowing(self) -> float:
        """Growth of the cost of a call from the end of the warm-up on, as a share of that of the second tenth.

        By the line of Theil and Sen: stretches in which other programs take the machine, up to 29 % of all, do not bend
        it.
        """
        costs = self.costs
        slope = stats.theilslopes(costs[self.warm_up :]).slope * (len(costs) - self.warm_up)
        return float(slope / np.median(costs[SAMPLES // 10 : SAMPLES // 5]))
