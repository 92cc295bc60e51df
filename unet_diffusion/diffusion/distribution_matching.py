"""Distribution matching: the gradient that makes images generated in one evaluation as likely as the data.

Noise is added to generated images, and two noise predictors denoise them. The teacher was trained on the data. The
critic is a copy of the teacher that learns the generated images as training goes on. Where the two predict different
clean images, the generated images are more likely than the data, or less likely. The difference of the two predictions
is the gradient of the Kullback-Leibler divergence (DMD, Yin et al. 2024, "One-step Diffusion with Distribution Matching
Distillation", arXiv 2311.18828, equations 7 and 8).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.diffusion.consistency import consistency_function
from unet_diffusion.diffusion.objectives import beside
from unet_diffusion.unet import UNet

ENDS = 0.02  # share of the timesteps that is left out at each end, as in DMD


class GeneratorAndCritic(ModelMixin):
    """A network that learns to generate in one evaluation, and its critic, a copy that learns what it generates.

    The two are one module, so that one optimizer, one moving average and one checkpoint hold both. Processes then also
    share the gradients of both at once.

    Args:
        generator: a trained noise predictor.
        scheduler: of its training.
    """

    def __init__(self, generator: UNet, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.generator, self.critic, self.scheduler = generator, copy.deepcopy(generator), scheduler

    @property
    def config(self) -> Any:
        """The config of the generator."""
        return self.generator.config

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the blocks of both networks."""
        for network in (self.generator, self.critic):
            network.compile_repeated_blocks(*args, **kwargs)

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        later: Tensor,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Generates images, and lets the critic predict them from noisy versions.

        Args:
            noisy: noisy images from which images are generated, (B, C, H, W).
            timesteps: the timesteps of the noisy images, int64 (B,).
            noise: standard normal noise to add to the generated images, (B, C, H, W).
            later: the timesteps that this noise brings them to, int64 (B,).
            class_labels: class indices (B,), or None.
            condition: channels that the networks see after those of a noisy image, (B, K, H, W); None for none.

        Returns:
            The generated images, float32 (B, C, H, W), and the prediction of the critic. No gradient flows from the
            prediction to the generator.
        """
        predicted = self.generator(beside(noisy, condition), timesteps, class_labels, head="noise").sample
        generated = consistency_function(self.scheduler, noisy, timesteps, predicted)
        again = self.scheduler.add_noise(generated.detach(), noise, later)
        return generated, self.critic(beside(again, condition), later, class_labels, head="noise").sample


@torch.no_grad()
def sampled_starts(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    noise: Tensor,
    paths: Sequence[Sequence[int]],
    fresh: Callable[[], Tensor],
    class_labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The noisy images from which the last step of a sampler starts, after the network's own earlier ones.

    So later steps see in training what they will see in sampling (backward simulation; DMD2, Yin et al. 2024, arXiv
    2405.14867, section 4.5). With noisy training images instead, two steps give worse images than one.

    Args:
        unet: called as `unet(noisy, timesteps, class_labels, head="noise").sample`.
        scheduler: of its training.
        noise: pure noise, (B, C, H, W).
        paths: for each image, the timesteps of the sampler, from that of pure noise to that of the result.
        fresh: returns standard normal noise for another step, (B, C, H, W).
        class_labels: class indices (B,), or None.
        condition: channels that the network sees after those of the noisy image, (B, K, H, W); None for none.

    Returns:
        float32 (B, C, H, W).
    """
    x = noise.float()
    for done in range(max(map(len, paths)) - 1):
        now, then = (torch.tensor([path[min(at, len(path) - 1)] for path in paths]) for at in (done, done + 1))
        now, then = now.to(x.device, non_blocking=True), then.to(x.device, non_blocking=True)
        predicted = unet(beside(x, condition), now, class_labels, head="noise").sample
        clean = consistency_function(scheduler, x, now, predicted)
        arrived = torch.tensor([done + 1 >= len(path) for path in paths]).to(x.device, non_blocking=True)
        x = torch.where(arrived[:, None, None, None], x, scheduler.add_noise(clean, fresh(), then))
    return x


def between_ends(num_train_timesteps: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws a timestep from each generator, int64 (B,), not too near either end, where the networks see the same."""
    low, high = int(ENDS * num_train_timesteps), int((1 - ENDS) * num_train_timesteps)
    return torch.stack([torch.randint(low, max(high, low + 1), (), generator=generator) for generator in generators])


def matching_loss(generated: Tensor, critic: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared distance to images that are nearer to the data; its gradient is that of DMD.

    Args:
        generated: (B, C, H, W).
        critic: the clean images that the critic sees in their noisy versions, (B, C, H, W).
        teacher: those that the teacher sees in the same ones; no gradient goes through either.

    Returns:
        The mean over the batch, a float32 scalar. The weight of each image follows from the distance between the
        generated image and the teacher's (DMD, equation 8), so that the gradients of all noise levels have the same
        size.
    """
    apart = (generated.detach() - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    direction = (critic - teacher) / apart.clamp(min=1e-3)
    return 0.5 * (generated - (generated - direction).detach()).square().mean()
