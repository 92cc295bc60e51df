"""The training loop with the CPU seconds of its steps, for experiments that compare costs of training."""

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.experiments.pace import PACED, steps_within
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import make_unet
from unet_diffusion.data.sets import load_images
from unet_diffusion.files import write_json
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.checkpoints import Checkpoint
from unet_diffusion.training.trainer import Trainer

PACE = "pace.json"  # steps of a run that has a given time
SECONDS = "cpu_seconds.json"  # in the folder of a run: seconds before each checkpoint, by its step


class TimedTrainer(Trainer):
    """A trainer that adds up the CPU seconds of its steps (in this process), over all parts of a resumed run."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.cpu_seconds = 0.0
        self.at_checkpoints: dict[str, float] = {}  # by step

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        started = time.process_time()
        super()._train_step(batches)
        self.cpu_seconds += time.process_time() - started

    def one_by_one(self) -> Generator[float, None, None]:
        """Takes a step each time, and yields its CPU seconds."""
        self._start()
        with closing(self.task.batches(self.context, 0)) as batches:
            while True:
                before = self.cpu_seconds
                self._train_step(batches)
                yield self.cpu_seconds - before

    def durations(self, steps: int) -> list[float]:
        """Takes steps, and returns the CPU seconds of each."""
        with closing(self.one_by_one()) as taken:
            return list(islice(taken, steps))

    def _save(self) -> None:
        self.at_checkpoints[str(self.step)] = self.cpu_seconds
        write_json(self.output / SECONDS, self.at_checkpoints)  # first, so that every checkpoint has its seconds
        super()._save()

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        self.at_checkpoints = json.loads((self.output / SECONDS).read_text(encoding="utf-8"))
        self.cpu_seconds = self.at_checkpoints[str(checkpoint.step)]


def kept_steps(folder: Path, seconds: float, make_trainer: Callable[[Path], TimedTrainer]) -> int:
    """Returns how many steps of a training fit into the CPU seconds, by its pace when this was asked first.

    Args:
        folder: keeps the number, so that a run is resumed with the same.
        seconds: for all steps.
        make_trainer: makes the trainer of a short run in the folder that it is given.
    """
    pace = folder / PACE
    if not pace.is_file():
        with tempfile.TemporaryDirectory() as aside:
            write_json(pace, {"steps": steps_within(seconds, make_trainer(Path(aside)).durations(PACED))})
    return json.loads(pace.read_text(encoding="utf-8"))["steps"]


def ddpm_trainer(config: TrainDDPM, trainer: type[TimedTrainer] = TimedTrainer) -> TimedTrainer:
    """Opens the data, and makes the network and a trainer that trains as `train-ddpm` does, with seconds counted."""
    accelerator = make_accelerator(config.training, config.output)
    data = load_images(config.data, config.training.seed)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    unet = make_unet(config, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    task = DiffusionTask(unet, data, config.diffusion, config.data.num_workers)
    return trainer(task, config.training, config.output, asdict(config), accelerator)
