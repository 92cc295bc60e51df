"""Places in a run, exact to the call, where a process kills itself."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save

from unet_diffusion.training import checkpoints
from unet_diffusion.training.metrics_log import MetricsLog
from unet_diffusion.training.moving_average import MovingAverage
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unet import UNet

PHASES = {  # methods of the training loop, and their names in the table
    "": "while setting up or between phases",
    "_start": "while finding the checkpoint",
    "_train_step": "in a step",
    "_log": "in a log line",
    "_validate": "in a validation",
    "_preview": "in a preview",
    "_save": "in a checkpoint write",
    "_export": "in the final export",
}


@dataclass(frozen=True)
class Place:
    """One call of a function in a phase of the run.

    Attributes:
        name: for the table.
        phase: a method of the training loop.
        owner: of the function, a class or a module.
        function: its name.
        call: number of the call in this process and phase, from 1.
        half: takes the arguments of the call, and does a part of its work before the kill.
    """

    name: str
    phase: str
    owner: Any
    function: str
    call: int = 1
    half: Callable[..., None] | None = None


def _half_a_line(log: MetricsLog, step: int, **values: Any) -> None:
    with log.path.open("a") as file:
        file.write(f'{{"step": {step}, "lo')


def _half_a_file(tensors: Any, path: Path) -> None:
    data = save(tensors)
    path.write_bytes(data[: len(data) // 2])


def _half_a_folder(folder: Path) -> None:
    sorted(folder.iterdir())[0].unlink()


PLACES = (
    Place("config.json before it is renamed", "_start", os, "replace"),
    Place("a new metrics.jsonl before it is renamed", "_start", os, "replace", 2),
    Place("the second half of a step", "_train_step", Accelerator, "backward", 6),
    Place("a step between optimizer and average", "_train_step", MovingAverage, "step_unless", 2),
    Place("half a line of metrics", "_log", MetricsLog, "append", 1, _half_a_line),
    Place("the cutting of metrics.jsonl to the checkpoint", "_start", os, "replace", 2),
    Place("a validation", "_validate", UNet, "forward"),
    Place("the network of a preview", "_preview", UNet, "forward"),
    Place("a preview before it is renamed", "_preview", os, "replace"),
    Place("half a file of a checkpoint", "_save", checkpoints, "save_file", 2, _half_a_file),
    Place("a checkpoint before it is read back", "_save", checkpoints, "load_checkpoint"),
    Place("a checkpoint before it is renamed", "_save", os, "replace", 3),
    Place("the removal of an old checkpoint", "_save", shutil, "rmtree", 1, _half_a_folder),
    Place("the images of the export", "_export", UNet, "forward"),
    Place("the moving of the export's files", "_export", os, "replace", 5),
)


def note_phases(phase: Any) -> None:
    """Makes the training loop of this process report its phase.

    Args:
        phase: a shared number, set to the index of the phase in `PHASES`.
    """
    for number, method in enumerate(PHASES):
        if method:
            setattr(Trainer, method, _noted(getattr(Trainer, method), phase, number))


def _noted(method: Callable[..., Any], phase: Any, number: int) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        phase.value = number
        try:
            return method(*arguments)
        finally:
            phase.value = 0

    return noted


def die_at(place: Place) -> None:
    """Makes this process kill itself when it reaches a place."""
    calls, inside = [0], [False]
    method, function = getattr(Trainer, place.phase), getattr(place.owner, place.function)

    def watched(*arguments: Any) -> Any:
        inside[0] = True
        try:
            return method(*arguments)
        finally:
            inside[0] = False

    def deadly(*arguments: Any, **named: Any) -> Any:
        calls[0] += inside[0]
        if inside[0] and calls[0] == place.call:
            if place.half is not None:
                place.half(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(Trainer, place.phase, watched)
    setattr(place.owner, place.function, deadly)
