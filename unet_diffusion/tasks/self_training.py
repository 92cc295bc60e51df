"""Learning masks from images that have none: the network's own sure predictions are taken for true."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.data.masked.unlabelled import JointConfig
from unet_diffusion.images.labels import IGNORE_INDEX
from unet_diffusion.tasks.segmentation import SegmentationConfig, SegmentationTask
from unet_diffusion.training.batches import Batches, images_of_step, other_order, training_batches
from unet_diffusion.training.config import TrainingConfig

START = 0.1  # share of the steps before it sets in, in which the masks alone say what is looked for
SMALLEST = 1e-3  # mean probability of a class that is divided by
COLOUR = 0.5  # how far channels vary on their own, at least, in the image that has to give the mask
COUNTED = 256  # masks, cut as in training, that tell the shares of the classes
IMAGE = "self_training_image"  # in a batch


class SelfTrainingTask(SegmentationTask):
    """A `SegmentationTask` that also learns from images without masks (Sohn et al. 2020, eq. 4, for every pixel).

    The network predicts the classes of an image as it is, with probabilities that are aligned with the shares of the
    classes in the masks (`aligned`). Where it is sure, that is the mask which it has to give for the image as it is
    varied in training, and in its colours further (`COLOUR`); elsewhere nothing is learnt. The loss is the
    cross-entropy, a mean over all pixels, sure or not. It sets in after a tenth of the steps; until then the masks
    alone teach.

    Args:
        network: as for `SegmentationTask`, padded.
        data: likewise.
        images: those without masks, of the same size, channels and range of values.
        joint: the weight of the loss of these, and what counts as sure.
        config: as for `SegmentationTask`.
        augmentation: likewise, but needed.
        scheduler: likewise.
        num_workers: processes that load images ahead, for each of the two sets.

    Raises:
        ValueError: no augmentation, or a network whose masks are smaller than its images.
    """

    def __init__(
        self,
        network: Any,
        data: Any,
        images: Any,
        joint: JointConfig,
        config: SegmentationConfig,
        augmentation: AugmentationConfig | None,
        scheduler: Any = None,
        num_workers: int = 0,
    ) -> None:
        if augmentation is None:
            raise ValueError(
                "augment is off, but self-training learns from the difference that varying an image makes; leave it "
                "on, or set self_training_weight=0."
            )
        if network.config.get("padding") == "valid":
            raise ValueError(
                "the network has padding='valid', whose masks are smaller than the images, and self-training needs "
                "masks of whole images; take a network with padding='same', or set self_training_weight=0."
            )
        super().__init__(network, data, config, augmentation, scheduler, num_workers)
        self.shares = class_shares(data.train, self.num_classes)
        self.strong = replace(augmentation, colour=max(augmentation.colour, COLOUR))
        self.images, self.confidence = images, joint.confidence
        self.weight = joint.self_training_weight or 0.0

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of `SegmentationTask`, after a tenth of the steps with images without masks."""
        labelled = super().batches(accelerator, config, start_step)
        others = training_batches(
            self.images, accelerator, other_order(config, "self-training"), start_step, self.num_workers
        )
        for micro, (batch, other) in enumerate(zip(labelled, others)):
            started = start_step + micro // config.accumulate >= START * config.steps
            yield batch | ({IMAGE: other["image"]} if started else {})

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """The losses of the masks and, weighted, of the network's own added up, each of them, and the sure share."""
        masks = super().loss(network, batch, generators)
        assert isinstance(masks, Tensor)
        own, sure = torch.zeros_like(masks), torch.zeros_like(masks)
        if IMAGE in batch:
            own, sure = self.own_loss(network, self.pixel_range.to_model(batch[IMAGE]), generators)
        return {
            "loss": masks + self.weight * own,
            "segmentation_loss": masks,
            "self_training_loss": own,
            "sure": sure,
        }

    def own_loss(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The loss of images (B, C, H, W) in [-1, 1] with the network's own masks, and the share of sure pixels."""
        with torch.no_grad():
            probabilities = self.logits(network, images, generators).float().softmax(dim=1)
            sureness, classes = aligned(probabilities, self.shares.to(images.device)).max(dim=1)
        classes[sureness < self.confidence] = IGNORE_INDEX
        varied, masks, _ = augment(images, classes, self.strong, generators)
        logits = self.logits(network, varied, generators).float()
        losses = F.cross_entropy(logits, masks, ignore_index=IGNORE_INDEX, reduction="none")  # (B, H, W)
        return losses.mean(), (classes != IGNORE_INDEX).float().mean()

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """The images of a step of this process, with masks and without."""
        others = images_of_step(self.images, accelerator, other_order(config, "self-training"), step)
        return f"{super().describe(accelerator, config, step, generators)}; without masks {others}"


def class_shares(train: Any, num_classes: int) -> Tensor:
    """The shares of the classes in masks as they are trained on, float32 (K,), adding up to 1.

    Squares cut at random places show the middle of an image more often than its border. So the shares in whole
    images may be far off, and would take from a network the class that lies in the middle.
    """
    draws = ((draw // len(train), draw % len(train)) for draw in range(COUNTED))  # epoch and index
    masks = torch.cat([train[draw]["mask"].flatten() for draw in draws])
    counts = torch.bincount(masks[masks != IGNORE_INDEX], minlength=num_classes).float()
    return counts / counts.sum()


def aligned(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Class probabilities whose means are drawn to what is expected (Berthelot et al. 2020, ReMixMatch, section 3.1).

    Without it a class that the network gives too seldom is learnt ever less from its own masks, until it is gone. The
    means are those of the images given, not of all that were seen.

    Args:
        probabilities: (B, K, H, W).
        shares: of the classes, (K,), adding up to 1.

    Returns:
        (B, K, H, W), adding up to 1 over the classes.
    """
    drawn = probabilities * (shares / probabilities.mean((0, 2, 3)).clamp(min=SMALLEST))[:, None, None]
    return drawn / drawn.sum(dim=1, keepdim=True).clamp(min=torch.finfo(drawn.dtype).tiny)
