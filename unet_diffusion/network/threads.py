"""The number of threads with which a CPU trains fastest at the moment.

Every operation of a network is shared among all threads and ends with the slowest one. If another program uses a core,
all threads wait for the one that shares this core, hundreds of times in a training step. Two threads then took 33 times
as long as one (docs/performance.md).
"""

import os
import time

import torch
from torch.nn.functional import conv2d, group_norm, silu

STATED = "OMP_NUM_THREADS"
TRIAL = 0.25  # seconds for each number of threads: many turns of the scheduler of the operating system
CLEARLY = 1.5  # fewer threads must be this many times as fast, since large operations gain more from many threads


def fastest_threads() -> int:
    """Returns the number of threads with which a CPU computes fastest now: all, half of them, a quarter ... or one.

    It is all of them unless fewer are clearly faster. If `OMP_NUM_THREADS` is set, nothing is tried.
    """
    present = torch.get_num_threads()
    if STATED in os.environ or present == 1:
        return present
    try:
        seconds = {threads: _seconds(threads) for threads in (present >> i for i in range(present.bit_length()))}
    finally:
        torch.set_num_threads(present)
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[present] > CLEARLY * seconds[fastest] else present


@torch.no_grad()
def _seconds(threads: int) -> float:
    """Returns the mean time that some layers of a small network take with a number of threads, in seconds."""
    torch.set_num_threads(threads)
    maps, kernels = torch.ones(16, 32, 16, 16), torch.full((32, 32, 3, 3), 1e-3)
    durations: list[float] = []
    while sum(durations) < TRIAL or len(durations) < 3:
        started, x = time.perf_counter(), maps
        for _ in range(4):
            x = conv2d(silu(group_norm(x, 8)), kernels, padding=1)
        durations.append(time.perf_counter() - started)
    return sum(durations[1:]) / len(durations[1:])  # the first one also chooses its kernels
