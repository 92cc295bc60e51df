"""Learning from images without masks: predictions of which the network is sure serve as masks."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import MaskedSets
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.tasks.config import JointConfig, SegmentationConfig
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import Batches, images_of_step, other_order, training_batches
from unet_diffusion.unet import UNet

START = 0.1  # share of the steps before self-training starts; until then the network learns from masks alone
KEPT = 1 - 1 / 128  # share of the running mean kept at each step; ReMixMatch averages over the last 128 batches
SMALLEST = 1e-3  # smallest mean probability of a class in the division of `aligned`
COLOUR = 0.5  # smallest `colour` of the augmentation of images that learn from the network's own masks
COUNTED = 256  # masks, cut as in training, from which the shares of the classes are measured
IMAGE = "self_training_image"  # in a batch


class SelfTrainingTask(SegmentationTask):
    """A `SegmentationTask` that also learns from images without masks (Sohn et al. 2020, eq. 4, for every pixel).

    The network predicts the classes of an unchanged image. Its probabilities are aligned with the shares of the classes
    in the masks (`aligned`). This uses their running mean over the earlier steps, which is the same for all
    micro-batches and processes of a step. Where the network is sure, the prediction serves as the mask of the augmented
    image, whose colours vary more than usual (`COLOUR`). The other pixels are ignored. The loss is the cross-entropy,
    as a mean over all pixels, sure or not. Instances are learnt from the masks alone. Self-training starts after a
    tenth of the steps; until then the network learns from masks alone. Once started, it goes on in a run that is
    resumed with more steps.

    Arguments that are not listed are those of `SegmentationTask`.

    Args:
        network: as for `SegmentationTask`, padded.
        images: images without masks, of the same size, channels and range of values.
        joint: the weight of the self-training loss, and the probability that counts as sure.
        augmentation: how images are varied; it is required.
        num_workers: processes that load images ahead, for each of the two sets.

    Raises:
        ValueError: no augmentation, or a network whose masks are smaller than its images.
    """

    def __init__(
        self,
        network: UNet,
        data: MaskedSets,
        images: ImageDataset | StreamingImages,
        joint: JointConfig,
        config: SegmentationConfig,
        augmentation: AugmentationConfig | None,
        scheduler: DDPMScheduler | None = None,
        num_workers: int = 0,
        noise_head: Mapping[str, Any] | None = None,
    ) -> None:
        if augmentation is None:
            raise ValueError(
                "augment is off, but self-training learns from the difference that varying an image makes; leave it "
                "on, or set self_training_weight=0."
            )
        if network.config.get("padding") == "valid":
            raise ValueError(
                "the network has padding='valid', whose masks are smaller than the images, but self-training needs "
                "masks of whole images; take a network with padding='same', or set self_training_weight=0."
            )
        super().__init__(network, data, config, augmentation, scheduler, num_workers, noise_head)
        self.shares = class_shares(data.train)
        self.state = {"probabilities": torch.zeros(self.num_classes), "weight": torch.zeros(())}  # mean: their quotient
        self.seen: Tensor | None = (
            None  # in this step: the sums of the images' mean probabilities, and the number of images
        )
        self.strong = replace(augmentation, colour=max(augmentation.colour, COLOUR))
        self.images, self.confidence = images, joint.confidence
        self.weight = joint.self_training_weight or 0.0

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields batches of `SegmentationTask`; after a tenth of the steps they also hold images without masks."""
        labelled, config = super().batches(context, start_step), context.config
        others = training_batches(self.images, other_order(context, "self-training"), start_step, self.num_workers)
        goes_on = self.state["weight"].item() > 0  # in a run that is resumed, maybe with more steps
        for micro, (batch, other) in enumerate(zip(labelled, others)):
            started = goes_on or start_step + micro // config.accumulate >= START * config.steps
            yield batch | ({IMAGE: other["image"]} if started else {})

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """Returns the mask loss plus the weighted self-training loss, each loss alone, and the share of sure pixels."""
        losses = super().loss(network, batch, generators)
        parts = losses if isinstance(losses, dict) else {"loss": losses}
        masks = parts["loss"]
        own, sure = torch.zeros_like(masks), torch.zeros_like(masks)
        if IMAGE in batch:
            own, sure = self.own_loss(network, self.pixel_range.to_model(batch[IMAGE]), generators)
        return {
            **parts,
            "loss": masks + self.weight * own,
            "segmentation_loss": masks,
            "self_training_loss": own,
            "sure": sure,
        }

    def own_loss(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Returns the loss on images (B, C, H, W) against the network's own masks, and the share of sure pixels."""
        with torch.no_grad():
            network.eval()  # its masks come from the whole network, without dropout
            probabilities = self.class_logits(network, images, generators).softmax(dim=1)
            network.train()
            self.hold_frozen()
            sums = torch.cat(
                [probabilities.mean((2, 3)).sum(0), torch.full_like(probabilities[:1, 0, 0, 0], len(images))]
            )
            self.seen = sums if self.seen is None else self.seen + sums
            self.shares = self.shares.to(images.device)
            self.state = {name: value.to(images.device) for name, value in self.state.items()}
            confidence, classes = aligned(probabilities, self.shares, self.mean_probabilities()).max(dim=1)
        classes[~(confidence >= self.confidence)] = IGNORE_INDEX  # also where it is NaN
        varied, masks, *_ = augment(images, classes, self.strong, generators)
        logits = self.class_logits(network, varied, generators)
        losses = F.cross_entropy(logits, masks, ignore_index=IGNORE_INDEX, reduction="none")  # (B, H, W)
        return losses.mean(), (classes != IGNORE_INDEX).float().mean()

    def class_logits(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Returns the scores of the classes alone, float32 (B, K, H, W); arguments as for `logits`."""
        return self.logits(network, images, generators)[:, : self.num_classes].float()

    def mean_probabilities(self) -> Tensor:
        """Returns the running mean of the predicted probabilities (K,); before the first step, the expected shares."""
        weight = self.state["weight"]
        return torch.where(weight > 0, self.state["probabilities"] / weight.clamp(min=1 - KEPT), self.shares)

    def finish_step(self, lost: Tensor, accelerator: Accelerator) -> None:
        """Adds the probabilities of this step, over all micro-batches and processes, to their running mean."""
        if self.seen is None:
            return
        sums = accelerator.reduce(self.seen, "sum")
        self.seen = None
        lost = lost | ~sums.isfinite().all()
        added = {"probabilities": sums[:-1] / sums[-1], "weight": torch.ones_like(sums[-1])}
        moved = {name: KEPT * value + (1 - KEPT) * added[name] for name, value in self.state.items()}
        self.state = {name: torch.where(lost, value, moved[name]) for name, value in self.state.items()}

    def describe(self, context: RunContext, step: int, generators: list[torch.Generator]) -> str:
        """Describes a step of this process: its images with masks and without."""
        others = images_of_step(self.images, other_order(context, "self-training"), step)
        return f"{super().describe(context, step, generators)}; without masks {others}"


def class_shares(train: MaskedDataset) -> Tensor:
    """Measures the shares of the classes in masks as training shows them, float32 (K,), adding up to 1.

    Squares cut at random places show the middle of an image more often than its border. So shares in whole images could
    be far off, and alignment would then suppress a class that lies in the middle. A class that none of the counted
    squares shows has its share in whole images, since alignment would remove a class without a share.
    """
    whole = train.class_counts().float()
    counts = whole
    if train.crop_size is not None:
        indices = range(0, len(train), max(1, len(train) // COUNTED))
        counts = torch.zeros_like(whole)
        for epoch in range(math.ceil(COUNTED / len(indices))):
            for index in indices:
                mask = train[epoch, index]["mask"]
                counts += torch.bincount(mask[mask != IGNORE_INDEX], minlength=len(counts))
    shares = torch.where(counts > 0, counts / counts.sum(), whole / whole.sum())
    return shares / shares.sum()


def aligned(probabilities: Tensor, shares: Tensor, means: Tensor) -> Tensor:
    """Moves the means of class probabilities towards expected shares (Berthelot et al. 2020, ReMixMatch, section 3.1).

    Without this, a class that the network predicts too rarely is learnt less and less from the network's own masks,
    until it disappears.

    Args:
        probabilities: (B, K, H, W), which add up to 1 over the classes, as does the result.
        shares: expected means (K,), which add up to 1.
        means: of the network's predictions (K,).
    """
    moved = probabilities * (shares / means.clamp(min=SMALLEST))[:, None, None]
    return moved / moved.sum(dim=1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)
