"""A small classifier of whole images, trained on a data set's own classes.

Its features say how near generated images are to real ones (`feature_networks`) where networks that ImageNet has
taught say little, such as for small grey images; and nothing is downloaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.checks import is_count, is_number
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import ImageDataset, to_batch
from unet_diffusion.data.sets import ImageSets, load_images
from unet_diffusion.files import check_output, merged_into
from unet_diffusion.images.figures import array_images, grid, save_curves, save_image
from unet_diffusion.images.labels import NO_LABEL
from unet_diffusion.network.blocks import BlockStyle, Downsample, PlainBlock
from unet_diffusion.network.safe_weights import SafeWeights
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.cards import classification_card
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.batches import Batches, images_of_step, training_batches
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import series
from unet_diffusion.training.trainer import Trainer

CLASSIFIER_FOLDER = "classifier"  # of the weights, in that of the run, whose own `config.json` is the run's
STYLE = BlockStyle("plain", norm="group", activation="silu", padding="same", head_channels=1, embed_dim=None)
VALIDATION_BATCH = 64  # images at once
PREVIEW_IMAGES = 36
RECIPE: dict[str, Any] = {"steps": 1000, "learning_rate": 1e-2, "warmup_steps": 100, "validate_every": 250}  # defaults
CURVES = {"loss": ("loss", "validation_loss"), "accuracy": ("accuracy",), "learning rate": ("learning_rate",)}


class ImageClassifier(SafeWeights, ModelMixin, ConfigMixin):
    """Class scores of images: blocks of two convolutions, one at each resolution, and a linear layer on their means.

    Args:
        in_channels: of the images.
        num_classes: at least 2.
        widths: channels of each resolution, the image's own first.
        dropout: share of the features dropped in training before the last layer.
        class_names: in the order of the scores.
        data: name of the images that it learned from.
        accuracy: share of held-out images whose class it gave the highest score; None while it learns.

    Raises:
        ValueError: a value that no classifier can be built of.
    """

    _no_split_modules = ["PlainBlock"]
    _repeated_blocks = ["PlainBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (32, 64, 128),
        dropout: float = 0.1,
        class_names: tuple[str, ...] | None = None,
        data: str | None = None,
        accuracy: float | None = None,
    ) -> None:
        super().__init__()
        if not is_count(in_channels):
            raise ValueError(f"in_channels is {in_channels!r}, but must be an integer of at least 1.")
        if not is_count(num_classes, 2):
            raise ValueError(f"num_classes is {num_classes!r}, but must be at least 2; give images of more classes.")
        if not isinstance(widths, (tuple, list)) or not widths or not all(is_count(width, 2) for width in widths):
            raise ValueError(f"widths is {widths!r}, but must be one or more of at least 2, such as (32, 64, 128).")
        if not is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}, but must be a share from 0 up to, not including, 1.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names are {len(class_names)}, but num_classes is {num_classes}; name each class.")
        if accuracy is not None and (not is_number(accuracy) or not 0 <= accuracy <= 1):
            raise ValueError(f"accuracy is {accuracy!r}, but must be a share from 0 to 1, or None.")
        self.blocks = nn.ModuleList(PlainBlock(i, o, 0.0, STYLE) for i, o in zip([in_channels, *widths], widths))
        self.downsample = Downsample("max_pool", in_channels, STYLE)
        self.drop = nn.Dropout(dropout)  # by another name than the config's value, which ModelMixin would give instead
        self.head = nn.Linear(widths[-1], num_classes)
        nn.init.zeros_(self.head.weight)  # untrained, it gives all classes the same score
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], of any size, to what the last layer sees of them, (B, widths[-1])."""
        first, *further = self.blocks
        x = first(images, None)
        for block in further:
            x = block(self.downsample(x), None)  # (B, widths[i], H / 2**i, W / 2**i), rounded up
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to scores before softmax, (B, K)."""
        return self.head(self.drop(self.features(images)))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, a mean over all images, however they are spread over micro-batches; those of no class give 0.

    logits: (B, K); labels: int64 (B,), `NO_LABEL` for none; returns a scalar.
    """
    return F.cross_entropy(logits.float(), labels, ignore_index=NO_LABEL, reduction="sum") / len(labels)


class ClassificationTask:
    """Classes of whole images, for `unet_diffusion.training.trainer.Trainer`.

    Args:
        network: the classifier.
        data: images to learn from and held-out ones, both with labels.
        num_workers: processes that load images ahead.
    """

    best_by: str | None = "accuracy"
    patience: int | None = None

    def __init__(self, network: ImageClassifier, data: ImageSets, num_workers: int = 0) -> None:
        assert data.validation is not None
        self.network, self.num_workers = network, num_workers
        self.train, self.validation, self.pixel_range = data.train, data.validation, data.train.pixel_range

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All of them, alike."""
        return [(list(self.network.parameters()), 1.0)]

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of stored images `image` (B, C, H, W) and classes `label` (B,), on the device."""
        return training_batches(self.train, accelerator, config, start_step, self.num_workers)

    def loss(self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """The cross-entropy of a batch."""
        return classification_loss(network(self.pixel_range.to_model(batch["image"])), batch["label"])

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """The images of a step of this process."""
        return images_of_step(self.train, accelerator, config, step)

    def validate(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """The share of held-out images that get their own class, and the loss; those without a label are left out."""
        sums = torch.zeros(3, dtype=torch.float64)
        mine = range(accelerator.process_index, len(self.validation), accelerator.num_processes)
        for logits, labels in self._judged(network, mine):
            right = (logits.argmax(dim=1) == labels).sum()
            sums += torch.stack([right, classification_loss(logits, labels) * len(labels), (labels != NO_LABEL).sum()])
        right, loss, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return {"accuracy": right / count, "validation_loss": loss / count}

    def _judged(self, network: Any, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores (B, K) and labels (B,) of held-out images, on the CPU."""
        for start in range(0, len(indices), VALIDATION_BATCH):
            batch = to_batch([self.validation[index] for index in indices[start : start + VALIDATION_BATCH]])
            yield network(self.pixel_range.to_model(batch["image"]).to(network.device)).cpu(), batch["label"]

    def preview(self, network: Any, path: Path) -> None:
        """The held-out images whose own class gets the lowest probability, in the order of their probabilities."""
        losses = [
            F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
            for logits, labels in self._judged(network, range(len(self.validation)))
        ]
        hardest = torch.cat(losses).argsort(descending=True, stable=True)[:PREVIEW_IMAGES].tolist()
        shown = self.pixel_range.to_model(torch.stack([self.validation[index]["image"] for index in hardest]))
        save_image(grid(array_images((shown / 2 + 0.5).permute(0, 2, 3, 1).numpy())), path)

    def export(self, network: Any, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The classifier, which says its accuracy, with curves, the hardest images and a model card."""
        network.register_to_config(accuracy=max(series(rows, "accuracy")[1]))  # that of the weights that are exported
        with merged_into(folder) as aside:
            network.save_pretrained(aside / CLASSIFIER_FOLDER)
            save_curves(rows, aside / "curves.png", CURVES)
            self.preview(network, aside / "hardest.png")
            (aside / "README.md").write_text(classification_card(folder.name, network, rows, config), encoding="utf-8")


@dataclass
class TrainClassifier:
    """Train a small classifier of whole images. The same command again goes on with a run that was stopped."""

    output: Path = Path("runs/classifier")
    """Folder of the run; `evaluate-generation --features` takes it."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels at each resolution, the images' own first; the last is the number of features."""
    dropout: float = 0.1
    """Share of the features dropped in training before the last layer."""
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(**RECIPE))


def train_classifier(config: TrainClassifier) -> Path:
    """Trains, or goes on training, and returns the run's folder.

    The folder holds the weights that did best on held-out images and their config in `classifier/`, a model card,
    `hardest.png`, `curves.png`, `metrics.jsonl`, `config.json`, previews and checkpoints. Channels and classes follow
    from the data.

    Raises:
        ValueError: an option or images that cannot be used, such as those without labels, before training starts.
        RuntimeError: another process is training in the folder.
    """
    accelerator = make_accelerator(config.training, config.output)
    check_output(config.output)
    data = load_images(config.data, config.training.seed, accelerator.process_index, accelerator.num_processes)
    names = checked_class_names(data)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    network = ImageClassifier(
        data.train.channels, len(names), config.widths, config.dropout, class_names=names, data=data.train.name
    )
    task = ClassificationTask(network, data, config.data.num_workers)
    return Trainer(task, config.training, config.output, asdict(config), accelerator).run()


def checked_class_names(data: ImageSets) -> tuple[str, ...]:
    """The names of the classes.

    Raises:
        ValueError: no labels, no held-out images, or none of them with a label.
    """
    names = data.train.class_names
    if names is None:
        raise ValueError(
            f"{data.train.name} has no class labels, which a classifier learns; name their column by label_column (of "
            "type ClassLabel in a stream), or sort the images into one folder for each class."
        )
    if data.validation is None:
        raise ValueError(
            "there are no held-out images, by whose accuracy the weights are chosen; set validation_fraction above 0 "
            "(nothing of a stream is held out), or name a validation set."
        )
    for part in (data.train, data.validation):
        if isinstance(part, ImageDataset) and (part.labels == NO_LABEL).all():
            raise ValueError(
                f"none of the {len(part)} images used of {part.name} has a class label, but some must; name the "
                "column of the labels by label_column."
            )
    return names
