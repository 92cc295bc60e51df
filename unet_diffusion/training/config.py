"""The options of a training run."""

from dataclasses import dataclass
from typing import Literal

EVERY = ("log_every", "validate_every", "preview_every", "checkpoint_every")
FREE_TO_CHANGE = {  # when a run goes on; a step keeps its number of images, however they are spread
    *EVERY,
    *("steps", "batch_size", "accumulate", "processes"),
    *("output", "max_skipped_steps", "keep_checkpoints", "trackers", "num_workers", "cache_dir"),
}


@dataclass
class TrainingConfig:
    """How a run goes; counts are optimizer steps, on however many processes."""

    steps: int = 20_000
    """Optimizer steps in all."""
    batch_size: int = 64
    """Images per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: "cosine" (to 0 at the last step) or "constant"."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: int = 20
    """A step whose loss or gradient is not finite changes nothing and is skipped; so many in a row end the run."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is saved for use."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """"no", "bf16" or "fp16"; noise and losses stay in float32."""
    compile: bool = False
    """Compile the network's blocks (pays on CUDA, not on a CPU)."""
    seed: int = 0
    """Everything random follows from it."""
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
    """Where else metrics go: names that Accelerate knows, such as tensorboard, wandb, trackio."""

    def __post_init__(self) -> None:
        """Checks every value before anything else happens."""
        for name in ("steps", "batch_size", "accumulate", "max_skipped_steps", "keep_checkpoints", *EVERY):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:  # so NaN is refused too
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be a number above 0.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must be from 0 up to, not including, 1.")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}, but must be 'cosine' or 'constant'.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}, but must be 'no', 'bf16' or 'fp16'.")
