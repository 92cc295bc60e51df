"""Ctrl-C and SIGTERM as requests that a loop answers between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 20  # seconds that a data worker outlives a SIGTERM


class StopRequest:
    """Whether Ctrl-C or SIGTERM came; the loop saves, then leaves as the signal asked."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal does not wait for the save."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def leave(self) -> None:
        """Ends the program with the usual status, 128 + signal; on the processes that got none, too."""
        number = self.received or signal.SIGTERM
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def outlive_sigterm(worker: int) -> None:
    """Lets a data worker go on for a while after SIGTERM, which often reaches all processes of a job.

    Theirs can then save. It ends them when it leaves; SIGALRM does at last.

    Args:
        worker: which one; a DataLoader gives it.
    """
    if hasattr(signal, "alarm"):  # not on Windows, where no such signal comes
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


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
