"""The options of a training run."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from unet_diffusion.checks import is_count, is_integer, is_number, require, require_choice, require_each, set_plain
from unet_diffusion.network.config import Precision
from unet_diffusion.unused_options import check_used

Schedule = Literal["cosine", "constant"]
OptimizerName = Literal["adamw", "muon"]
EVERY = ("log_every", "validate_every", "preview_every", "checkpoint_every")
FREE_TO_CHANGE = {  # when a run is resumed; images_per_step, which follows from three of these, must stay the same
    *EVERY,
    *("steps", "batch_size", "accumulate", "processes", "threads"),
    *("output", "max_skipped_steps", "keep_checkpoints", "trackers", "num_workers", "cache_dir"),
    *("patience", "allow_changed_data"),
}


@dataclass
class TrainingConfig:
    """The options of the training loop. Steps are optimizer steps, whatever the number of processes."""

    steps: int = 20_000
    """Optimizer steps of the whole run."""
    batch_size: int = 64
    """Images per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    optimizer: OptimizerName | Literal["auto"] = "auto"
    """"adamw", or "muon" (Jordan et al. 2024): Muon for the kernels inside the U, AdamW for the rest. "auto" is "muon"
    for networks that learn only to generate or enlarge images, unless --recipe is ddpm, and "adamw" for all others."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; that of Muon is 20 times as high."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from 0."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: "cosine" (falls to 0 at the last step) or "constant"."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Norm to which larger gradients are scaled down."""
    max_skipped_steps: int = 20
    """Number of skipped steps in a row that ends the run. A step is skipped if its loss or gradient is not finite, and
    then changes no weight."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights. The pipeline is saved with this average."""
    mixed_precision: Precision = "auto"
    """"no" (float32), "bf16" or "fp16"; noise and losses stay in float32. "auto" is the precision set for `accelerate
    launch`, or else bf16 where the GPU or the processor has it (AVX512-BF16, AMX). A resumed run keeps its
    precision."""
    compile: bool = False
    """Compile the network's blocks (faster on CUDA, not on a CPU)."""
    seed: int = 0
    """Seed of everything random."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 500
    """Steps between validations."""
    preview_every: int = 1000
    """Steps between preview images."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers that also get the metrics, by their names in Accelerate, such as tensorboard, wandb, trackio. Their
    packages must be installed."""
    allow_changed_data: bool = False
    """Resume although the data have changed since the run was started. Images that the run held out are still held
    out."""

    def __post_init__(self) -> None:
        set_plain(self)
        counts = ("steps", "batch_size", "accumulate", "max_skipped_steps", "keep_checkpoints", *EVERY)
        require_each(self, counts, is_count, "must be an integer of at least 1")
        require(is_count(self.warmup_steps, 0), "warmup_steps", self.warmup_steps, "must be an integer of at least 0")
        require(is_integer(self.seed), "seed", self.seed, "must be an integer")
        not_negative, positive = "must be a number of at least 0", "must be a number above 0"
        require_each(self, ("weight_decay",), lambda value: is_number(value) and value >= 0, not_negative)
        require_each(self, ("learning_rate",), lambda value: is_number(value) and value > 0, positive)
        norm = self.max_grad_norm  # if infinite, no gradient is scaled down
        require(norm == math.inf or (is_number(norm) and norm > 0), "max_grad_norm", norm, positive)
        decays = is_number(self.ema_decay) and 0 <= self.ema_decay < 1
        require(decays, "ema_decay", self.ema_decay, "must be at least 0 and below 1")
        named = not isinstance(self.trackers, str)
        require(named, "trackers", self.trackers, "must be a tuple of names; write ('NAME',) for one")
        require_choice("schedule", self.schedule, get_args(Schedule))
        require_choice("optimizer", self.optimizer, ("auto", *get_args(OptimizerName)))
        require_choice("mixed_precision", self.mixed_precision, get_args(Precision))
        check_used(self)
