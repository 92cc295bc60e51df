"""Reading ahead of the network and writing behind it, in threads, with bounded memory."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

WRITERS = 4
MOST_BYTES = 256 * 2**20  # of decoded images between reading and writing
MOST_IMAGES = 16


class Room:
    """Memory for the images between reading and writing: a number of bytes, but always enough for one image."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most, self.used, self.closed = most, 0, False
        self.changed = threading.Condition()

    def enter(self, size: int) -> int:
        """Waits until there is room for an image of `size` bytes; returns the size to pass to `leave`."""
        size = max(size, self.most // MOST_IMAGES)
        with self.changed:
            self.changed.wait_for(lambda: self.closed or not self.used or self.used + size <= self.most)
            self.used += size
        return size

    def leave(self, size: int) -> None:
        """Makes the room of an image free again."""
        with self.changed:
            self.used -= size
            self.changed.notify_all()

    def close(self) -> None:
        """Ends all waiting for room."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Ahead(Generic[S, T]):
    """Yields items in order, each with the result of a function, which another thread calls ahead.

    The function itself waits for room. If it raises an error, the error is raised in place of the item.
    """

    def __init__(self, function: Callable[[S], T], items: Iterable[S], room: Room) -> None:
        self.function, self.items, self.room = function, items, room
        self.ready: SimpleQueue[tuple[S, T] | BaseException | None] = SimpleQueue()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, name="reading ahead", daemon=True)

    def _work(self) -> None:
        try:
            for item in self.items:
                if self.stopped.is_set():
                    return
                self.ready.put((item, self.function(item)))
            self.ready.put(None)
        except BaseException as error:
            self.ready.put(error)

    def __iter__(self) -> Iterator[tuple[S, T]]:
        while (found := self.ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def __enter__(self) -> "Ahead[S, T]":
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stopped.set()
        self.room.close()
        self.thread.join()


class Behind:
    """Runs jobs in other threads; the first error of a job is raised by the next call, or at the end of the block.

    The end of the block waits for all jobs, also after Ctrl-C. After another error, jobs that have not begun are
    dropped.
    """

    def __init__(self, threads: int = WRITERS) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="writing")
        self.error: BaseException | None = None
        self.is_done = False  # true after the block, unless another Ctrl-C has ended the waiting

    def do(self, job: Callable[[], Any]) -> None:
        """Schedules a job."""
        self.raise_error()
        self.pool.submit(job).add_done_callback(self._note)

    def _note(self, done: Future) -> None:
        if not done.cancelled() and (error := done.exception()) is not None and self.error is None:
            self.error = error

    def raise_error(self) -> None:
        """Raises the first error of a job."""
        if self.error is not None:
            raise self.error

    def __enter__(self) -> "Behind":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=isinstance(error, Exception))
        self.is_done = True
        if error is None:
            self.raise_error()
