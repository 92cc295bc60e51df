"""Measurements that need a process of their own, and the memory that Linux counts for a process."""

import os
import subprocess
import sys
from pathlib import Path


def start(module: str, *arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> str:
    """Runs a module of this folder in a new process and returns what it prints.

    Args:
        module: its name; the working directory must be the root of a clone.
        arguments: arguments of the module.
        launcher: arguments of Python before it, such as those of torchrun.
        environment: variables that are set beside those of this process.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, *launcher, "-m", f"scripts.benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{module} failed: {done.stderr.strip()[-1000:]}")
    return done.stdout


def resident(field: str) -> float:
    """A field of `/proc/self/status` in MiB: VmRSS is the memory now, VmHWM the most so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024
