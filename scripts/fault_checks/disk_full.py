"""Runs on a disk that gets full, and goes on when there is room again."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fault_checks import children
from fault_checks.tiny_runs import Options, differences, into, train

from unet_diffusion.files import PREFIX
from unet_diffusion.training.checkpoints import load_checkpoint, saved_checkpoints
from unet_diffusion.training.trainer import Trainer

SIZE = "16m"
BALLAST = "ballast"
FULL = ("No space left on device", "File too large")


@dataclass(frozen=True)
class Full:
    """When the disk gets full.

    Attributes:
        name: for the table.
        phase: a method of the training loop, which finds the disk full when it starts.
        call: which one of the process.
        room: bytes that are left.
    """

    name: str
    phase: str
    call: int
    room: int


CASES = (
    Full("a checkpoint", "_save", 3, 0),
    Full("a checkpoint, after its first file", "_save", 3, 90_000),
    Full("metrics.jsonl", "_log", 2, 0),
    Full("a preview", "_preview", 1, 0),
    Full("the weights of the export", "_export", 1, 0),
    Full("the images of the export", "_export", 1, 100_000),
)


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of 16 MB in a folder, if this process may make one; yields whether it is there."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def run_on_full_disk(options: Options, disk: Path, whole: Path, case: Full, mounted: bool) -> tuple[str, list[str]]:
    """A run that finds the disk full, is started again before there is room and again when there is.

    Args:
        options: of the run.
        disk: a folder, which is the small disk if there is one.
        whole: the undisturbed run.
        case: when it is full.
        mounted: whether there is one; else the size of files is limited instead, which is another error.

    Returns:
        The sentence that a user sees, and what was wrong.
    """
    run, log, problems = disk / "run", disk.parent / "full.log", []
    these = into(options, run)
    problem = children.run(log, _train_full, these, case, mounted)
    sentence = children.last_line(log)
    if not problem or "could not be written" not in sentence or not any(words in sentence for words in FULL):
        problems.append(f"the run said {sentence!r} and {problem!r}")
    for path in saved_checkpoints(run / "checkpoints"):
        load_checkpoint(path)
    problems += [f"leftover {path.relative_to(run)}" for path in run.rglob(f"{PREFIX}*")]
    if (disk / BALLAST).exists():
        if not children.run(log, train, these) or "could not be written" not in children.last_line(log):
            problems.append(f"started again while the disk was full: {children.last_line(log)!r}")
        (disk / BALLAST).unlink()
    if problem := children.run(log, train, these):
        problems.append(f"with room again: {problem}")
    elif found := differences(run, whole):
        problems.append(f"with room again: {', '.join(found)}")
    shutil.rmtree(run)
    log.unlink()
    return sentence.replace(str(disk.parent), "…"), problems


def _train_full(options: Options, case: Full, mounted: bool) -> None:
    calls, method = [0], getattr(Trainer, case.phase)

    def watched(trainer: Trainer, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] == case.call:
            if mounted and case.phase != "_log":  # a line goes into a block that the file has already
                fill(options.output.parent, case.room)
            else:
                limit_files((options.output / "metrics.jsonl").stat().st_size + 10)
        return method(trainer, *arguments)

    setattr(Trainer, case.phase, watched)
    log, sys.stderr = sys.stderr, io.StringIO()  # else the limit would hold for the progress bar too
    try:
        train(options)
    finally:
        limit_files(None)
        sys.stderr = log


def fill(disk: Path, room: int) -> None:
    """Writes a file that takes all the space but so many bytes."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(max(0, free - room)))


def limit_files(size: int | None) -> None:
    """Lets no file of this process grow beyond so many bytes."""
    import resource  # which Windows lacks

    most = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))
