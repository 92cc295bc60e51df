"""What the training loop asks of a task."""

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.training.batches import Batches
from unet_diffusion.training.config import TrainingConfig


class Task(Protocol):
    """Which network learns, what a batch costs, how to validate and what to show.

    Attributes:
        network: what learns.
        best_by: the number of `validate` whose highest value tells the weights to export; None: the last ones.
        patience: validations in a row without a higher one after which training ends; None: it goes to the last step.
    """

    network: ModelMixin
    best_by: str | None
    patience: int | None

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that learn, in groups, each with its share of the learning rate."""
        ...

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of this process for ever, from the first of `start_step` on."""
        ...

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """The scalar to minimise, or that one as "loss" among others by name, which are logged beside it.

        All that is random about sample i comes from `generators[i]`.
        """
        ...

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """What a step of this process was about: its images, and what else is known from all their generators."""
        ...

    def validate(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """Numbers of the held-out images, averaged over processes."""
        ...

    def preview(self, network: Any, path: Path) -> None:
        """A PNG that shows what the network can do."""
        ...

    def export(self, network: Any, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The pipeline, its model card and the curves of the run."""
        ...
