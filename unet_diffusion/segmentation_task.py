"""Learning to segment: the second task of the training loop, on the same network."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from unet_diffusion.atomic import merged_into
from unet_diffusion.augmentation import AugmentationConfig, augment
from unet_diffusion.figures import array_pictures, grid, save_curves, save_picture
from unet_diffusion.loading import training_batches
from unet_diffusion.metrics import SegmentationMetrics
from unet_diffusion.model_card import segmentation_card
from unet_diffusion.palette import overlay
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.segmentation import class_weights_from_counts, cut_to, segmentation_loss
from unet_diffusion.training_config import TrainingConfig
from unet_diffusion.unet import UNet

CURVES = {"loss": ("loss",), "mean IoU": ("mean_iou",), "learning rate": ("learning_rate",)}
PREVIEW_COLUMNS = 3  # picture, mask, prediction


@dataclass
class SegmentationConfig:
    """What a segmentation step minimises, and what is shown."""

    loss: Literal["cross_entropy", "dice", "both"] = "cross_entropy"
    """Pixel-wise softmax cross-entropy (2015), soft Dice, or their sum."""
    balance_classes: bool = False
    """Weigh classes by the inverse of their share of the training pixels, in the cross-entropy."""
    preview_pictures: int = 12
    """Validation pictures in a preview."""

    def __post_init__(self) -> None:
        """Checks every value."""
        if self.loss == "dice" and self.balance_classes:
            raise ValueError("loss is 'dice', which takes no class weights; set loss='both', or leave balance_classes.")
        if self.preview_pictures < 1:
            raise ValueError(f"preview_pictures is {self.preview_pictures}, but must be at least 1.")


class SegmentationTask:
    """Pixel-wise classification with masks, for `unet_diffusion.training.Trainer`.

    Args:
        unet: a network with a segmentation head, which becomes the active one; a noise head is frozen.
        data: pictures with masks, such as `unet_diffusion.masked_data.MaskedSets`: `train[epoch, index]` and
            `validation[index]` give `{"image": (C, H, W) stored values, "mask": int64 (H, W)}`, with `"weights"`
            float32 (1, H, W) where pixels have weights; `pixel_range`, `class_names` and `palette` go with them.
        config: the loss.
        augmentation: how training pictures are varied; None: not at all.
        scheduler: of a DDPM run that the network comes from; saved with the pipeline, which then still generates.
        num_workers: processes that load pictures ahead.

    Raises:
        ValueError: border weights with a loss that takes none.
    """

    def __init__(
        self,
        unet: UNet,
        data: Any,
        config: SegmentationConfig,
        augmentation: AugmentationConfig | None = None,
        scheduler: Any = None,
        num_workers: int = 0,
    ) -> None:
        self.unet = unet.to_segmentation()
        if unet.noise_head is not None:
            unet.noise_head.requires_grad_(False)
        self.train, self.validation, self.pixel_range = data.train, data.validation, data.pixel_range
        self.class_names, self.palette = data.class_names, data.palette
        self.config, self.augmentation = config, augmentation
        self.scheduler, self.num_workers = scheduler, num_workers
        self.class_weights = class_weights_from_counts(data.train.class_counts()) if config.balance_classes else None

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of stored pictures `image` (B, C, H, W) and masks `mask` (B, H, W), on the device."""
        return training_batches(self.train, accelerator, config, start_step, self.num_workers)

    def loss(self, unet: torch.nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """The segmentation loss of a batch that is varied as each sample's generator says."""
        images, masks, weights = self.pixel_range.to_model(batch["image"]), batch["mask"], batch.get("weights")
        if self.augmentation is not None:
            images, masks, weights = augment(images, masks, self.augmentation, generators, weights)
        (logits,) = unet(images, head="segmentation", return_dict=False)
        class_weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        return segmentation_loss(logits, masks, self.config.loss, class_weights, weights)

    def validate(self, unet: UNet, accelerator: Accelerator) -> dict[str, float]:
        """The scores of the held-out pictures, pooled over all their pixels."""
        metrics = SegmentationMetrics(self.unet.config.num_classes)
        for index in range(accelerator.process_index, len(self.validation), accelerator.num_processes):
            item = self.validation[index]
            predicted = self.predict(unet, item["image"])
            metrics.update(predicted[None], cut_to(item["mask"], predicted)[None])
        metrics.sum_over_processes(lambda x: accelerator.reduce(x.to(accelerator.device), "sum").cpu())
        scores = metrics.compute()
        return {name: scores[f"pooled/{name}"] for name in ("mean_iou", "mean_dice", "accuracy")}

    def predict(self, unet: UNet, image: Tensor) -> Tensor:
        """The mask, int64 (H, W) on the CPU, of one stored picture (C, H, W)."""
        images = self.pixel_range.to_model(image[None].to(unet.device))
        (logits,) = unet(images, head="segmentation", return_dict=False)
        return logits[0].argmax(dim=0).cpu()

    def preview(self, unet: UNet, path: Path) -> None:
        """Held-out pictures, each beside its mask and the prediction."""
        shown = []
        for index in range(min(self.config.preview_pictures, len(self.validation))):
            item = self.validation[index]
            predicted = self.predict(unet, item["image"])
            image = self.pixel_range.to_model(cut_to(item["image"], predicted))
            picture = array_pictures((image / 2 + 0.5).permute(1, 2, 0)[None].numpy())[0]
            mask = cut_to(item["mask"], predicted)
            shown += [picture, overlay(picture, mask.numpy(), opacity=0.8), overlay(picture, predicted.numpy(), 0.8)]
        rows = max(1, round((len(shown) / PREVIEW_COLUMNS) ** 0.5))
        save_picture(grid(shown, columns=PREVIEW_COLUMNS * -(-len(shown) // PREVIEW_COLUMNS // rows)), path)

    def pipeline(self, unet: UNet) -> SegmentationPipeline:
        """The pipeline that a run saves."""
        names, palette = (None if x is None else list(x) for x in (self.class_names, self.palette))
        return SegmentationPipeline(unet, self.scheduler, self.pixel_range.to_dict(), names, palette)

    def export(self, unet: UNet, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The run's folder as a pipeline, with curves, masks of held-out pictures and a model card."""
        with merged_into(folder) as aside:
            self.pipeline(unet).save_pretrained(aside)
            save_curves(rows, aside / "curves.png", CURVES)
            self.preview(unet, aside / "masks.png")
            (aside / "README.md").write_text(segmentation_card(folder.name, unet, rows, config), encoding="utf-8")
