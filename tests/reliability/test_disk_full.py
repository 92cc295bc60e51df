"""A run on a full disk ends with an error that names the file, and resumes when there is room again."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability import children
from tests.reliability.tiny_runs import Options, differences, into, train
from unet_diffusion.files import PREFIX
from unet_diffusion.training.checkpoints import load_checkpoint, saved_checkpoints
from unet_diffusion.training.trainer import Trainer

PROMISE = "No half-written state"
SIZE = "16m"
BALLAST = "ballast"
FULL = ("No space left on device", "File too large")


@dataclass(frozen=True)
class Full:
    """When the disk gets full.

    Attributes:
        name: for the table.
        phase: a method of the training loop, which finds the disk full when it starts.
        call: number of the call in the process, from 1.
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


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_disk_full_while_writing(case, whole_run, tmp_path, record_property):
    """The run finds the disk full, is started again before there is room, and again when there is."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    run = disk / "run"
    options = into(whole_run.options, run)
    with small_disk(disk) as mounted:
        kind = "a real file system of 16 MB" if mounted and case.phase != "_log" else "a limit of file sizes"
        record_property("fault", f"disk full while writing {case.name}, {kind}")
        assert children.run(log, _train_on_full_disk, options, case, mounted) != ""
        sentence = children.last_line(log)
        assert "could not be written" in sentence and any(words in sentence for words in FULL), sentence
        for path in saved_checkpoints(run / "checkpoints"):
            load_checkpoint(path)
        assert list(run.rglob(f"{PREFIX}*")) == []
        if (disk / BALLAST).exists():
            assert children.run(log, train, options) != ""
            assert "could not be written" in children.last_line(log)
            (disk / BALLAST).unlink()
        assert children.run(log, train, options) == ""
        assert differences(run, whole_run.folder) == []
    end = "earlier checkpoints whole, nothing left over; with room again ended bit-equal"
    sentence = re.sub(rf"(?<={re.escape(PREFIX)})\w+", "…", sentence.replace(f"{disk}/", ""))
    record_property("figure", f'"{sentence}"; {end}')


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a file system of 16 MB in a new folder, if this process may; yields whether it is there."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _train_on_full_disk(options: Options, case: Full, mounted: bool) -> None:
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
    log, sys.stderr = sys.stderr, io.StringIO()  # otherwise the limit would apply to the progress bar too
    try:
        train(options)
    finally:
        limit_files(None)
        sys.stderr = log


def fill(disk: Path, room: int) -> None:
    """Writes a file that takes all the space except `room` bytes."""
    with open(disk / BALLAST, "wb", buffering=0) as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(max(0, free - room)))


def limit_files(size: int | None) -> None:
    """Limits the size in bytes of the files that this process writes."""
    import resource  # which Windows lacks

    most = resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))
