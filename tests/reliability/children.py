"""Child processes that do a job, can be killed, and leave nothing behind."""

import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

TIMEOUT = 120.0  # seconds that a child may take; one that takes longer hangs


def start(log: Path, job: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Forks a child of this process, which has imported all that it needs, and lets it work.

    Args:
        log: file for its output and the traceback of its error.
        job: its work.
        arguments: of the job.
    """
    process = multiprocessing.get_context("fork").Process(target=_work, args=(log, job, *arguments))
    process.start()
    return process


def _work(log: Path, job: Callable[..., None], *arguments: Any) -> None:
    os.setsid()  # so that its data workers are found when it is dead
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    try:
        job(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def end(process: BaseProcess, timeout: float = TIMEOUT) -> str:
    """Waits for a child; returns how its end was wrong, or nothing."""
    ends = time.monotonic() + timeout
    while process.exitcode is None and time.monotonic() < ends:  # `join` would wait for its data workers too
        time.sleep(0.01)
    if process.exitcode is None:
        kill(process)
        return f"it hung for {timeout:.0f} s"
    return "" if process.exitcode == 0 else f"it ended with status {process.exitcode}"


def kill(process: BaseProcess) -> None:
    """Sends SIGKILL to a child and waits for its end."""
    process.kill()
    while process.exitcode is None:
        time.sleep(0.001)


def run(log: Path, job: Callable[..., None], *arguments: Any) -> str:
    """Does a job in a child to its end; returns what was wrong, with the last line of its log, or nothing."""
    problem = end(start(log, job, *arguments))
    return f"{problem}: {last_line(log)}" if problem else ""


def last_line(log: Path) -> str:
    """Returns the last line of a log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""


def session(leader: int) -> list[int]:
    """Returns the processes of a child that are alive, itself included."""
    alive = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
        except ProcessLookupError:
            pass  # it has just ended
    return alive


def all_gone(leaders: list[int], within: float) -> list[int]:
    """Waits until the processes of dead children are gone; returns those that are left in the end."""
    ends = time.monotonic() + within
    while True:
        left = [pid for leader in leaders for pid in session(leader)]
        if not left or time.monotonic() > ends:
            return left
        time.sleep(0.1)
