"""The base class of tasks, which the training loop trains."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.data.record import DataRecord
from unet_diffusion.files import merged_into
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import Batches, TrainingImages, images_of_step, training_batches
from unet_diffusion.training.config import OptimizerName
from unet_diffusion.training.metrics_log import save_curves
from unet_diffusion.training.model_cards import Card


class Task(ABC):
    """A network that learns, its images and its loss, and how it is validated, shown and saved.

    Attributes:
        network: the network that learns.
        unchanged: a network that does not learn and that checkpoints do not keep, such as a frozen trunk; a run is
            resumed only with the same one.
        train: the images to learn from.
        num_workers: processes that load images ahead.
        batch_size: images at once in validations and previews; the trainer sets that of the run, so that these do not
            need more memory than a step.
        optimizer: the optimizer that "auto" stands for, which suits the task.
        best_by: the number from `validate` whose highest value chooses the exported weights; None exports the last
            weights.
        patience: validations in a row without a higher `best_by` after which training ends; None trains to the last
            step.
        curves: the quantities in each panel of `curves.png`, by its title.
        state: float tensors that the task itself learns, such as running means; checkpoints keep them.
    """

    network: ModelMixin
    unchanged: nn.Module | None = None
    train: TrainingImages
    num_workers: int = 0
    batch_size: int = 64
    optimizer: OptimizerName = "adamw"
    best_by: str | None = None
    patience: int | None = None
    curves: Mapping[str, Sequence[str]]
    state: Mapping[str, Tensor] = {}

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Returns the parameters that learn, in groups, each with its share of the learning rate."""
        return [([parameter for parameter in self.network.parameters() if parameter.requires_grad], 1.0)]

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields the micro-batches of this process endlessly, on its device, starting at an optimizer step."""
        return training_batches(self.train, context, start_step, self.num_workers)

    @abstractmethod
    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """Returns the scalar to minimise, or a dict with this scalar as "loss" and further values to log by name.

        Everything random about sample i comes from `generators[i]`.
        """

    def finish_step(self, lost: Tensor, accelerator: Accelerator) -> None:  # noqa: B027  (most tasks have no state)
        """Updates `state` after a step, in the same way in every process, unless `lost`, bool () on the device."""

    def describe(self, context: RunContext, step: int, generators: list[torch.Generator]) -> str:
        """Describes a step of this process for a message: its images, and what its generators draw."""
        return images_of_step(self.train, context, step)

    @abstractmethod
    def validate(self, network: ModelMixin, accelerator: Accelerator) -> dict[str, float]:
        """Returns quantities measured on the held-out images, by name, averaged over processes."""

    @abstractmethod
    def preview(self, network: ModelMixin, path: Path) -> None:
        """Writes a PNG that shows what the network can do."""

    @abstractmethod
    def save(self, network: ModelMixin, folder: Path) -> None:
        """Writes the files that users load, and images that show what the network can do."""

    @abstractmethod
    def card(self, network: ModelMixin) -> Card:
        """Returns the parts of the model card that describe the network."""

    def export(self, network: ModelMixin, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Writes the trained network, its curves and its model card into the folder of the run.

        The curves and the card show `rows`, the lines of `metrics.jsonl`. The card also shows the resolved `config` and
        the summary of the data from `data.json`.
        """
        record = DataRecord.read(folder) or DataRecord()
        with merged_into(folder) as aside:
            self.save(network, aside)
            save_curves(rows, aside / "curves.png", self.curves)
            card = self.card(network).text(folder.name, rows, config, self.best_by, record.summary)
            (aside / "README.md").write_text(card, encoding="utf-8")
