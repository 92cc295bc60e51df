"""The training loop with the CPU seconds of its steps, for experiments that compare costs of training."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import make_unet
from unet_diffusion.data.sets import load_images
from unet_diffusion.files import write_json
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.checkpoints import Checkpoint
from unet_diffusion.training.trainer import Trainer

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

    def durations(self, steps: int) -> list[float]:
        """Takes steps, and returns the CPU seconds of each."""
        self._start()
        passed = [0.0]
        with closing(self.task.batches(self.context, 0)) as batches:
            for _ in range(steps):
                self._train_step(batches)
                passed.append(self.cpu_seconds)
        return [after - before for before, after in pairwise(passed)]

    def _save(self) -> None:
        self.at_checkpoints[str(self.step)] = self.cpu_seconds
        write_json(self.output / SECONDS, self.at_checkpoints)  # first, so that every checkpoint has its seconds
        super()._save()

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        self.at_checkpoints = json.loads((self.output / SECONDS).read_text(encoding="utf-8"))
        self.cpu_seconds = self.at_checkpoints[str(checkpoint.step)]


def train_ddpm_timed(config: TrainDDPM, trainer: type[TimedTrainer] = TimedTrainer) -> None:
    """Trains as `train-ddpm` does, with the seconds counted."""
    accelerator = make_accelerator(config.training, config.output)
    data = load_images(config.data, config.training.seed)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    unet = make_unet(config, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    task = DiffusionTask(unet, data, config.diffusion, config.data.num_workers)
    trainer(task, config.training, config.output, asdict(config), accelerator).run()
