"""Tuning a finished noise predictor so that it generates in one to four evaluations."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import FEW_STEPS, check_tunable
from unet_diffusion.diffusion.consistency import (
    FINEST,
    NoiseLevels,
    consistency_function,
    consistency_loss,
    distance,
    stage_step,
)
from unet_diffusion.diffusion.distillation import StartingPoints, trajectory_end
from unet_diffusion.diffusion.distribution_matching import (
    GeneratorAndCritic,
    between_ends,
    matching_loss,
    sampled_starts,
)
from unet_diffusion.diffusion.objectives import beside, prediction_loss
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import autocast
from unet_diffusion.randomness import standard_normal
from unet_diffusion.tasks.config import DiffusionConfig, FewStepsConfig, SuperResolutionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.accelerator import RunContext, memory_layout
from unet_diffusion.training.batches import Batches
from unet_diffusion.training.model_cards import Card, parameters, size
from unet_diffusion.unet import UNet

# In a batch, the share of the steps done before it, float64 (), on the CPU; in the state, that of the last batch.
PROGRESS = "progress"
MATCHING = 2 / 3  # share of the steps of distillation after which distribution matching begins
CRITIC_SHARE = 2.0  # learning rate of the critic, as a share of that of the network
WAS_TUNED = {
    True: (
        "was then tuned with {version} to give in one evaluation what it gave in several (Luhman & Luhman 2021), with "
        "images as likely as the data (DMD, Yin et al. 2024)."
    ),
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
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=TIMESTEPS)
pipe(num_inference_steps=2, generator=torch.manual_seed(0)).images[0].save("sample.png")
```

or `unet-diffusion sample --run {name} --steps 2`. `ImageGenerationPipeline` from `unet_diffusion.pipelines`, with
`sampler("lcm", pipe.scheduler)`, also takes classes. Other samplers and guidance are for the run that this one was
tuned from.
"""
OTHERS = "\nOther samplers are for the run that this one was tuned from.\n"


class FewStepsTuning(DiffusionTask):
    """Tuning of a finished noise predictor, by distillation or for consistency (`unet_diffusion.diffusion`).

    All tuning tasks share this part. Among their base classes, it comes before the task that trained the network.
    """

    few_steps = FEW_STEPS
    stock_use = USE
    stages: int
    levels: NoiseLevels
    points: StartingPoints
    paths: list[list[int]]  # of the last drawn batch
    teacher: UNet | None = None  # the network before tuning, for distillation
    precision: Precision = "no"
    step = 1 / FINEST  # distance from t to r, as a share of the noise level of t

    def tune(self, few_steps: FewStepsConfig) -> None:
        """Sets how the network is tuned; for distillation it gets a critic."""
        unet = self.network
        assert isinstance(unet, UNet)
        self.state = {PROGRESS: torch.zeros((), dtype=torch.float64)}
        check_tunable(self.scheduler.config.prediction_type)
        self.stages, self.levels = few_steps.stages, NoiseLevels(self.scheduler)
        self.points = StartingPoints(self.scheduler)
        if few_steps.method == "distillation":
            self.teacher = self.unchanged = copy.deepcopy(unet).eval().requires_grad_(False)
            self.network = GeneratorAndCritic(unet, self.scheduler)

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Returns the parameters that learn. The critic has to keep up, so its parameters learn faster."""
        if not isinstance(self.network, GeneratorAndCritic):
            return super().parameter_groups()
        parts = ((self.network.generator, 1.0), (self.network.critic, CRITIC_SHARE))
        return [([each for each in part.parameters() if each.requires_grad], share) for part, share in parts]

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields the batches of `DiffusionTask`, and with each the share of the training that is done.

        The share never falls: in a run that is resumed with more steps, it stays until these have caught up.
        """
        config, reached = context.config, self.state[PROGRESS].item()
        self._bring_teacher(context.accelerator)
        for micro, batch in enumerate(super().batches(context, start_step)):
            progress = max(reached, (start_step + micro // config.accumulate) / config.steps)
            yield batch | {PROGRESS: torch.tensor(progress, dtype=torch.float64)}

    @property
    def was_tuned(self) -> str:
        """The end of a sentence about the network."""
        return WAS_TUNED[self.teacher is not None]

    def _bring_teacher(self, accelerator: Accelerator) -> None:
        if self.teacher is not None:
            self.teacher.to(accelerator.device, memory_format=memory_layout(accelerator.device))
            self.precision = accelerator.mixed_precision

    def loss(  # type: ignore[override]
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """Returns the tuning loss for stored images `image` (B, C, H, W) and classes `label` (B,).

        At first, the loss of distillation is the distance from the ends of the trajectories. In the last part, it is
        that of distribution matching. The noise-prediction loss of the critic is added in both parts.
        """
        self.state = {PROGRESS: batch[PROGRESS]}
        progress = batch[PROGRESS].item()
        if self.teacher is None:
            self.step = stage_step(progress, self.stages)
            return super().loss(network, batch, generators)
        clean, noise, timesteps, labels, condition = self.drawn(batch, generators)

        def fresh() -> Tensor:
            return standard_normal(clean.shape[1:], generators, clean.device)

        again, later = fresh(), between_ends(self.config.num_train_timesteps, generators)
        noise, timesteps, later = (x.to(clean.device, non_blocking=True) for x in (noise, timesteps, later))
        matching = progress >= MATCHING
        with autocast(clean.device, self.precision):
            if matching:
                own, start = tuned(self.network), (noise, self.paths, fresh)
                noisy = sampled_starts(own, self.scheduler, *start, labels, condition)
            else:
                noisy = self.scheduler.add_noise(clean, noise, timesteps)
                ends = trajectory_end(self.teacher, self.scheduler, noisy, timesteps, labels, condition)
        generated, predicted = network(noisy, timesteps, again, later, labels, condition)
        losses = {"critic_loss": self._critic_loss(predicted, generated.detach(), again, later)}
        if matching:
            losses["matching_loss"] = self._matching_loss(generated, predicted, again, later, labels, condition)
        else:
            losses["distance"] = distance(generated - ends).mean()
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    def _critic_loss(self, predicted: Tensor, made: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        gamma = self.config.min_snr_gamma
        assert not isinstance(gamma, str)
        return prediction_loss(self.scheduler, predicted, made, noise, timesteps, gamma)

    def _matching_loss(
        self,
        generated: Tensor,
        predicted: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        assert self.teacher is not None
        noised = self.scheduler.add_noise(generated.detach(), noise, timesteps)
        with torch.no_grad(), autocast(noised.device, self.precision):
            by_teacher = self.teacher(beside(noised, condition), timesteps, labels, head="noise").sample
        critic, teacher = (
            consistency_function(self.scheduler, noised, timesteps, each) for each in (predicted.detach(), by_teacher)
        )
        return matching_loss(generated, critic, teacher)

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
        predicted = network(beside(noisy, condition), timesteps, labels, head="noise").sample
        return distance(consistency_function(self.scheduler, noisy, timesteps, predicted) - ends).mean()

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        if self.teacher is None:
            return self.levels.draw(generators)
        self.paths = self.points.draw(generators)
        return torch.tensor([path[-1] for path in self.paths])

    def validate(self, network: Any, accelerator: Accelerator) -> dict[str, float]:
        """Returns the loss on held-out images, with noise that never changes.

        For consistency tuning it is the loss of the last stage; for distillation, the distance from the ends.
        """
        self.step = 1 / FINEST
        self._bring_teacher(accelerator)
        return super().validate(tuned(network), accelerator)

    def save(self, network: Any, folder: Path) -> None:
        """Writes the pipeline of the tuned network and `samples.png`."""
        super().save(tuned(network), folder)

    def preview(self, network: Any, path: Path) -> None:
        """Writes a grid of results of the tuned network."""
        super().preview(tuned(network), path)


def tuned(network: UNet | GeneratorAndCritic) -> UNet:
    """Returns the network that is tuned, without its critic."""
    return network.generator if isinstance(network, GeneratorAndCritic) else network


def one_step_scheduler(scheduler: DDPMScheduler) -> DDPMScheduler:
    """Returns a copy of a scheduler of the training whose single step starts at the last timestep."""
    return DDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")


class FewStepsTask(FewStepsTuning):
    """Tuning of a network that generates images, for the `Trainer`.

    Arguments that are not listed are those of `DiffusionTask`.

    Args:
        unet: a trained network that predicts velocities or clean images.
        config: the objective that it was trained for.
        few_steps: how it is tuned.
        scheduler: the scheduler that it was trained with. The pipeline is saved with a copy whose single step starts at
            the last timestep.

    Raises:
        ValueError: the network predicts noise.
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

    def preview(self, network: Any, path: Path) -> None:
        """Writes a grid of images generated in one step and, below them, images from the same noise in two steps."""
        network = tuned(network)
        count = self.config.preview_images
        columns = round(count**0.5)
        rows = [image for steps in (1, 2) for image in self.sample(network, count // columns * columns, steps)]
        save_image(grid(rows, columns), path)

    def card(self, network: Any) -> Card:
        """Returns the card of a network that generates in a few steps."""
        network = tuned(network)
        summary = (
            f"A U-Net with {parameters(network)} parameters that generates images of {size(network)} pixels with "
            f"{network.config.in_channels} channel(s) in 1 to {FEW_STEPS} steps. It is a noise predictor (DDPM) that "
            f"{self.was_tuned}"
        )
        return Card("unconditional-image-generation", summary, {"samples.png": self.caption}, self.use(network))


class FewStepsSuperResolutionTask(FewStepsTuning, SuperResolutionTask):
    """Tuning of a network that enlarges images, for the `Trainer`; the arguments are those of both tasks.

    Raises:
        ValueError: as for `SuperResolutionTask`, or the network predicts noise.
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

    def card(self, network: Any) -> Card:
        """Returns the card of a network that enlarges images in a few steps."""
        network = tuned(network)
        summary = (
            f"A U-Net with {parameters(network)} parameters that makes images with {network.config.out_channels} "
            f"channel(s) {self.scale} times larger a side, in 1 to {FEW_STEPS} steps. It was trained on images of "
            f"{size(network)} pixels as a noise predictor that sees the small image (SR3, Saharia et al. 2021), and "
            f"{self.was_tuned} The detail that it adds is drawn at random: it is likely, but not what was there."
        )
        return Card("image-to-image", summary, {"samples.png": self.caption}, self.use(network) + OTHERS)
