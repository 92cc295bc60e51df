"""Nothing lost: a run that is killed at any moment, and started again, ends as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fault_checks import children
from fault_checks.finding import Finding
from fault_checks.places import PHASES, PLACES, Place, die_at, note_phases
from fault_checks.tiny_runs import TASKS, Options, differences, into, tiny_runs, train

PROMISE = "Nothing lost"
SEED = 0
KILLS = {"ddpm": 20, "segmentation": 5, "joint": 5}
KILLS_REDUCED = {"ddpm": 2, "segmentation": 0, "joint": 1}
COMMANDS = 3  # kills of the real command
COMMAND_STEPS = 400  # some seconds on a fast machine, so that none ends before it is killed
WORKERS_END = 8.0  # seconds within which orphaned data workers end; torch's look every 5


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """Kills runs of all tasks at random moments and in chosen places, and looks what became of them."""
    torch.set_num_threads(1)
    runs = tiny_runs(work, steps=8 if reduced else 12)
    killed: list[int] = []  # processes that had data workers
    for task in TASKS:
        count = (KILLS_REDUCED if reduced else KILLS)[task]
        started = time.monotonic()
        problem = children.run(work / f"{task}.log", train, into(runs[task], work / task / "whole"))
        duration = time.monotonic() - started
        if problem:
            yield Finding(PROMISE, f"an undisturbed run, {task}", problem, held=False)
            continue
        if count:
            yield random_kills(runs[task], work / task, count, duration, killed)
        if task == "ddpm" or not reduced:
            yield placed_kills(runs[task], work / task, PLACES, killed)
    yield orphans(killed)
    if not reduced:
        yield command_kills(runs["ddpm"], work / "command")


def random_kills(options: Options, folder: Path, count: int, duration: float, killed: list[int]) -> Finding:
    """One kill a run, at moments spread over its length; every other run has a data worker.

    Args:
        options: of the run.
        folder: of the task, with the undisturbed run in `whole`.
        count: of kills.
        duration: of the undisturbed run, in seconds.
        killed: gets the processes that had data workers.
    """
    draw, started = random.Random(f"{SEED} {folder.name}"), time.monotonic()
    fell: Counter[str] = Counter()
    problems = []
    for number in range(count):
        run, moment = folder / f"random-{number}", (number + draw.random()) / count * duration
        these = into(options, run, num_workers=number % 2)
        while (phase := kill_after(these, moment, killed)) is None:  # the machine was faster than before
            shutil.rmtree(run)
            moment /= 2
        fell[phase] += 1
        if problem := children.run(run.with_suffix(".log"), train, these):
            problems.append(f"killed at {moment:.2f} s ({phase}): {problem}")
        elif found := differences(run, folder / "whole"):
            problems.append(f"killed at {moment:.2f} s ({phase}): {', '.join(found)}")
    where = ", ".join(f"{fell[phase]} {phase}" for phase in PHASES.values() if fell[phase])
    return _finding(
        f"{count} runs killed once, at random moments, {folder.name}",
        f"{count - len(problems)} of {count} resumed and ended bit-equal; the kills fell: {where}",
        time.monotonic() - started,
        problems,
    )


def kill_after(options: Options, moment: float, killed: list[int]) -> str | None:
    """Starts a run and kills it after so many seconds; returns the phase that it was in, None if it had ended."""
    phase = multiprocessing.get_context("fork").RawValue("i", 0)
    process = children.start(options.output.with_suffix(".log"), _train_noted, options, phase)
    process.join(moment)
    if process.exitcode is not None:
        return None
    children.kill(process)
    if options.data.num_workers:
        killed.append(process.pid)
    return list(PHASES.values())[phase.value]


def _train_noted(options: Options, phase: Any) -> None:
    note_phases(phase)
    train(options)


def placed_kills(options: Options, folder: Path, places: tuple[Place, ...], killed: list[int]) -> Finding:
    """One run with a data worker that is killed in one chosen place after the other, and then goes to its end."""
    run, started, problems = folder / "placed", time.monotonic(), []
    these = into(options, run, num_workers=1)
    for place in places:
        process = children.start(run.with_suffix(".log"), _train_to_death, these, place)
        children.end(process)
        killed.append(process.pid)
        if process.exitcode != -signal.SIGKILL:
            problems.append(f"not killed in {place.name}: {children.last_line(run.with_suffix('.log'))}")
    if problem := children.run(run.with_suffix(".log"), train, these):
        problems.append(problem)
    elif found := differences(run, folder / "whole"):
        problems.append(", ".join(found))
    return _finding(
        f"one run killed in {len(places)} places: {', '.join(place.name for place in places)}; {folder.name}",
        "resumed each time, and ended bit-equal",
        time.monotonic() - started,
        problems,
    )


def _train_to_death(options: Options, place: Place) -> None:
    die_at(place)
    train(options)


def orphans(killed: list[int]) -> Finding:
    """Whether the data workers of killed runs are gone."""
    started = time.monotonic()
    left = children.all_gone(killed, WORKERS_END)
    return _finding(
        f"data workers of {len(killed)} killed runs",
        f"none is left, {WORKERS_END:.0f} s after the last kill at most",
        time.monotonic() - started,
        [f"{len(left)} processes are left"] if left else [],
    )


def command_kills(options: Options, folder: Path) -> Finding:
    """Kills `unet-diffusion train-ddpm` while it trains, and gives the same command again."""
    options = replace(options, training=replace(options.training, steps=COMMAND_STEPS))
    started, draw, problems = time.monotonic(), random.Random(f"{SEED} command"), []
    folder.mkdir()
    if problem := children.run(folder / "whole.log", train, into(options, folder / "whole")):
        problems.append(problem)
    for number in range(COMMANDS):
        run = folder / f"killed-{number}"
        command = [*program(), *arguments(into(options, run, num_workers=1))]
        with open(folder / f"{number}.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
            while process.poll() is None and not (run / "config.json").exists():
                time.sleep(0.01)
            time.sleep(0.3 + (number + draw.random()) / COMMANDS)
            ended = process.poll() is not None
            process.kill()
            process.wait()
            again = subprocess.run(
                command, stdout=log, stderr=log, env=environment(), timeout=children.TIMEOUT, check=False
            )
        if ended or again.returncode:
            what = "ended before it was killed" if ended else f"ended with status {again.returncode}"
            problems.append(f"run {number} {what}: {children.last_line(folder / f'{number}.log')}")
        elif found := differences(run, folder / "whole"):
            problems.append(f"run {number}: {', '.join(found)}")
    return _finding(
        f"{COMMANDS} runs of the command unet-diffusion train-ddpm killed",
        "the same command resumed, and ended bit-equal",
        time.monotonic() - started,
        problems,
    )


def program() -> list[str]:
    """The command as it was installed beside this Python, or what it does."""
    installed = shutil.which("unet-diffusion", path=str(Path(sys.executable).parent))
    return [installed] if installed else [sys.executable, "-c", "from unet_diffusion.cli import main; main()"]


def environment() -> dict[str, str]:
    """For commands: one thread, and the CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def arguments(options: Any) -> list[str]:
    """A DDPM run of `tiny_runs` as the arguments of the command."""
    values = {
        "output": options.output,
        "model": options.model,
        "data": options.data.data,
        **{name: getattr(options.data, name) for name in ("validation_fraction", "cache_dir", "num_workers")},
        "preview_images": options.diffusion.preview_images,
        **{name: value for name, value in vars(options.training).items() if type(value) is int},
    }
    given = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["train-ddpm", *given, "--trackers"]


def _finding(check: str, figure: str, seconds: float, problems: list[str]) -> Finding:
    return Finding(PROMISE, check, "; ".join(problems) or f"{figure}; {seconds:.0f} s", held=not problems)
