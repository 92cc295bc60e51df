"""A process that is killed while it writes a checkpoint or an export leaves the old files or the new ones."""

import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import children
from unet_diffusion import files
from unet_diffusion.files import INDEX, merged_into, remove_leftovers
from unet_diffusion.training import checkpoints
from unet_diffusion.training.checkpoints import (
    Checkpoint,
    load_checkpoint,
    load_latest,
    same_bits,
    save_checkpoint,
    saved_checkpoints,
)

PROMISE = "No half-written state"
CALLS = ((os, "mkdir"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (checkpoints, "save_file"))
EXPORT = ("README.md", INDEX, "unet/config.json", "unet/weights.safetensors")
LARGE = 2_000_000  # values of a checkpoint that takes long enough to write
COST = 30_000_000  # values in each of three parts, about as many as the network of 2015 has

pytestmark = pytest.mark.slow


def checkpoint(step: int, values: int = 1000) -> Checkpoint:
    """Returns a checkpoint that differs from those of other steps."""
    parts = {name: {"weight": torch.full((values,), float(step))} for name in ("model", "ema", "optimizer")}
    return Checkpoint(step=step, tensors=parts, state={"loss_count": step})


def killed_before_each_call(work: Path, write: Callable[[Path], None], check: Callable[[Path], None]) -> int:
    """Kills a writer before its first call to the file system, then before its second, and so on until it finishes.

    Args:
        work: a folder; `before` in it is what the writer finds.
        write: writes into a folder.
        check: raises AssertionError if such a folder is wrong.

    Returns:
        How many calls the writer makes.
    """
    call = 0
    while True:
        call += 1
        folder = work / "folder"
        shutil.copytree(work / "before", folder)
        process = children.start(work / "log", _die_before, call, write, folder)
        children.end(process)
        check(folder)
        shutil.rmtree(folder)
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, children.last_line(work / "log")
            return call - 1


def _die_before(call: int, write: Callable[[Path], None], folder: Path) -> None:
    calls = [0]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return counted

    for owner, name in CALLS:
        setattr(owner, name, deadly(getattr(owner, name)))
    write(folder)


def test_a_writer_of_a_checkpoint_killed_before_each_of_its_calls_to_the_file_system(tmp_path, record_property):
    """The checkpoint is written beside a whole and a damaged one; the removals are killed too."""
    for step in (1, 2, 4):
        save_checkpoint(tmp_path / "before", checkpoint(step), keep=3)
    (tmp_path / "before" / "step-00000004" / "ema.safetensors").unlink()
    calls = killed_before_each_call(tmp_path, lambda folder: _save(folder, 3), lambda folder: check(folder, {2, 3}))
    assert calls > 10
    record_property("figure", f"{calls} kills: the newest checkpoint was whole each time")


def _save(folder: Path, step: int, values: int = 1000) -> None:
    save_checkpoint(folder, checkpoint(step, values), keep=2)


def check(folder: Path, steps: set[int], values: int = 1000) -> None:
    """Checks that the newest whole checkpoint is one of `steps`, and that the same write then leaves just these."""
    logging.getLogger(checkpoints.__name__).setLevel(logging.ERROR)  # a damaged one is there on purpose
    try:
        loaded = load_latest(folder)
    finally:
        logging.getLogger(checkpoints.__name__).setLevel(logging.NOTSET)
    assert loaded is not None and loaded.step in steps
    assert same_bits(loaded.tensors, checkpoint(loaded.step, values).tensors)
    remove_leftovers(folder)
    for path in saved_checkpoints(folder):
        if path.name < f"step-{loaded.step:08d}":
            load_checkpoint(path)  # an older one is there whole or not at all
    _save(folder, max(steps), values)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in sorted(steps)]


def test_a_writer_of_a_checkpoint_of_24_MB_killed_at_random_moments(tmp_path, full, record_property):
    count = 20 if full else 2
    save_checkpoint(tmp_path / "before", checkpoint(2, LARGE), keep=2)
    draw, died = random.Random("large"), 0
    started = time.monotonic()
    assert children.run(tmp_path / "log", _save, tmp_path / "before", 3, LARGE) == ""
    duration = time.monotonic() - started
    shutil.rmtree(tmp_path / "before" / "step-00000003")
    for number in range(count):
        folder = tmp_path / "folder"
        shutil.copytree(tmp_path / "before", folder)
        process = children.start(tmp_path / "log", _save, folder, 3, LARGE)
        time.sleep((number + draw.random()) / count * duration)
        children.kill(process)
        died += process.exitcode == -signal.SIGKILL
        check(folder, {2, 3}, LARGE)
        shutil.rmtree(folder)
    record_property("figure", f"{died} kills: the newest checkpoint was whole each time")


def test_a_writer_of_an_export_killed_before_each_of_its_calls_to_the_file_system(tmp_path, record_property):
    """The export replaces an earlier one."""
    (tmp_path / "before").mkdir()
    _export(tmp_path / "before", "old")
    calls = killed_before_each_call(tmp_path, lambda folder: _export(folder, "new"), check_export)
    assert calls > 10
    record_property("figure", f"{calls} kills: the export was whole, or no pipeline, each time")


def _export(folder: Path, text: str) -> None:
    with merged_into(folder) as aside:
        for name in EXPORT:
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(text)


def check_export(folder: Path) -> None:
    """Checks that the files of a pipeline are of one export; without an index no reader takes it for a pipeline."""
    if (folder / INDEX).exists():
        assert len({(folder / name).read_text() for name in EXPORT}) == 1


@pytest.mark.usefixtures("only_full")
def test_the_cost_of_a_checkpoint_of_360_MB(tmp_path, monkeypatch, record_property):
    large = checkpoint(1, COST)
    whole = seconds_of_a_write(tmp_path, large)
    with monkeypatch.context() as patch:
        patch.setattr(files, "flush_to_disk", lambda path, recursive=True: None)
        flush = whole - seconds_of_a_write(tmp_path, large)
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda path: large)
    read = whole - seconds_of_a_write(tmp_path, large)
    record_property(
        "figure",
        f"{whole:.2f} s, of them {flush:.2f} s until the disk has it, and {read:.2f} s to read it back and compare",
    )


def seconds_of_a_write(folder: Path, saved: Checkpoint) -> float:
    """Returns the shortest time of three writes."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        save_checkpoint(folder / "cost", saved, keep=1)
        seconds.append(time.perf_counter() - started)
    shutil.rmtree(folder / "cost")
    return min(seconds)
