"""Consistency tuning: the loss by which a noise predictor learns to generate in a few evaluations.

The method is ECT, "Easy Consistency Tuning" (Geng et al. 2024, "Consistency Models Made Easy", arXiv 2406.14548; its
public code is `ECMLoss` of github.com/locuslab/ect), for networks that take the timesteps of a table.

A noisy image is x = alpha x0 + sigma eps. With the noise level s = sigma / alpha, x / alpha = x0 + s eps is the noisy
image of ECT, whose times t and r are the levels s_t and s_r here. The consistency function f(x, t) is the clean end of
the probability-flow trajectory through x. From the velocity it is alpha x - sigma v: at s = 0 it is x itself, whatever
the network predicts. (This is the preconditioning of EDM, which ECT uses, for data of deviation 1.) So every velocity
predictor is a valid start. A network that predicts the clean image is one too; the target at r = 0, the clean image,
teaches it the boundary. From a noise prediction, f would be x / alpha - s eps. This multiplies the errors of the
network by s: 158 at the end of the linear schedule, 20,000 at the end of the cosine schedule, infinite at zero terminal
SNR. So noise predictors are refused.
"""

from collections.abc import Sequence

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from unet_diffusion.diffusion.config import check_tunable
from unet_diffusion.diffusion.objectives import beside

CLEAN = -1  # the timestep of the clean image, before the first of the table
LOG_MEAN, LOG_STD = -1.1, 2.0  # of ln s; P_mean and P_std of ECT's code
NEARNESS = 8.0  # ECT's k: small levels start with r = 0, and r is up to 1 + k / 2 times as far from t as large levels
FINEST = 256  # ECT's smallest step s_t - s_r is s_t / 256: q = 2 in 8 stages, 4 in 4, or 256 in one
HIGHEST = 80.0  # from here on, images are pure noise; sigma_max of EDM (Karras et al. 2022), and of ECT's sampler
LAST_SHARE = 0.05  # share of the draws at the last timestep, where sampling starts; ln s reaches it too rarely
HUBER = 0.00054  # c of the pseudo-Huber loss: 0.06 in ECT's code for ImageNet, over the root of 64 x 64 x 3 values


class NoiseLevels:
    """The noise levels s = sigma / alpha of a table of timesteps, and the pairs of levels that tuning compares.

    Timesteps are whole numbers, since the network has learnt no others and samplers use no others. A wanted level is
    replaced by the nearest one in the table. Levels above `HIGHEST` count as `HIGHEST`: alpha is below 1 / 80 there and
    f hardly changes, and this keeps the weights finite.

    Args:
        scheduler: a diffusers `DDPMScheduler`, with `alphas_cumprod`.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        abar = scheduler.alphas_cumprod.double().cpu()
        self.levels = ((1 - abar) / abar).sqrt().clamp(max=HIGHEST)  # (T,), ascending; zero terminal SNR is infinite
        self.last = len(abar) - 1
        self.top = int((self.levels < HIGHEST).sum())  # the first timestep of level HIGHEST, or T
        self.borders = (self.levels[1:] + self.levels[:-1]) / 2

    def nearest(self, levels: Tensor) -> Tensor:
        """Returns the timesteps whose levels are nearest, int64, of any shape."""
        return torch.bucketize(levels.double(), self.borders)

    def draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draws a timestep from each generator, int64 (B,): a share `LAST_SHARE` is the last; else ln s is normal."""
        last = torch.stack([torch.rand((), generator=generator) for generator in generators]) < LAST_SHARE
        normal = torch.stack([torch.randn((), generator=generator) for generator in generators])
        return torch.where(last, self.last, self.nearest((LOG_MEAN + LOG_STD * normal).exp()))

    def earlier(self, timesteps: Tensor, step: float) -> Tensor:
        """Returns the timesteps r < t to compare with, int64 (B,); `CLEAN` for the clean image.

        s_r = s_t max(0, 1 - step (1 + k sigmoid(-s_t))), `t_to_r_sigmoid` of ECT's code, and at least one timestep
        before t.

        Args:
            timesteps: t, int64 (B,), on the CPU.
            step: 1 / q^(stage + 1), the distance from t to r for large levels, as a share of s_t.
        """
        levels = self.levels[timesteps]
        wanted = levels * (1 - step * (1 + NEARNESS * torch.sigmoid(-levels))).clamp(min=0)
        before = torch.minimum(self.nearest(wanted), timesteps.clamp(max=self.top) - 1)
        return torch.where(wanted < self.levels[0] / 2, CLEAN, before)

    def weights(self, timesteps: Tensor, earlier: Tensor, step: float) -> Tensor:
        """Returns the weights step / (s_t - s_r), float32 (B,); those of the last timestep are also divided by alpha_t.

        1 / (s_t - s_r) is ECT's (for CIFAR-10; its code for ImageNet has 1 / s_t^2 + 1 / sigma_data^2). The factor
        `step` keeps the size of the gradients from stage to stage. At the last timestep, where sampling starts, an
        error of the velocity is an equally large error of f. ECT's weight is at most about 1 / (step s_t), so this
        error would count for next to nothing. Divided by alpha_t, which is about 1 / s_t there, it counts as much as an
        error at a middle level.

        Args:
            timesteps: t, int64 (B,).
            earlier: r, int64 (B,).
            step: as for `earlier`.
        """
        levels = self.levels[timesteps]
        before = torch.where(earlier == CLEAN, 0.0, self.levels[earlier.clamp(min=0)])
        factor = torch.where(timesteps == self.last, (1 + levels**2).sqrt(), 1.0)
        return (step * factor / (levels - before)).float()


def stage_step(progress: float, stages: int) -> float:
    """Returns 1 / q^(stage + 1) of ECT, with q^stages = `FINEST`, after a share `progress` of the training."""
    stage = min(int(progress * stages), stages - 1)
    return FINEST ** (-(stage + 1) / stages)


def consistency_function(scheduler: SchedulerMixin, noisy: Tensor, timesteps: Tensor, predicted: Tensor) -> Tensor:
    """Returns the clean images that predictions stand for, float32 (B, C, H, W): alpha x - sigma v from velocities.

    Args:
        scheduler: the training's scheduler, for velocities or clean images.
        noisy: x, (B, C, H, W).
        timesteps: int64 (B,).
        predicted: the network's prediction, (B, C, H, W).

    Raises:
        ValueError: the scheduler is for noise predictions.
    """
    check_tunable(scheduler.config.prediction_type)
    if scheduler.config.prediction_type == "sample":
        return predicted.float()
    abar = scheduler.alphas_cumprod.to(noisy.device)[timesteps].float()[:, None, None, None]
    return abar.sqrt() * noisy.float() - (1 - abar).sqrt() * predicted.float()


def consistency_loss(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    levels: NoiseLevels,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    step: float,
    class_labels: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The weighted distance of f(x_t, t) from f(x_r, r), with the same noise in both.

    No gradient flows through f(x_r, r). In training, dropout drops the same activations in both passes: the second one
    starts from the state of PyTorch's global generators that the first one started from.

    Args:
        unet: called as `unet(noisy, timesteps, class_labels, head="noise").sample`.
        scheduler: a diffusers `DDPMScheduler` for velocities or clean images.
        levels: the noise levels of this scheduler.
        clean: images in [-1, 1], (B, C, H, W).
        noise: standard normal noise, (B, C, H, W).
        timesteps: t, int64 (B,), on the CPU.
        step: as for `NoiseLevels.earlier`.
        class_labels: class indices (B,), or None.
        condition: channels that the network sees after those of the noisy image, (B, K, H, W); None for none.

    Returns:
        The mean over the batch, a float32 scalar.
    """
    clean, device = clean.float(), clean.device
    earlier = levels.earlier(timesteps, step)

    def estimate(timesteps: Tensor) -> Tensor:
        noisy = scheduler.add_noise(clean, noise, timesteps)
        predicted = unet(beside(noisy, condition), timesteps, class_labels, head="noise").sample
        return consistency_function(scheduler, noisy, timesteps, predicted)

    target = clean
    if (earlier != CLEAN).any():
        devices = [] if device.type == "cpu" else [device]
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=unet.training, device_type=device.type):
            before = estimate(earlier.clamp(min=0).to(device, non_blocking=True))
        is_clean = (earlier == CLEAN).to(device, non_blocking=True)
        target = torch.where(is_clean[:, None, None, None], clean, before)
    apart = distance(estimate(timesteps.to(device, non_blocking=True)) - target)
    return (levels.weights(timesteps, earlier, step).to(device, non_blocking=True) * apart).mean()


def distance(difference: Tensor) -> Tensor:
    """The pseudo-Huber loss sqrt(d^2 + c^2) - c, (B,), where d is the root mean square over an image (C, H, W).

    This d is ECT's norm divided by the root of the number of values.
    """
    return (difference.square().mean(dim=(1, 2, 3)) + HUBER**2).sqrt() - HUBER
