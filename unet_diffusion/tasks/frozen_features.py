"""Learning to segment from a handful of masks: a pixel classifier on the features of a frozen noise predictor."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.network.config import check_recipe
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.tasks.segmentation import SegmentationConfig, SegmentationTask
from unet_diffusion.training.batches import Batches
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unet import UNet


@dataclass
class FrozenFeaturesConfig:
    """Which features of the noise predictor are read, and by how wide a classifier."""

    timesteps: tuple[int, ...] = (50, 150, 250)
    """Timesteps whose noise is added to the image, one network pass each; those of Baranchuk et al. 2022, of 1000."""
    stages: tuple[int, ...] | None = None
    """Stages of the decoder, 0 the coarsest; by default all."""
    hidden: tuple[int, ...] = (128, 32)
    """Widths of the classifier's hidden layers."""

    def __post_init__(self) -> None:
        """Checks every value; what the network and its scheduler have is checked when they are known."""
        check_recipe(self.timesteps, self.hidden, self.stages)


class FrozenFeaturesTask(SegmentationTask):
    """A `PixelClassifier` that learns beside a frozen network, for `unet_diffusion.training.trainer.Trainer`.

    Only the classifier learns, is averaged and lies in checkpoints. In training each sample sees other noise at every
    step; validation, previews and the exported pipeline see the fixed noise of `SegmentationPipeline`.

    Args:
        unet: a trained noise predictor; it is frozen and put in evaluation mode.
        data: as for `SegmentationTask`.
        config: the loss; what it says of the parts of a network that learn must be left at the defaults.
        features: what the classifier reads.
        augmentation: as for `SegmentationTask`.
        scheduler: whose noise the network was trained with.
        num_workers: as for `SegmentationTask`.

    Raises:
        ValueError: a network or a scheduler that a pixel classifier cannot read; an option that means another way to
            learn.
    """

    def __init__(
        self,
        unet: UNet,
        data: Any,
        config: SegmentationConfig,
        features: FrozenFeaturesConfig,
        augmentation: AugmentationConfig | None = None,
        scheduler: Any = None,
        num_workers: int = 0,
    ) -> None:
        if config.timestep is not None or config.trunk_rate != 1:
            raise ValueError(
                f"timestep is {config.timestep} and trunk_rate {config.trunk_rate}, but a pixel classifier has "
                "timesteps of its own and a trunk that does not learn; leave both out."
            )
        classifier = PixelClassifier.beside(
            unet, data.num_classes, features.timesteps, features.hidden, features.stages
        )
        classifier.check_trunk(unet, scheduler)
        self.network, self.unet = classifier, unet.eval().requires_grad_(False)
        self._take(data, config, augmentation, scheduler, num_workers)
        self.frozen = [self.unet]

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The classifier."""
        return [(list(self.network.parameters()), 1.0)]

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """As in `SegmentationTask`; the trunk, which the training loop does not know, comes to the device too."""
        self.unet.to(accelerator.device)
        return super().batches(accelerator, config, start_step)

    def logits(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Class scores (B, K, H, W); the trunk's features are computed as the classifier asks for them."""
        shape = images.shape[1:]
        noises = (
            torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(images.device)
            for _ in self.network.config.timesteps
        )
        return network(self.network.features(self.unet, self.scheduler, images, noises), images.shape[2:])

    def pipeline(self, network: Any) -> SegmentationPipeline:
        """The pipeline that a run saves."""
        names, palette = (None if x is None else list(x) for x in (self.class_names, self.palette))
        return SegmentationPipeline(self.unet, self.scheduler, self.pixel_range.to_dict(), names, palette, network)
