"""Writers that are killed before each of their calls to the file system."""

import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fault_checks import children

from unet_diffusion import files as atomic
from unet_diffusion.files import INDEX, merged_into, remove_leftovers
from unet_diffusion.training import checkpoints
from unet_diffusion.training.checkpoints import (
    Checkpoint,
    DamagedCheckpoint,
    load_checkpoint,
    load_latest,
    same_bits,
    save_checkpoint,
    saved_checkpoints,
)

CALLS = ((os, "mkdir"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (checkpoints, "save_file"))
FILES = ("README.md", INDEX, "unet/config.json", "unet/weights.safetensors")
LARGE = 2_000_000  # values of a checkpoint whose writing takes long enough to be hit


def checkpoint(step: int, values: int = 1000) -> Checkpoint:
    """One that can be told from those of other steps."""
    parts = {name: {"weight": torch.full((values,), float(step))} for name in ("model", "ema", "optimizer")}
    return Checkpoint(step=step, tensors=parts, state={"loss_count": step})


def killed_before_each_call(
    folder: Path, write: Callable[[Path], None], look: Callable[[Path], str]
) -> tuple[int, list[str]]:
    """Lets a writer die before its first call, then before its second, until it comes to its end.

    Args:
        folder: `before` in it is what the writer finds.
        write: works in a folder.
        look: returns what is wrong with such a folder, or nothing.

    Returns:
        How many calls the writer makes, and what was wrong.
    """
    problems: list[str] = []
    call = 0
    while True:
        call += 1
        place = folder / "place"
        shutil.copytree(folder / "before", place)
        process = children.start(folder / "log", _die_before, call, write, place)
        children.end(process)
        if found := look(place):
            problems.append(f"killed before call {call}: {found}")
        shutil.rmtree(place)
        if process.exitcode != -signal.SIGKILL:
            if process.exitcode:
                problems.append(f"it failed: {children.last_line(folder / 'log')}")
            return call - 1, problems


def _die_before(call: int, write: Callable[[Path], None], place: Path) -> None:
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
    write(place)


def checkpoint_writes(folder: Path) -> tuple[int, list[str]]:
    """A checkpoint that is written beside a whole and a damaged one, the write and the removals killed at each call."""
    folder.mkdir()
    for step in (1, 2, 4):
        save_checkpoint(folder / "before", checkpoint(step), keep=3)
    (folder / "before" / "step-00000004" / "ema.safetensors").unlink()
    return killed_before_each_call(folder, lambda place: _save(place, 3), lambda place: wrong_with(place, {2, 3}))


def _save(place: Path, step: int, values: int = 1000) -> None:
    save_checkpoint(place, checkpoint(step, values), keep=2)


def wrong_with(place: Path, steps: set[int], values: int = 1000) -> str:
    """Whether the newest whole checkpoint is one of those, and the same write then succeeds and leaves nothing."""
    logging.getLogger(checkpoints.__name__).setLevel(logging.ERROR)  # a damaged one is there on purpose
    try:
        loaded = load_latest(place)
    finally:
        logging.getLogger(checkpoints.__name__).setLevel(logging.NOTSET)
    if loaded is None or loaded.step not in steps:
        return f"the newest whole checkpoint is {loaded and loaded.step}"
    if not same_bits(loaded.tensors, checkpoint(loaded.step, values).tensors):
        return f"checkpoint {loaded.step} has other values"
    remove_leftovers(place)
    try:
        for path in saved_checkpoints(place):
            if path.name < f"step-{loaded.step:08d}":
                load_checkpoint(path)  # an older one is there whole or not at all
    except DamagedCheckpoint as error:
        return str(error)
    _save(place, max(steps), values)
    names = sorted(path.name for path in place.iterdir())
    return "" if names == [f"step-{step:08d}" for step in sorted(steps)] else f"afterwards there are {names}"


def large_writes(folder: Path, count: int) -> tuple[int, list[str]]:
    """A checkpoint of 24 MB whose writing is killed at random moments; how many died, and what was wrong."""
    folder.mkdir()
    save_checkpoint(folder / "before", checkpoint(2, LARGE), keep=2)
    draw, problems, died = random.Random("large"), [], 0
    started = time.monotonic()
    children.run(folder / "log", _save, folder / "before", 3, LARGE)
    duration = time.monotonic() - started
    shutil.rmtree(folder / "before" / "step-00000003")
    for number in range(count):
        place = folder / "place"
        shutil.copytree(folder / "before", place)
        process = children.start(folder / "log", _save, place, 3, LARGE)
        time.sleep((number + draw.random()) / count * duration)
        children.kill(process)
        died += process.exitcode == -signal.SIGKILL
        if found := wrong_with(place, {2, 3}, LARGE):
            problems.append(found)
        shutil.rmtree(place)
    return died, problems


def export_writes(folder: Path) -> tuple[int, list[str]]:
    """An export that replaces an earlier one, killed at each call."""
    folder.mkdir()
    (folder / "before").mkdir()
    _export(folder / "before", "old")
    return killed_before_each_call(folder, lambda place: _export(place, "new"), _mixed)


def _export(place: Path, text: str) -> None:
    with merged_into(place) as aside:
        for name in FILES:
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(text)


def _mixed(place: Path) -> str:
    if not (place / INDEX).exists():
        return ""  # no reader takes it for a pipeline
    texts = {name: (place / name).read_text() if (place / name).exists() else "none" for name in FILES}
    return "" if len(set(texts.values())) == 1 else f"a pipeline of several exports: {texts}"


def seconds_of_a_write(folder: Path, values: int) -> dict[str, float]:
    """How long checkpoints of three parts take: as they are, without waiting for the disk, without reading back."""
    times = {}
    large, flush, load = checkpoint(1, values), atomic.flush_to_disk, checkpoints.load_checkpoint
    ways = {"as it is": {}, "not flushed": {"flush": _nothing}, "not read back": {"load": lambda path: large}}
    for name, changed in ways.items():
        atomic.flush_to_disk = changed.get("flush", flush)
        checkpoints.load_checkpoint = changed.get("load", load)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            save_checkpoint(folder / "cost", large, keep=1)
            best = min(best, time.perf_counter() - started)
        times[name] = best
        shutil.rmtree(folder / "cost")
    atomic.flush_to_disk, checkpoints.load_checkpoint = flush, load
    return times


def _nothing(path: Path, recursive: bool = True) -> None:
    return None
