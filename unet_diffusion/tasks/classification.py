"""Learning the classes of whole images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.data.dataset import ImageDataset, to_batch
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.evaluation.classifier import CLASSIFIER_FOLDER, ImageClassifier
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.training.accelerator import sum_over_processes
from unet_diffusion.training.metrics_log import series
from unet_diffusion.training.model_cards import Card, parameters
from unet_diffusion.training.task import Task

PREVIEW_IMAGES = 36
HARDEST = "{} images whose own class gets the lowest probability"
USE = """
To compare images that a DDPM run generates with real ones:
`unet-diffusion evaluate-generation --run RUN --data DATA --features {name}`. In Python:

```python
from unet_diffusion.evaluation.classifier import ImageClassifier

classifier = ImageClassifier.from_pretrained("{name}/classifier").eval()  # in this folder
logits = classifier(images)  # images (B, {channels}, H, W) in [-1, 1]; logits (B, {classes})
features = classifier.features(images)  # (B, {features})
```
"""


class ClassificationTask(Task):
    """Classification of whole images, for `unet_diffusion.training.trainer.Trainer`.

    Args:
        network: the classifier.
        data: images to learn from and perhaps held-out ones, both with labels. Without held-out images, the images to
            learn from are shown and counted in their place, and the last weights are exported; these images must then
            not be a stream.
        num_workers: processes that load images ahead.
    """

    curves = {"loss": ("loss", "validation_loss"), "accuracy": ("accuracy",), "learning rate": ("learning_rate",)}

    def __init__(self, network: ImageClassifier, data: ImageSets, num_workers: int = 0) -> None:
        self.network, self.num_workers = network, num_workers
        self.train, self.pixel_range = data.train, data.train.pixel_range
        self.held_out = data.validation is not None
        self.best_by = "accuracy" if self.held_out else None
        shown = data.train if data.validation is None else data.validation
        assert isinstance(shown, ImageDataset)
        self.shown = shown

    def loss(self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """Returns the cross-entropy for stored images `image` (B, C, H, W) and their classes `label` (B,)."""
        return classification_loss(network(self.pixel_range.to_model(batch["image"])), batch["label"])

    def validate(self, network: ImageClassifier, accelerator: Accelerator) -> dict[str, float]:
        """Returns the share of held-out images whose own class gets the highest score, and the loss.

        Images without a label are left out. Without held-out images nothing is returned.
        """
        if not self.held_out:
            return {}
        sums = torch.zeros(3, dtype=torch.float64)
        mine = range(accelerator.process_index, len(self.shown), accelerator.num_processes)
        for logits, labels in self._predictions(network, mine):
            right = (logits.argmax(dim=1) == labels).sum()
            sums += torch.stack([right, classification_loss(logits, labels) * len(labels), (labels != NO_LABEL).sum()])
        right, loss, count = sum_over_processes(accelerator, sums).tolist()
        return {"accuracy": right / count, "validation_loss": loss / count}

    def _predictions(self, network: ImageClassifier, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields scores (B, K) and labels (B,) of the images that are shown, on the CPU."""
        for start in range(0, len(indices), self.batch_size):
            batch = to_batch([self.shown[index] for index in indices[start : start + self.batch_size]])
            yield network(self.pixel_range.to_model(batch["image"]).to(network.device)).cpu(), batch["label"]

    def preview(self, network: ImageClassifier, path: Path) -> None:
        """Writes the images (held-out ones if any) whose own class gets the lowest probability, lowest first."""
        losses = [
            F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
            for logits, labels in self._predictions(network, range(len(self.shown)))
        ]
        hardest = torch.cat(losses).argsort(descending=True, stable=True)[:PREVIEW_IMAGES].tolist()
        shown = self.pixel_range.to_model(torch.stack([self.shown[index]["image"] for index in hardest]))
        save_image(grid(array_images((shown / 2 + 0.5).permute(0, 2, 3, 1).numpy())), path)

    def save(self, network: ImageClassifier, folder: Path) -> None:
        """Writes the classifier and `hardest.png`."""
        network.save_pretrained(folder / CLASSIFIER_FOLDER)
        self.preview(network, folder / "hardest.png")

    def card(self, network: ImageClassifier) -> Card:
        """Returns the card of a classifier."""
        channels, classes, features = network.config.in_channels, network.config.num_classes, network.config.widths[-1]
        summary = (
            f"A classifier with {parameters(network)} parameters that gives images with {channels} channel(s) one of "
            f"{classes} classes, trained with {{version}}. Its {features} features say how near generated images are "
            "to real ones."
        )
        use = USE.format(name="{name}", channels=channels, classes=classes, features=features)
        if not self.held_out:
            summary += " These are the last weights; nothing was held out."
        caption = HARDEST.format("Held-out" if self.held_out else "Training")
        return Card("image-classification", summary, {"hardest.png": caption}, use)

    def export(
        self, network: ImageClassifier, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]
    ) -> None:
        """Writes the accuracy of the exported weights, if it was measured, into their config, then exports."""
        if self.held_out:
            network.register_to_config(accuracy=max(series(rows, "accuracy")[1]))
        super().export(network, folder, rows, config)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of scores (B, K) and classes int64 (B,), as a mean over all images.

    Images without a class (`NO_LABEL`) add 0, so the mean does not depend on how they are spread over micro-batches.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum") / len(labels)
