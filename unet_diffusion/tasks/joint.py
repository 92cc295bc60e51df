"""Learning masks and noise prediction in the same steps, on one network with both heads.

The checkpoint then segments and can still generate images. Images without masks keep teaching the trunk what images of
the domain look like.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.segmentation import LEARN, NOT_HELD_OUT, PARTS, SegmentationTask, freeze
from unet_diffusion.tasks.segmentation import USE as SEGMENT
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import Batches, other_order
from unet_diffusion.training.model_cards import Card, parameters, size
from unet_diffusion.training.task import Task
from unet_diffusion.unet import UNet

SHARED = ("everything", "decoder")  # values of `learn` for which both heads train shared layers
PREFIX = "unlabelled_"  # of batch entries that belong to images without masks


class JointTask(Task):
    """A `SegmentationTask` and a `DiffusionTask` on one network, for `unet_diffusion.training.trainer.Trainer`.

    A step makes two forward passes: labelled images through the segmentation head, and noisy images through the noise
    head. One backward pass starts from the sum of both losses.

    Args:
        segmentation: learns the masks, on a padded `UNet` with both heads and a timestep embedding. Its options define
            which part learns, and how many images and samples a preview shows.
        diffusion: learns noise prediction, with the same network and scheduler, from images of the same channels and
            range of values. Its held-out images give `validation_loss`.
        denoising_weight: factor of the noise-prediction loss, above 0.

    Raises:
        ValueError: the network cannot predict noise, or its trunk does not learn.
    """

    curves = {
        "losses": ("segmentation_loss", *PARTS, "self_training_loss", "denoising_loss", "validation_loss"),
        "mean IoU": ("mean_iou",),
        "learning rate": ("learning_rate",),
    }

    def __init__(self, segmentation: SegmentationTask, diffusion: DiffusionTask, denoising_weight: float) -> None:
        network, learn = segmentation.network, segmentation.config.learn
        check_generates(network, denoising_weight)
        if learn not in SHARED:
            raise ValueError(
                f"learn is {learn!r} and denoising_weight {denoising_weight}, but noise prediction helps masks only "
                f"through layers that both heads share; set learn to one of {', '.join(SHARED)}, or leave "
                "denoising_weight out."
            )
        self.segmentation, self.diffusion = segmentation, diffusion
        segmentation.scheduler = diffusion.scheduler  # also if the network was untrained, so that the run generates
        diffusion.config = replace(diffusion.config, preview_images=segmentation.config.preview_images)
        segmentation.frozen = freeze(network.to_segmentation(), LEARN[learn])  # each task had frozen the other's head
        segmentation.frozen.remove(network.noise_head.requires_grad_(True))
        self.network, self.denoising_weight = network, denoising_weight
        self.best_by, self.patience = segmentation.best_by, segmentation.patience
        self.train = segmentation.train

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Returns the groups of `SegmentationTask`; the noise head belongs to the trunk."""
        return self.segmentation.parameter_groups()

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields batches of `SegmentationTask` with `unlabelled_image` (B, C, H, W) and `unlabelled_label` (B,)."""
        labelled = self.segmentation.batches(context, start_step)
        unlabelled = self.diffusion.batches(other_order(context, "unlabelled"), start_step)
        for batch, other in zip(labelled, unlabelled):
            yield batch | {f"{PREFIX}{name}": value for name, value in other.items()}

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """Returns the mask loss plus the weighted noise-prediction loss, and each of the two without its weight."""
        self.segmentation.hold_frozen()  # before both losses
        unlabelled = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
        noise = self.diffusion.loss(network, unlabelled, generators)  # draws first, since `describe` draws again
        masks = self.segmentation.loss(network, batch, generators)
        masks = masks if isinstance(masks, dict) else {"loss": masks}
        parts = {"segmentation_loss": masks["loss"], **masks}
        return {**parts, "loss": parts["loss"] + self.denoising_weight * noise, "denoising_loss": noise}

    @property
    def batch_size(self) -> int:  # type: ignore[override]  # an attribute of the base class
        """The images at once of the `DiffusionTask`."""
        return self.diffusion.batch_size

    @batch_size.setter
    def batch_size(self, images: int) -> None:
        self.diffusion.batch_size = images

    @property
    def state(self) -> Mapping[str, Tensor]:  # type: ignore[override]  # an attribute of the base class
        """The state of the `SegmentationTask`."""
        return self.segmentation.state

    @state.setter
    def state(self, state: Mapping[str, Tensor]) -> None:
        self.segmentation.state = state

    def finish_step(self, lost: Tensor, accelerator: Accelerator) -> None:
        """Updates the state of the `SegmentationTask`."""
        self.segmentation.finish_step(lost, accelerator)

    def describe(self, context: RunContext, step: int, generators: list[torch.Generator]) -> str:
        """Describes a step of this process: its labelled images, its unlabelled ones, and the latter's timesteps."""
        labelled = self.segmentation.describe(context, step, generators)
        unlabelled = self.diffusion.describe(other_order(context, "unlabelled"), step, generators)
        return f"with masks {labelled}; for noise prediction {unlabelled}"

    def validate(self, network: UNet, accelerator: Accelerator) -> dict[str, float]:
        """Returns the scores of the masks, and the noise-prediction loss if images are held out."""
        return self.segmentation.validate(network, accelerator) | self.diffusion.validate(network, accelerator)

    def preview(self, network: UNet, path: Path) -> None:
        """Writes masks of images as `SegmentationTask` does, and samples to `<name>-samples.png` beside that file."""
        self.segmentation.preview(network, path)
        self.diffusion.preview(network, path.with_stem(f"{path.stem}-samples"))

    def pipeline(self, network: UNet) -> SegmentationPipeline:
        """Returns the pipeline that a run saves; its config also holds the label names of `ImageGenerationPipeline`."""
        pipe = self.segmentation.pipeline(network)
        pipe.register_to_config(_label_names=self.diffusion.pipeline(network).label_names)
        return pipe

    def save(self, network: UNet, folder: Path) -> None:
        """Writes the pipeline, `masks.png` and `samples.png`."""
        self.pipeline(network).save_pretrained(folder)
        self.segmentation.preview(network, folder / "masks.png")
        self.diffusion.preview(network, folder / "samples.png")

    def card(self, network: UNet) -> Card:
        """Returns the card of a network that segments and generates."""
        summary = (
            f"A U-Net with {parameters(network)} parameters that gives every pixel one of "
            f"{network.config.num_classes} classes, and also generates images of {size(network)} pixels with "
            f"{network.config.in_channels} channel(s). It was trained for both at once with {{version}}."
        )
        summary += self.segmentation.objects_learnt
        if self.segmentation.validation is None:
            summary += f" These are the last weights; {NOT_HELD_OUT}."
        use = f"{SEGMENT}\nIt also generates images:\n{self.diffusion.use(network)}"
        images = {"masks.png": self.segmentation.caption, "samples.png": self.diffusion.caption}
        return Card("image-segmentation", summary, images, use)


def check_generates(network: UNet, denoising_weight: float) -> None:
    """Raises a ValueError if a network cannot predict noise."""
    config = network.config
    if network.noise_head is None or network.time_embed is None or config.padding != "same":
        raise ValueError(
            f"denoising_weight is {denoising_weight}, but the network has out_channels={config.out_channels}, "
            f"time_embedding={config.time_embedding!r} and padding={config.padding!r}, and noise prediction needs a "
            "noise head, a timestep embedding and padding='same'; start from a DDPM run or another preset, or leave "
            "denoising_weight out."
        )
