"""Tuning a finished noise predictor so that it generates in one to four evaluations."""

import copy
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import FEW_STEPS, check_tunable
from unet_diffusion.diffusion.consistency import FINEST, NoiseLevels, consistency_loss, stage_step
from unet_diffusion.diffusion.distillation import StartingPoints, distillation_loss, trajectory_end
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import autocast
from unet_diffusion.tasks.config import DiffusionConfig, FewStepsConfig, SuperResolutionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.accelerator import RunContext, memory_layout
from unet_diffusion.training.batches import Batches
from unet_diffusion.training.model_cards import Card, parameters, size
from unet_diffusion.unet import UNet

STEP = "step"  # in a batch: 1 / q^(stage + 1), float64 (), on the CPU
WAS_TUNED = {
    True: "was then tuned with {version} to give in one evaluation what it gave in several (Luhman & Luhman 2021).",
    False: "was then tuned with {version} to be consistent from noise to image (ECT, Geng et al. 2024).",
}
USE = """
In one step, with a stock pipeline:

```python
import torch
import unet_diffusion
from diffusers import DDIMPipeline, DDPMPipeline, LCMScheduler

pipe = DDIMPipeline.from_pretrained("{name}")  # this folder
pipe(num_inference_steps=1, generator=torch.manual_seed(0)).images[0].save("sample.png")
```

In two to four steps:

```python
pipe = DDPMPipeline.from_pretrained("{name}")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe(num_inference_steps=2, generator=torch.manual_seed(0)).images[0].save("sample.png")
```

or `unet-diffusion sample --run {name} --steps 2`. `ImageGenerationPipeline` from `unet_diffusion.pipelines`, with
`sampler("lcm", pipe.scheduler)`, also takes classes. Other samplers and guidance are for the run that this one was
tuned from.
"""
OTHERS = "\nOther samplers are for the run that this one was tuned from.\n"


class FewStepsTuning(DiffusionTask):
    """Tuning of a finished noise predictor, by distillation or for consistency (`unet_diffusion.diffusion`).

    This is the part that all tasks of tuning share. It comes before the task that trained the network in their bases.
    """

    few_steps = FEW_STEPS
    stages: int
    levels: NoiseLevels
    points: StartingPoints
    teacher: UNet | None = None  # the network as it was before, for distillation
    precision: Precision = "no"
    step = 1 / FINEST  # from t to r, as a share of the noise level of t

    def tune(self, few_steps: FewStepsConfig) -> None:
        """Sets how the network is tuned; it is still the one to tune."""
        check_tunable(self.scheduler.config.prediction_type)
        self.stages, self.levels = few_steps.stages, NoiseLevels(self.scheduler)
        self.points = StartingPoints(self.scheduler)
        if few_steps.method == "distillation":
            self.teacher = copy.deepcopy(self.network).eval().requires_grad_(False)

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields batches of `DiffusionTask`, for consistency with the distance from t to r of their stage."""
        config = context.config
        self._bring_teacher(context.accelerator)
        for micro, batch in enumerate(super().batches(context, start_step)):
            progress = (start_step + micro // config.accumulate) / config.steps
            yield batch | {STEP: torch.tensor(stage_step(progress, self.stages), dtype=torch.float64)}

    @property
    def was_tuned(self) -> str:
        """The end of a sentence about the network."""
        return WAS_TUNED[self.teacher is not None]

    def _bring_teacher(self, accelerator: Accelerator) -> None:
        if self.teacher is not None:
            self.teacher.to(accelerator.device, memory_format=memory_layout(accelerator.device))
            self.precision = accelerator.mixed_precision

    def loss(self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """Returns the loss of tuning of stored images `image` (B, C, H, W) and classes `label` (B,)."""
        self.step = batch[STEP].item()
        return super().loss(network, batch, generators)

    def _loss(
        self,
        network: nn.Module,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        noise = noise.to(clean.device, non_blocking=True)
        if self.teacher is None:
            return consistency_loss(
                network, self.scheduler, self.levels, clean, noise, timesteps, self.step, labels, condition
            )
        timesteps = timesteps.to(clean.device, non_blocking=True)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with autocast(clean.device, self.precision):
            ends = trajectory_end(self.teacher, self.scheduler, noisy, timesteps, labels, condition)
        return distillation_loss(network, self.scheduler, noisy, timesteps, ends, labels, condition)

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        return self.levels.draw(generators) if self.teacher is None else self.points.draw(generators)

    def validate(self, network: UNet, accelerator: Accelerator) -> dict[str, float]:
        """Returns the loss on held-out images, of consistency that of the last stage, with noise that never changes."""
        self.step = 1 / FINEST
        self._bring_teacher(accelerator)
        return super().validate(network, accelerator)


def one_step_scheduler(scheduler: DDPMScheduler) -> DDPMScheduler:
    """Returns the like of a scheduler of the training whose one step starts at the last timestep."""
    return DDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")


class FewStepsTask(FewStepsTuning):
    """Tuning of a network that generates images, for the `Trainer`.

    Arguments that are not listed are those of `DiffusionTask`.

    Args:
        unet: a trained network that predicts velocities or clean images.
        config: the objective that it was trained for.
        few_steps: the number of stages.
        scheduler: that it was trained with. The pipeline is saved with its like, whose one step starts at the last
            timestep.

    Raises:
        ValueError: a network that predicts noise.
    """

    caption = "Samples: above in one step, below from the same noise in two"

    def __init__(
        self,
        unet: UNet,
        data: ImageSets,
        config: DiffusionConfig,
        few_steps: FewStepsConfig,
        scheduler: DDPMScheduler,
        num_workers: int = 0,
    ) -> None:
        super().__init__(unet, data, config, num_workers, one_step_scheduler(scheduler))
        self.tune(few_steps)

    def preview(self, network: UNet, path: Path) -> None:
        """Writes a grid of images generated in one step, and below from the same noise in two."""
        count = self.config.preview_images
        columns = round(count**0.5)
        rows = [image for steps in (1, 2) for image in self.sample(network, count // columns * columns, steps)]
        save_image(grid(rows, columns), path)

    def card(self, network: UNet) -> Card:
        """Returns the card of a network that generates in a few steps."""
        summary = (
            f"A U-Net with {parameters(network)} parameters that generates images of {size(network)} pixels with "
            f"{network.config.in_channels} channel(s) in 1 to {FEW_STEPS} steps. It is a noise predictor (DDPM) that "
            f"{self.was_tuned}"
        )
        return Card("unconditional-image-generation", summary, {"samples.png": self.caption}, USE)


class FewStepsSuperResolutionTask(FewStepsTuning, SuperResolutionTask):
    """Tuning of a network that enlarges images, for the `Trainer`; the arguments are those of both tasks.

    Raises:
        ValueError: as for `SuperResolutionTask`, or a network that predicts noise.
    """

    def __init__(
        self,
        unet: UNet,
        data: ImageSets,
        config: DiffusionConfig,
        super_resolution: SuperResolutionConfig,
        few_steps: FewStepsConfig,
        scheduler: DDPMScheduler,
        num_workers: int = 0,
    ) -> None:
        super().__init__(unet, data, config, super_resolution, num_workers, one_step_scheduler(scheduler))
        self.tune(few_steps)

    def card(self, network: UNet) -> Card:
        """Returns the card of a network that enlarges in a few steps."""
        summary = (
            f"A U-Net with {parameters(network)} parameters that makes images with {network.config.out_channels} "
            f"channel(s) {self.scale} times larger a side, in 1 to {FEW_STEPS} steps. It was trained on images of "
            f"{size(network)} pixels as a noise predictor that sees the small image (SR3, Saharia et al. 2021), and "
            f"{self.was_tuned} The detail that it adds is drawn at random: it is likely, but not what was there."
        )
        return Card("image-to-image", summary, {"samples.png": self.caption}, self.use + OTHERS)
