"""How many steps of a training fit into a given processor time. Needs the standard library alone."""

import statistics
from collections.abc import Sequence

PACED = 40  # steps that measure how long a step takes
WARM = 10  # of these left out, since the first ones take longer


def steps_within(seconds: float, durations: Sequence[float]) -> int:
    """Returns how many steps fit into the seconds, by the mean of the measured durations after the first ones."""
    return max(1, round(seconds / statistics.mean(durations[WARM:] or durations)))
