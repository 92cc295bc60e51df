"""The gauge finds leaks, growth and slowing."""

import os

import numpy as np
import pytest

from tests.reliability.gauge import SAMPLES, SETTLING, Gauge, Reading, new_process

CALLS = 200
LEAK = 16 * SETTLING * 1024 // CALLS  # bytes per call: 16 times the allowed growth


def work_and_hold(size: int, handles: bool) -> Reading:
    """Allocates and touches memory in every call, and frees what it should not hold."""
    held, gauge = [], Gauge(CALLS)
    for _ in range(CALLS):
        block = bytearray(os.urandom(LEAK))
        held.append((block[:size], open(os.devnull) if handles else None))  # noqa: SIM115
        gauge.see()
    return gauge.reading()


@pytest.mark.slow
def test_a_leak_is_found_and_work_without_one_is_not():
    with new_process() as process:
        none, handles, memory = process.map(work_and_hold, (0, 0, LEAK), (False, True, False))
    assert none.flat and not memory.flat and not handles.flat
    slope, error = memory.slope
    assert slope == pytest.approx(LEAK / 1024, rel=0.1) and error < 0.1 * slope
    assert abs(none.slope[0]) * CALLS <= SETTLING


def reading(resident: np.ndarray, seconds=None, yardsticks=None, handles: int = 0) -> Reading:
    samples = np.full((SAMPLES, 5), 7, dtype=np.int64)
    samples[:, 0], samples[:, 1] = np.arange(1, SAMPLES + 1) * 10, resident
    samples[-1, 2] += handles
    seconds = np.ones(2000) if seconds is None else seconds
    return Reading(samples, seconds, np.ones(2000) if yardsticks is None else yardsticks, SAMPLES // 10)


def test_growth_is_judged_after_the_warm_up_and_along_the_line():
    steady = np.full(SAMPLES, 10_000)
    steady[: SAMPLES // 10] -= 5_000
    assert reading(steady).flat and reading(steady).slope == pytest.approx((0, 0), abs=1e-6)
    rising = np.arange(SAMPLES) * 10  # KiB, one for each image
    assert reading(rising).slope[0] == pytest.approx(1) and not reading(rising).flat
    assert reading(rising * SETTLING // 1000).flat  # 890 images are measured
    assert not reading(steady, handles=1).flat
    assert "slope +1000.0 +- 0.0 KiB per 1000; 7 -> 7 handles" in str(reading(rising))


def test_slowing_is_that_of_the_steps_and_not_of_a_busy_machine():
    seconds = np.full(2000, 0.01)
    seconds[600:1000] = 0.03  # another program, for a fifth of the time
    assert reading(np.ones(SAMPLES), seconds).slowing == pytest.approx(0)
    growing = np.linspace(0.01, 0.02, 2000)
    busy = reading(np.ones(SAMPLES), growing)
    assert busy.slowing == pytest.approx(0.9 * 0.01 / 0.0115, rel=0.02)
    assert reading(np.ones(SAMPLES), growing, growing / 7).slowing == pytest.approx(0)  # the machine became slower
