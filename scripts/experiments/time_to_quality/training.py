"""The training example of diffusers, and the time that a step of each training takes.

Time is CPU seconds of this process (`time.process_time`, with one thread). The steps of all trainings are timed in
turns, so that other work on the machine slows all of them alike. Then the trainings themselves may run beside anything.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import nn

from scripts.benchmarks.timing import alternate, compute_clock
from scripts.experiments.timed_trainer import ddpm_trainer
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.files import written_aside
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import autocast
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.training.batches import GlobalBatches
from unet_diffusion.training.checkpoints import (
    Checkpoint,
    load_latest,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from unet_diffusion.training.run_folder import claim, only_run_in

CHECKPOINTS = 10  # of a run
WEIGHTS = "weights.safetensors"  # of a finished run of the example
WARM_UP, ROUNDS = 10, 30  # steps of each training, not timed and timed


@dataclass(frozen=True)
class PublishedRecipe:
    """The unconditional training example of diffusers.

    Fixed as published: noise prediction on the linear schedule of 1000 timesteps, AdamW with betas 0.95 and 0.999,
    weight decay 1e-6 and eps 1e-8, cosine decay of the learning rate, gradients clipped to norm 1, a moving average of
    the weights with decay 1 - (1 + step)^(-3/4), at most 0.9999. Optimizer and average run in their faster versions
    (`fused`, `foreach`), which compute the same.

    Attributes:
        steps: total optimizer steps.
        learning_rate: highest learning rate; by default as published.
        batch_size: images per step; by default as published.
        warmup_steps: steps over which the learning rate rises from 0; by default as published.
        seed: determines everything random.
        mixed_precision: "no" for float32, or "bf16", in which the network computes; by default as published.
    """

    steps: int
    learning_rate: float = 1e-4
    batch_size: int = 16
    warmup_steps: int = 500
    seed: int = 0
    mixed_precision: Precision = "no"


class PeerTraining:
    """The training loop of the published recipe in its plainest form.

    Args:
        network: the network that learns; created with the global generator seeded.
        recipe: values of the recipe.
        data: training images.
        folder: folder of the run.
    """

    def __init__(self, network: UNet2DModel, recipe: PublishedRecipe, data: ImageDataset, folder: Path) -> None:
        self.network, self.recipe, self.data, self.folder = network.train(), recipe, data, folder
        self.scheduler = DDPMScheduler()
        self.optimizer = torch.optim.AdamW(
            network.parameters(), recipe.learning_rate, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6, fused=True
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, recipe.warmup_steps, recipe.steps)
        self.ema = EMAModel(
            network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4, foreach=True
        )
        self.step = 0

    def run(self) -> None:
        """Trains to the last step, from the newest checkpoint on, and writes the averaged weights."""
        with only_run_in(self.folder):
            claim(self.folder, asdict(self.recipe))
            self._restore()
            every = max(1, self.recipe.steps // CHECKPOINTS)
            steps = self.steps()
            while self.step < self.recipe.steps:
                next(steps)
                if self.step % every == 0 or self.step == self.recipe.steps:
                    self._save()
            self.ema.copy_to(self.network.parameters())
            with written_aside(self.folder / WEIGHTS) as aside:
                save_file({name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}, aside)

    def steps(self) -> Iterator[None]:
        """Takes a step each time."""
        images = torch.stack([self.data[index]["image"] for index in range(len(self.data))])
        for batch in GlobalBatches(len(self.data), self.recipe.batch_size, seed=self.recipe.seed, start_step=self.step):
            self._train_step(self.data.pixel_range.to_model(images[[index for _, index in batch]]))
            self.step += 1
            yield

    def _train_step(self, clean: torch.Tensor) -> None:
        generator = keyed_generator(self.recipe.seed, "step", self.step)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, clean.shape[:1], generator=generator)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with autocast(noisy.device, self.recipe.mixed_precision):
            predicted = self.network(noisy, timesteps, return_dict=False)[0]
        loss = nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.network.named_parameters()}

    def _save(self) -> None:
        tensors = {
            "model": self.network.state_dict(),
            "ema": dict(zip(self._names().values(), self.ema.shadow_params)),
            "optimizer": optimizer_tensors(self.optimizer, self._names()),
        }
        state = {"ema_steps": self.ema.optimization_step}
        save_checkpoint(self.folder / "checkpoints", Checkpoint(self.step, tensors, state), keep=1)

    def _restore(self) -> None:
        checkpoint = load_latest(self.folder / "checkpoints")
        if checkpoint is None:
            return
        self.step = checkpoint.step
        self.network.load_state_dict(checkpoint.tensors["model"])
        for name, average in zip(self._names().values(), self.ema.shadow_params):
            average.copy_(checkpoint.tensors["ema"][name])
        self.ema.optimization_step = checkpoint.state["ema_steps"]
        restore_optimizer(self.optimizer, self._names(), checkpoint.tensors["optimizer"])
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, self.recipe.warmup_steps, self.recipe.steps, last_epoch=self.step - 1
        )


def seconds_a_step(
    peers: Mapping[str, Callable[[Path], PeerTraining]], ours: TrainDDPM, name: str, rounds: int = ROUNDS
) -> dict[str, float]:
    """The median CPU seconds of a step of each training, timed in turns.

    Args:
        peers: makes the training of each recipe of the example in a folder, by its name.
        ours: the options of a training of ours.
        name: that of ours.
        rounds: how many steps of each are timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = ddpm_trainer(replace(ours, output=Path(folder) / "ours"))
        works: dict[str, Callable[[], Any]] = {
            peer: make(Path(folder) / "peer").steps().__next__ for peer, make in peers.items()
        }
        works[name] = trainer.one_by_one().__next__
        seconds = alternate(works, rounds, WARM_UP, compute_clock)
    return {each: statistics.median(values) for each, values in seconds.items()}
