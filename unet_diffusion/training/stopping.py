"""Reasons to stop a run: a signal, no better weights for a while, too many skipped steps."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

GRACE = 20  # seconds that a data worker outlives a SIGTERM


class StopRequest:
    """True once Ctrl-C or SIGTERM was received; the loop then saves and exits with `leave`."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; a second signal ends the process at once, without saving."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def leave(self, message: str) -> None:
        """Ends the program with status 128 + signal, also in processes that got no signal; Ctrl-C shows the message."""
        number = self.received or signal.SIGTERM
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collects Ctrl-C and SIGTERM for the length of a block; outside the main thread signals stay as they are."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """Keeps a data worker alive after Ctrl-C, and for a while after SIGTERM; both often reach all processes of a job.

    The training process can then save, and ends the worker when it leaves. SIGALRM ends it `GRACE` seconds after
    SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, which sends no SIGTERM
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


class BestWeights:
    """Keeps a copy of the weights with the highest score so far, on the CPU; `patience` is that of a `Task`."""

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.score: float | None = None
        self.step = 0
        self.misses = 0  # validations since the best one
        self.tensors: dict[str, Tensor] = {}

    def offer(self, score: float, step: int, network: nn.Module) -> None:
        """Takes the network's weights if the score is higher than all scores before; NaN never is."""
        if score > (-float("inf") if self.score is None else self.score):
            self.score, self.step, self.misses = score, step, 0
            self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
        else:
            self.misses += 1

    @property
    def exhausted(self) -> bool:
        """True once the patience has run out."""
        return self.patience is not None and self.misses >= self.patience

    def load_into(self, network: nn.Module) -> None:
        """Loads the best weights, if there are any yet, into a network."""
        if self.tensors:
            network.load_state_dict(self.tensors)

    def state(self) -> dict[str, Any]:
        """Returns all but the weights, for a checkpoint."""
        return {"score": self.score, "step": self.step, "misses": self.misses}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Takes back a state, and the weights that belong to it."""
        self.score, self.step, self.misses = state["score"], state["step"], state["misses"]
        self.tensors = tensors


class SkippedSteps:
    """Counts the steps whose loss or gradient was not finite; they change no weight and no average.

    Args:
        limit: skipped steps in a row that end the run.

    Attributes:
        total: skipped steps since the start of the run.
        in_a_row: skipped steps since the last step that was not skipped.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0

    def add(self, step: int, description: str) -> None:
        """Counts a skipped step, and reports it with its description, such as its timesteps and images.

        Raises:
            FloatingPointError: the limit is reached.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < self.limit:
            logger.warning("step %d skipped, since its loss or gradient is not finite: %s", step, description)
            return
        raise FloatingPointError(
            f"the loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}: {description}. "
            "They changed no weight, and the last checkpoint is kept. Look at these images; if nothing is wrong with "
            "them, start again in an empty folder with a lower learning_rate, or with mixed_precision='no'."
        )

    def state(self) -> dict[str, int]:
        """Returns the counts, for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Takes back the counts of a checkpoint."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
