"""Distillation: the loss by which a network learns to reach in one evaluation what took it several.

From a noisy image, a trained network follows the probability-flow trajectory to its clean end in several evaluations of
a solver. Its copy learns to predict that end at once (Luhman & Luhman 2021, "Knowledge Distillation in Iterative
Generative Models for Improved Sampling Speed", arXiv 2101.02388). There, all trajectories start from pure noise. Here
they also start from noisy training images, as in progressive distillation (Salimans & Ho 2022), at the timesteps where
a sampler of up to four steps starts its later steps. The end follows from the start alone, while the targets of
consistency tuning depend on the noise that was drawn. So a short training is enough.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion.diffusion.config import FEW_STEPS
from unet_diffusion.diffusion.consistency import consistency_function
from unet_diffusion.diffusion.objectives import beside
from unet_diffusion.diffusion.sampling import sampler

EVALUATIONS = 8  # of the network by the solver, for each image


class StartingPoints:
    """The timesteps from which a sampler of one to four steps evaluates the network.

    Args:
        scheduler: the training's scheduler.
    """

    def __init__(self, scheduler: DDPMScheduler) -> None:
        few = sampler("lcm", scheduler)
        self.by_steps: list[list[int]] = []
        for steps in range(1, min(FEW_STEPS, scheduler.config.num_train_timesteps) + 1):
            few.set_timesteps(steps)
            self.by_steps.append(few.timesteps.tolist())

    def draw(self, generators: Sequence[torch.Generator]) -> list[list[int]]:
        """Draws a number of steps from each generator, and one timestep of these steps, all with the same chance.

        Returns, for each generator, the sampler's timesteps from the first one, pure noise, to the drawn one.
        """
        return [self._draw(generator) for generator in generators]

    def _draw(self, generator: torch.Generator) -> list[int]:
        timesteps = self.by_steps[int(torch.randint(len(self.by_steps), (), generator=generator))]
        return timesteps[: int(torch.randint(len(timesteps), (), generator=generator)) + 1]


@torch.no_grad()
def trajectory_end(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    noisy: Tensor,
    timesteps: Tensor,
    class_labels: Tensor | None = None,
    condition: Tensor | None = None,
    evaluations: int = EVALUATIONS,
) -> Tensor:
    """The clean images that DPM-Solver++(2M) reaches from noisy ones (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Each image starts at its own timestep, which the solvers of diffusers do not support. From there the timesteps are
    evenly spread. The last step is of the first order.

    Args:
        unet: called as `unet(noisy, timesteps, class_labels, head="noise").sample`.
        scheduler: the scheduler of its training, for velocities or clean images.
        noisy: x_t, (B, C, H, W).
        timesteps: t, int64 (B,), on the device of the images.
        class_labels: class indices (B,), or None.
        condition: channels that the network sees after those of the noisy image, (B, K, H, W); None for none.
        evaluations: number of evaluations of the network, at least 1.

    Returns:
        float32 (B, C, H, W).
    """

    def clean_at(x: Tensor, timesteps: Tensor) -> Tensor:
        predicted = unet(beside(x, condition), timesteps, class_labels, head="noise").sample
        return consistency_function(scheduler, x, timesteps, predicted)

    grid = [(timesteps * (1 - done / evaluations)).round().long() for done in range(evaluations)]
    x, clean = noisy.float(), clean_at(noisy.float(), grid[0])
    slope: Tensor | None = None  # of the clean image with respect to log(alpha / sigma)
    for now, then in pairwise(grid):
        (alpha, sigma), (next_alpha, next_sigma) = (signal_and_noise(scheduler, t) for t in (now, then))
        h = (next_alpha / next_sigma).log() - (alpha / sigma).log()  # infinite from zero signal; 0: nothing changes
        h = torch.where(now == then, 0.0, h)  # at zero signal, it would be the difference of two infinities
        ahead = clean if slope is None else clean + on_images(torch.where(h.isinf(), 0.0, h / 2), slope)
        x = on_images(next_sigma / sigma, x) - on_images(next_alpha * torch.expm1(-h), ahead)
        before, clean = clean, clean_at(x, then)
        slope = on_images(torch.where(h > 0, 1 / h, 0.0), clean - before)
    return clean


def signal_and_noise(scheduler: DDPMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The factors alpha and sigma of clean image and noise at timesteps (B,), float32 (B,) on their device."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return abar.sqrt(), (1 - abar).sqrt()


def on_images(factors: Tensor, images: Tensor) -> Tensor:
    """Multiplies each of the images (B, C, H, W) by its own factor from (B,)."""
    return factors.to(images.dtype)[:, None, None, None] * images
