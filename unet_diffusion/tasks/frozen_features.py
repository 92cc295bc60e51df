"""Learning to segment from a handful of masks: a pixel classifier on the features of a frozen noise predictor."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.data.masked.sets import MaskedSets
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.randomness import standard_normal
from unet_diffusion.tasks.config import FrozenFeaturesConfig, SegmentationConfig
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import Batches
from unet_diffusion.unet import UNet
from unet_diffusion.unused_options import check_used


class FrozenFeaturesTask(SegmentationTask):
    """A `PixelClassifier` that learns beside a frozen network, for `unet_diffusion.training.trainer.Trainer`.

    Only the classifier learns, is averaged and is saved in checkpoints. In training, each sample gets new noise at
    every step; validation, previews and the exported pipeline use the fixed noise of `SegmentationPipeline`. Arguments
    that are not listed are those of `SegmentationTask`.

    Args:
        unet: a trained noise predictor; it is frozen and put in evaluation mode.
        config: the loss; the options for a network that learns must have their defaults.
        features: the features that the classifier reads.
        scheduler: the scheduler that the network was trained with.

    Raises:
        ValueError: a pixel classifier cannot use the network or the scheduler, or an option is for another way to
            learn.
    """

    def __init__(
        self,
        unet: UNet,
        data: MaskedSets,
        config: SegmentationConfig,
        features: FrozenFeaturesConfig,
        augmentation: AugmentationConfig | None = None,
        scheduler: DDPMScheduler | None = None,
        num_workers: int = 0,
        noise_head: Mapping[str, Any] | None = None,
    ) -> None:
        check_used(config, learn="pixel_classifier")
        classifier = PixelClassifier.beside(
            unet, data.num_classes, features.timesteps, features.hidden, features.stages
        )
        classifier.check_trunk(unet, scheduler)
        self.unet = self.unchanged = unet.eval().requires_grad_(False)
        super().__init__(classifier, data, config, augmentation, scheduler, num_workers, noise_head)

    def _prepare(self) -> list[nn.Module]:
        return [self.unet]

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Moves the trunk to the device, as the training loop does not know it; yields as `SegmentationTask` does."""
        self.unet.to(context.accelerator.device)
        return super().batches(context, start_step)

    def logits(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Returns class scores (B, K, H, W); computes the features of the trunk that the classifier needs."""
        shape, timesteps = images.shape[1:], self.network.config.timesteps
        noises = (standard_normal(shape, generators, images.device) for _ in timesteps)
        return network(self.network.features(self.unet, self.scheduler, images, noises), images.shape[2:])

    def pipeline(self, network: PixelClassifier) -> SegmentationPipeline:
        """Returns the pipeline that a run saves: the frozen network with the classifier."""
        return self._pipeline_of(self.unet, network)
