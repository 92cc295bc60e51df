"""Timed training with snapshots, by the recipe of a peer and by ours.

Time is CPU seconds of this process (`time.process_time`, with one thread), summed over the training steps: creating the
network and writing snapshots and checkpoints do not count. A stopped run resumes from its last checkpoint, with the
seconds of the steps until there.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import nn

from scripts.experiments.timed_trainer import TimedTrainer, ddpm_trainer
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

FIRST_SNAPSHOT = 5  # at 1/2**5 of the steps; each later one is at twice the steps of the one before
CHECKPOINTS = 10  # of a run


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


def snapshot_steps(steps: int) -> list[int]:
    """The steps after which the averaged weights are written: 1/32, 1/16, ..., 1 of all steps."""
    return sorted({max(1, steps >> halvings) for halvings in range(FIRST_SNAPSHOT + 1)})


def snapshot_path(folder: Path, step: int) -> Path:
    """The file of the snapshot of a step."""
    return folder / "snapshots" / f"step-{step:08d}.safetensors"


def save_snapshot(folder: Path, step: int, network: nn.Module, seconds: float) -> None:
    """Writes the weights and the seconds of training that led to them."""
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    with written_aside(snapshot_path(folder, step)) as aside:
        save_file(weights, aside, metadata={"seconds": repr(seconds)})


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
        self.step, self.seconds = 0, 0.0

    def run(self) -> None:
        """Trains to the last step, from the newest checkpoint on."""
        with only_run_in(self.folder):
            claim(self.folder, asdict(self.recipe))
            self._restore()
            images = torch.stack([self.data[index]["image"] for index in range(len(self.data))])
            every = max(1, self.recipe.steps // CHECKPOINTS)
            for rows in islice(self._order(), self.recipe.steps - self.step):
                started = time.process_time()
                self._train_step(self.data.pixel_range.to_model(images[rows]))
                self.seconds += time.process_time() - started
                self.step += 1
                if self.step in snapshot_steps(self.recipe.steps):
                    self._snapshot()
                if self.step % every == 0 or self.step == self.recipe.steps:
                    self._save()

    def _order(self) -> Iterator[list[int]]:
        batches = GlobalBatches(len(self.data), self.recipe.batch_size, seed=self.recipe.seed, start_step=self.step)
        return ([index for _, index in batch] for batch in batches)

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

    def _snapshot(self) -> None:
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        save_snapshot(self.folder, self.step, self.network, self.seconds)
        self.ema.restore(self.network.parameters())

    def _names(self) -> dict[torch.Tensor, str]:
        return {parameter: name for name, parameter in self.network.named_parameters()}

    def _save(self) -> None:
        tensors = {
            "model": self.network.state_dict(),
            "ema": dict(zip(self._names().values(), self.ema.shadow_params)),
            "optimizer": optimizer_tensors(self.optimizer, self._names()),
        }
        state = {"seconds": self.seconds, "ema_steps": self.ema.optimization_step}
        save_checkpoint(self.folder / "checkpoints", Checkpoint(self.step, tensors, state), keep=1)

    def _restore(self) -> None:
        checkpoint = load_latest(self.folder / "checkpoints")
        if checkpoint is None:
            return
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.network.load_state_dict(checkpoint.tensors["model"])
        for name, average in zip(self._names().values(), self.ema.shadow_params):
            average.copy_(checkpoint.tensors["ema"][name])
        self.ema.optimization_step = checkpoint.state["ema_steps"]
        restore_optimizer(self.optimizer, self._names(), checkpoint.tensors["optimizer"])
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, self.recipe.warmup_steps, self.recipe.steps, last_epoch=self.step - 1
        )


class SnapshotTrainer(TimedTrainer):
    """The timed trainer of `train-ddpm`, which also writes snapshots."""

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        super()._train_step(batches)
        if self.step in snapshot_steps(self.config.steps):
            with self._averaged_weights() as network:
                save_snapshot(self.output, self.step, network, self.cpu_seconds)


def train_ours(config: TrainDDPM) -> None:
    """Trains as `train-ddpm` does, with the seconds counted and snapshots written."""
    ddpm_trainer(config, SnapshotTrainer).run()
