"""Learning to segment: the second task of the training loop, on the same network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.files import merged_into
from unet_diffusion.images.figures import array_images, grid, save_curves, save_image
from unet_diffusion.images.palette import overlay
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.segmentation.losses import LOSSES, class_weights_from_counts, segmentation_loss
from unet_diffusion.segmentation.metrics import SegmentationMetrics
from unet_diffusion.tasks.cards import segmentation_card
from unet_diffusion.training.batches import Batches, images_of_step, training_batches
from unet_diffusion.training.config import TrainingConfig

CURVES = {"loss": ("loss",), "mean IoU": ("mean_iou",), "learning rate": ("learning_rate",)}
PREVIEW_COLUMNS = 3  # image, mask, prediction
HEAD = ("segmentation_head.",)
LEARN = {  # what the names of the parameters start with
    "everything": ("",),
    "decoder": ("decoder.", "norm_out.", *HEAD),
    "head": HEAD,
}


@dataclass
class SegmentationConfig:
    """What a segmentation step minimises, which part of the network learns, and when to stop."""

    loss: Literal["cross_entropy", "dice", "both"] = "cross_entropy"
    """Pixel-wise softmax cross-entropy (2015), soft Dice, or their sum."""
    balance_classes: bool = False
    """Weigh classes by the inverse of their share of the training pixels, in the cross-entropy."""
    learn: Literal["everything", "decoder", "head", "pixel_classifier"] = "everything"
    """Which part learns: "everything", the "decoder" with the segmentation head, or the "head" alone; the rest is
    frozen. Or a "pixel_classifier" on features of the frozen network of a DDPM run, for a handful of masks."""
    trunk_rate: float = 1.0
    """Learning rate of all but the segmentation head, as a share of learning_rate; below 1 it spares pretrained
    weights."""
    timestep: float | None = None
    """Timestep that the network is told while it segments; by default its own (0 for those made here)."""
    patience: int | None = None
    """Stop after so many validations in a row without a higher mean IoU; by default the run goes to its last step."""
    preview_images: int = 12
    """Validation images in a preview."""

    def __post_init__(self) -> None:
        """Checks every value."""
        if self.loss == "dice" and self.balance_classes:
            raise ValueError("loss is 'dice', which takes no class weights; set loss='both', or leave balance_classes.")
        for name, choices in (("loss", LOSSES), ("learn", (*LEARN, "pixel_classifier"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}.")
        if not 0 < self.trunk_rate <= 1:
            raise ValueError(
                f"trunk_rate is {self.trunk_rate}, but must be above 0 and at most 1; to freeze the trunk, set "
                "learn='head'."
            )
        if self.learn == "head" and self.trunk_rate != 1:
            raise ValueError(
                f"trunk_rate is {self.trunk_rate}, but with learn='head' the trunk is frozen; leave it out."
            )
        for name in ("patience", "preview_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")


class SegmentationTask:
    """Pixel-wise classification with masks, for `unet_diffusion.training.trainer.Trainer`.

    Args:
        network: a `UNet` with a segmentation head, which becomes the active one; a noise head is frozen.
        data: images with masks, such as `unet_diffusion.data.masked.sets.MaskedSets`: `train[epoch, index]` and
            `validation[index]` give `{"image": (C, H, W) stored values, "mask": int64 (H, W)}`, with `"weights"`
            float32 (1, H, W) where pixels have weights; `pixel_range`, `class_names` and `palette` go with them.
        config: the loss and what learns.
        augmentation: how training images are varied; None: not at all.
        scheduler: of a DDPM run that the network comes from; saved with the pipeline, which then still generates.
        num_workers: processes that load images ahead.

    Raises:
        ValueError: a timestep for a network that knows none.
    """

    best_by: str | None = "mean_iou"

    def __init__(
        self,
        network: Any,
        data: Any,
        config: SegmentationConfig,
        augmentation: AugmentationConfig | None = None,
        scheduler: Any = None,
        num_workers: int = 0,
    ) -> None:
        self._take(data, config, augmentation, scheduler, num_workers)
        self.network = network.to_segmentation()
        self.frozen = freeze(network, LEARN[config.learn])
        if config.timestep is not None:
            if network.time_embed is None:
                raise ValueError(
                    f"timestep is {config.timestep}, but the network knows none (time_embedding is None); leave it out."
                )
            network.register_to_config(segmentation_timestep=config.timestep)
        if network.config.get("padding") == "valid":  # so that its output covers images to their border, as in 2015
            self.train = data.train.mirrored(Tiling.of(network).margin)

    def _take(self, data: Any, config: SegmentationConfig, augmentation: Any, scheduler: Any, num_workers: int) -> None:
        """Keeps what does not depend on the part that learns."""
        self.train, self.validation, self.pixel_range = data.train, data.validation, data.pixel_range
        self.num_classes, self.class_names, self.palette = data.num_classes, data.class_names, data.palette
        self.config, self.augmentation, self.patience = config, augmentation, config.patience
        self.scheduler, self.num_workers = scheduler, num_workers
        self.class_weights = class_weights_from_counts(data.train.class_counts()) if config.balance_classes else None

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The trunk and the segmentation head, each with its share of the learning rate."""
        trunk: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                (head if name.startswith(HEAD) else trunk).append(parameter)
        return [(group, rate) for group, rate in ((trunk, self.config.trunk_rate), (head, 1.0)) if group]

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of stored images `image` (B, C, H, W) and masks `mask` (B, H, W), on the device."""
        return training_batches(self.train, accelerator, config, start_step, self.num_workers)

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """The segmentation loss of a batch that is varied as each sample's generator says."""
        for module in self.frozen:
            module.eval()  # else its dropout and its BatchNorm would go on as in training
        images, masks, weights = self.pixel_range.to_model(batch["image"]), batch["mask"], batch.get("weights")
        if self.augmentation is not None:
            images, masks, weights = augment(images, masks, self.augmentation, generators, weights)
        logits = self.logits(network, images, generators)
        class_weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        return segmentation_loss(logits, masks, self.config.loss, class_weights, weights)

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """The images of a step of this process."""
        return images_of_step(self.train, accelerator, config, step)

    def logits(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Class scores (B, K, H, W) of images (B, C, H, W) in [-1, 1]; generators as for `loss`."""
        return network(images, head="segmentation", return_dict=False)[0]

    def validate(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """The scores of the held-out images, pooled over all their pixels."""
        metrics = SegmentationMetrics(self.num_classes)
        predict = self.predictor(network)
        for index in range(accelerator.process_index, len(self.validation), accelerator.num_processes):
            item = self.validation[index]
            metrics.update(predict(item["image"])[None], item["mask"][None])
        metrics.sum_over_processes(lambda x: accelerator.reduce(x.to(accelerator.device), "sum").cpu())
        scores = metrics.compute()
        return {name: scores[f"pooled/{name}"] for name in ("mean_iou", "mean_dice", "accuracy")}

    def predictor(self, network: Any) -> Callable[[Tensor], Tensor]:
        """What gives the mask, int64 (H, W) on the CPU, of a stored image (C, H, W), as users of the run will."""
        return self.pipeline(network).predictor()

    def preview(self, network: Any, path: Path) -> None:
        """Held-out images, each beside its mask and the prediction."""
        shown = []
        predict = self.predictor(network)
        for index in range(min(self.config.preview_images, len(self.validation))):
            item = self.validation[index]
            pixels = self.pixel_range.to_model(item["image"])
            image = array_images((pixels / 2 + 0.5).permute(1, 2, 0)[None].numpy())[0]
            masks = (item["mask"], predict(item["image"]))
            shown += [image, *(overlay(image, mask.numpy(), 0.8, self.palette) for mask in masks)]
        rows = max(1, round((len(shown) / PREVIEW_COLUMNS) ** 0.5))
        save_image(grid(shown, columns=PREVIEW_COLUMNS * -(-len(shown) // PREVIEW_COLUMNS // rows)), path)

    def pipeline(self, network: Any) -> SegmentationPipeline:
        """The pipeline that a run saves."""
        names, palette = (None if x is None else list(x) for x in (self.class_names, self.palette))
        return SegmentationPipeline(network, self.scheduler, self.pixel_range.to_dict(), names, palette)

    def export(self, network: Any, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The run's folder as a pipeline, with curves, masks of held-out images and a model card."""
        pipe = self.pipeline(network)
        with merged_into(folder) as aside:
            pipe.save_pretrained(aside)
            save_curves(rows, aside / "curves.png", CURVES)
            self.preview(network, aside / "masks.png")
            (aside / "README.md").write_text(segmentation_card(folder.name, pipe, rows, config), encoding="utf-8")


def freeze(network: nn.Module, learning: tuple[str, ...]) -> list[nn.Module]:
    """Freezes the noise head, and all parameters but those whose names start as given.

    Returns:
        The modules of which nothing learns.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(learning) and not name.startswith("noise_head."))
    groups = [(module, list(module.parameters())) for module in network.modules()]
    return [module for module, own in groups if own and not any(parameter.requires_grad for parameter in own)]
