"""Learning masks and noise prediction in the same steps, on one network with both heads.

The checkpoint then segments and still generates, and images without masks go on teaching the trunk what the images
of a domain look like.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from unet_diffusion.files import merged_into
from unet_diffusion.images.figures import save_curves
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.tasks.cards import FRONT_MATTER, parameters, size, training_facts
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.segmentation import LEARN, SegmentationTask, freeze
from unet_diffusion.training.batches import Batches, other_order
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unet import UNet
from unet_diffusion.version import __version__

CURVES = {
    "losses": ("segmentation_loss", "self_training_loss", "denoising_loss", "validation_loss"),
    "mean IoU": ("mean_iou",),
    "learning rate": ("learning_rate",),
}
SHARED = ("everything", "decoder")  # ways to learn in which both heads teach the trunk
PREFIX = "unlabelled_"  # of what a batch holds of the images without masks


class JointTask:
    """A `SegmentationTask` and a `DiffusionTask` on one network, for `unet_diffusion.training.trainer.Trainer`.

    A step makes two forward passes, of labelled images through the segmentation head and of noisy ones through the
    noise head, and one backward pass from the sum of both losses.

    Args:
        segmentation: learns the masks, on a padded `UNet` with both heads and a timestep embedding; says which part
            learns, and how many images and samples a preview shows.
        diffusion: learns noise prediction, with the same network and scheduler, from images of the same channels and
            range of values; those held out from them are the ones that `validation_loss` is measured on.
        denoising_weight: factor of the noise-prediction loss, above 0.

    Raises:
        ValueError: a network that cannot predict noise, or a trunk that does not learn.
    """

    best_by: str | None = "mean_iou"

    def __init__(self, segmentation: SegmentationTask, diffusion: DiffusionTask, denoising_weight: float) -> None:
        network, learn = segmentation.network, segmentation.config.learn
        check_generates(network, denoising_weight)
        if learn not in SHARED:
            raise ValueError(
                f"learn is {learn!r} and denoising_weight {denoising_weight}, but noise prediction helps masks by what "
                f"both heads share; set learn to one of {', '.join(SHARED)}, or leave denoising_weight out."
            )
        self.segmentation, self.diffusion = segmentation, diffusion
        diffusion.config = replace(diffusion.config, preview_images=segmentation.config.preview_images)
        segmentation.frozen = freeze(network.to_segmentation(), LEARN[learn])  # each task had frozen the other's head
        segmentation.frozen.remove(network.noise_head.requires_grad_(True))
        self.network, self.denoising_weight, self.patience = network, denoising_weight, segmentation.patience

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """As in segmentation; the noise head belongs to the trunk."""
        return self.segmentation.parameter_groups()

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of `SegmentationTask`, with `unlabelled_image` (B, C, H, W) and `unlabelled_label` (B,)."""
        labelled = self.segmentation.batches(accelerator, config, start_step)
        unlabelled = self.diffusion.batches(accelerator, other_order(config, "unlabelled"), start_step)
        for batch, other in zip(labelled, unlabelled):
            yield batch | {f"{PREFIX}{name}": value for name, value in other.items()}

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """The losses of the masks and the weighted noise-prediction loss added up, and each without its weight."""
        unlabelled = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
        noise = self.diffusion.loss(network, unlabelled, generators)  # first, as `describe` has it
        masks = self.segmentation.loss(network, batch, generators)
        parts = masks if isinstance(masks, dict) else {"loss": masks, "segmentation_loss": masks}
        return {**parts, "loss": parts["loss"] + self.denoising_weight * noise, "denoising_loss": noise}

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """The labelled and the unlabelled images of a step of this process, and the timesteps of these."""
        labelled = self.segmentation.describe(accelerator, config, step, generators)
        unlabelled = self.diffusion.describe(accelerator, other_order(config, "unlabelled"), step, generators)
        return f"with masks {labelled}; for noise prediction {unlabelled}"

    def validate(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """The scores of the masks, and the noise-prediction loss where images are held out."""
        return self.segmentation.validate(network, accelerator) | self.diffusion.validate(network, accelerator)

    def preview(self, network: Any, path: Path) -> None:
        """Masks of held-out images, and beside that file one of samples, `<name>-samples.png`."""
        self.segmentation.preview(network, path)
        self.diffusion.preview(network, path.with_stem(f"{path.stem}-samples"))

    def pipeline(self, network: Any) -> SegmentationPipeline:
        """The pipeline that a run saves; `ImageGenerationPipeline` finds in it what it needs, its label names too."""
        pipe = self.segmentation.pipeline(network)
        pipe.register_to_config(_label_names=self.diffusion.pipeline(network).label_names)
        return pipe

    def export(self, network: Any, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The run's folder as a pipeline, with curves, masks of held-out images, samples and a model card."""
        with merged_into(folder) as aside:
            self.pipeline(network).save_pretrained(aside)
            save_curves(rows, aside / "curves.png", CURVES)
            self.segmentation.preview(network, aside / "masks.png")
            self.diffusion.preview(network, aside / "samples.png")
            (aside / "README.md").write_text(joint_card(folder.name, network, rows, config), encoding="utf-8")


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


def joint_card(name: str, unet: UNet, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The card of a network that segments and generates; arguments as `unet_diffusion.tasks.cards.diffusion_card`."""
    return f"""{FRONT_MATTER.format(tag="image-segmentation")}
# {name}

A U-Net of {parameters(unet)} parameters that gives every pixel one of {unet.config.num_classes} classes, and also \
generates images of {size(unet)} pixels with {unet.config.in_channels} channel(s); trained for both at once with \
unet-diffusion {__version__}.

![Images, their masks and the predictions](masks.png)

![Samples, 20 steps of DPM-Solver++](samples.png)

## Use

```python
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

pipe = SegmentationPipeline.from_pretrained("{name}")  # this folder
pipe("image.png").masks[0].save("mask.png")

pipe = ImageGenerationPipeline.from_pretrained("{name}")  # diffusers' own DDPMPipeline takes it as well
pipe(num_inference_steps=1000).images[0].save("sample.png")
```

Faster, in 20 steps: `unet-diffusion sample --run {name}`.

## Training

{training_facts(rows, config)}

![Curves](curves.png)
"""
