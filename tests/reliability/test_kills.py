"""A run that is killed at any moment and started again by the same command ends like an undisturbed run."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import children
from tests.reliability.places import PHASES, PLACES, Place, die_at, note_phases
from tests.reliability.tiny_runs import TASKS, Options, ddpm_arguments, differences, into, tiny_runs, train
from unet_diffusion.training.checkpoints import saved_checkpoints

PROMISE = "Nothing lost"
SEED = 0
KILLS = {"ddpm": 20, "segmentation": 5, "joint": 5, "few_steps": 5}
FEW_KILLS = {"ddpm": 2, "segmentation": 1, "joint": 1, "few_steps": 1}
COMMANDS = 3  # kills of the real command
COMMAND_STEPS = 400  # some seconds on a fast machine, so that no run ends before it is killed
WORKERS_END = 8.0  # seconds within which orphaned data workers end; those of torch check every 5

pytestmark = pytest.mark.slow


@dataclass
class Undisturbed:
    """A run that is not disturbed.

    Attributes:
        task: a key of `KILLS`.
        options: of the run; `into` sets the output.
        folder: of the task, with the run in `whole`.
        seconds: that it took.
    """

    task: str
    options: Options
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def options(tmp_path_factory, full) -> dict[str, Options]:
    return tiny_runs(tmp_path_factory.mktemp("runs"), steps=12 if full else 8)


@pytest.fixture(scope="module", params=TASKS)
def undisturbed(request, options, tmp_path_factory) -> Undisturbed:
    folder = tmp_path_factory.mktemp(request.param)
    started = time.monotonic()
    assert children.run(folder / "log", train, into(options[request.param], folder / "whole")) == ""
    return Undisturbed(request.param, options[request.param], folder, time.monotonic() - started)


def test_runs_killed_once_at_random_moments(undisturbed, full, record_property):
    """The moments are spread over the length of a run; every other run has a data worker."""
    count = (KILLS if full else FEW_KILLS)[undisturbed.task]
    draw = random.Random(f"{SEED} {undisturbed.task}")
    phases: Counter[str] = Counter()
    problems, with_workers = [], []
    for number in range(count):
        run, moment = undisturbed.folder / f"random-{number}", (number + draw.random()) / count * undisturbed.seconds
        options = into(undisturbed.options, run, num_workers=number % 2)
        while (killed := kill_after(options, moment)) is None:  # the machine was faster than before
            shutil.rmtree(run)
            moment /= 2
        process, phase = killed
        with_workers += [process] * options.data.num_workers
        phases[phase] += 1
        problems += [f"killed at {moment:.2f} s ({phase}): {each}" for each in wrong_end(options, undisturbed)]
    assert problems == []
    assert children.all_gone(with_workers, WORKERS_END) == []
    where = ", ".join(f"{phases[phase]} {phase}" for phase in PHASES.values() if phases[phase])
    record_property(
        "figure", f"{count} of {count} resumed and ended bit-equal, no process left; the kills fell: {where}"
    )


def kill_after(options: Options, moment: float) -> tuple[int, str] | None:
    """Starts a run and kills it after `moment` seconds; returns its process and phase, None if it had ended."""
    phase = multiprocessing.get_context("fork").RawValue("i", 0)
    process = children.start(options.output.with_suffix(".log"), _train_noted, options, phase)
    process.join(moment)
    if process.exitcode is not None:
        return None
    children.kill(process)
    return process.pid, list(PHASES.values())[phase.value]


def _train_noted(options: Options, phase: Any) -> None:
    note_phases(phase)
    train(options)


def wrong_end(options: Options, undisturbed: Undisturbed) -> list[str]:
    """Resumes a killed run; returns what went wrong, or how its result differs from the undisturbed run."""
    if problem := children.run(options.output.with_suffix(".log"), train, options):
        return [problem]
    return differences(options.output, undisturbed.folder / "whole")


def test_one_run_killed_in_all_15_places(undisturbed, record_property):
    """The run has a data worker, is killed in one place after the other, and is then resumed to its end."""
    assert len(PLACES) == 15
    run = undisturbed.folder / "placed"
    options = into(undisturbed.options, run, num_workers=1)
    problems, killed = [], []
    for place in PLACES:
        process = children.start(run.with_suffix(".log"), _train_to_death, options, place)
        children.end(process)
        killed.append(process.pid)
        if process.exitcode != -signal.SIGKILL:
            problems.append(f"not killed in {place.name}: {children.last_line(run.with_suffix('.log'))}")
    assert problems + wrong_end(options, undisturbed) == []
    assert children.all_gone(killed, WORKERS_END) == []
    record_property("figure", "resumed each time, ended bit-equal, and left no process")


def _train_to_death(options: Options, place: Place) -> None:
    die_at(place)
    train(options)


def test_a_stop_that_reaches_the_data_workers_too(tmp_path, record_property):
    """A scheduler or a service manager sends SIGTERM to all processes of a job."""
    options = into(tiny_runs(tmp_path, steps=2000)["ddpm"], tmp_path / "run", num_workers=1)
    options.training.checkpoint_every = 1000
    process = children.start(tmp_path / "log", train, options)
    while not list((tmp_path / "run").glob("previews/*.png")):
        assert process.exitcode is None, children.last_line(tmp_path / "log")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert children.end(process, 60) == f"it ended with status {128 + signal.SIGTERM}"
    (saved,) = saved_checkpoints(tmp_path / "run" / "checkpoints")
    assert children.all_gone([process.pid], 5) == []
    record_property("figure", f"status {128 + signal.SIGTERM}, saved {saved.name}, left no process")


@pytest.mark.usefixtures("only_full")
def test_the_command_killed(options, tmp_path, record_property):
    record_property("fault", f"{COMMANDS} runs of the command unet-diffusion train-ddpm killed")
    options = replace(options["ddpm"], training=replace(options["ddpm"].training, steps=COMMAND_STEPS))
    draw, problems = random.Random(f"{SEED} command"), []
    assert children.run(tmp_path / "whole.log", train, into(options, tmp_path / "whole")) == ""
    for number in range(COMMANDS):
        run = tmp_path / f"killed-{number}"
        command = [*program(), *ddpm_arguments(into(options, run, num_workers=1))]
        with open(tmp_path / f"{number}.log", "wb") as log:
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
            problems.append(f"run {number} {what}: {children.last_line(tmp_path / f'{number}.log')}")
        else:
            problems += [f"run {number}: {each}" for each in differences(run, tmp_path / "whole")]
    assert problems == []
    record_property("figure", "the same command resumed each time, and ended bit-equal")


def program() -> list[str]:
    """Returns the command as it is installed beside this Python, or its equivalent."""
    installed = shutil.which("unet-diffusion", path=str(Path(sys.executable).parent))
    return [installed] if installed else [sys.executable, "-c", "from unet_diffusion.cli import main; main()"]


def environment() -> dict[str, str]:
    """Returns the environment of commands: one thread, and the CPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
