"""The objective of a noise predictor: the target, its weight and the loss.

The forward process is q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) (Ho et al. 2020, eq. 4), with abar_t the
`alphas_cumprod` of a diffusers scheduler. The signal-to-noise ratio is abar_t / (1 - abar_t).
"""

from typing import get_args

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from unet_diffusion.diffusion.config import PredictionType


def signal_to_noise(scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
    """The signal-to-noise ratio at `timesteps` (B,), float32 (B,)."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return abar / (1 - abar)


def prediction_target(scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The target of the prediction, (B, C, H, W): the noise, the velocity (Salimans & Ho 2022) or the clean image.

    Raises:
        ValueError: the scheduler has another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    if kind == "sample":
        return clean
    raise ValueError(f"prediction_type is {kind!r}, but must be one of {', '.join(get_args(PredictionType))}.")


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str, floor: float = 0.0) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, section 3.4): every type is weighted as min(snr, gamma) in clean-image space.

    A squared error in the clean image becomes snr times as large in the noise and snr + 1 times in the velocity, so
    these divide the weights. At snr 0 (zero terminal SNR) the noise weight takes its limit, 1.

    The weights of the clean image and of the velocity would go to 0 with snr. `floor` is their smallest value in
    clean-image space: with 1 they are max(min(snr, gamma), 1), which joins the upper limit of Min-SNR to the lower one
    of the "truncated SNR" of Salimans & Ho (2022, section 4).
    """
    if prediction_type == "epsilon":
        return torch.where(snr > 0, snr.clamp(max=gamma) / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)
    limited = snr.clamp(min(floor, gamma), gamma)
    return limited / (snr + 1) if prediction_type == "v_prediction" else limited


def beside(noisy: Tensor, condition: Tensor | None) -> Tensor:
    """Joins noisy images (B, C, H, W) and the channels of the condition, if there is one, into the network's input."""
    return noisy if condition is None else torch.cat([noisy, condition], dim=1)


def noise_prediction_loss(
    unet: nn.Module,
    scheduler: SchedulerMixin,
    clean: Tensor,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    class_labels: Tensor | None = None,
    min_snr_gamma: float | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """L_simple of DDPM (Ho et al. 2020, eq. 14), for any of the three targets, optionally weighted.

    Args:
        unet: called as `unet(noisy, timesteps, class_labels, head="noise").sample`.
        scheduler: a diffusers `DDPMScheduler`.
        clean: images in [-1, 1], (B, C, H, W).
        noise: standard normal, (B, C, H, W); None draws it.
        timesteps: int64 (B,), from 0 to `num_train_timesteps - 1`; None draws them uniformly.
        class_labels: class indices (B,), or None.
        min_snr_gamma: the gamma of min-SNR weighting; None weights all timesteps equally. If the last timestep of the
            scheduler is pure noise, from which sampling starts, no weight falls below 1 in clean-image space.
        condition: channels that the network sees after those of the noisy image, (B, K, H, W); None for none.

    Returns:
        The mean over batch and pixels, a float32 scalar; 1 for a network that predicts zero noise.
    """
    clean = clean.float()  # noise is added in float32, whatever the network's precision
    noise = torch.randn_like(clean) if noise is None else noise.float()
    if timesteps is None:
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, clean.shape[:1], device=clean.device)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = unet(beside(noisy, condition), timesteps, class_labels, head="noise").sample
    return prediction_loss(scheduler, predicted, clean, noise, timesteps, min_snr_gamma)


def prediction_loss(
    scheduler: SchedulerMixin,
    predicted: Tensor,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """The loss of `noise_prediction_loss` for a given prediction, (B, C, H, W); the other arguments are the same."""
    target = prediction_target(scheduler, clean, noise, timesteps)
    loss = (predicted.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    if min_snr_gamma is not None:
        snr, floor = signal_to_noise(scheduler, timesteps), float(scheduler.config.get("rescale_betas_zero_snr", False))
        loss = loss * min_snr_weight(snr, min_snr_gamma, scheduler.config.prediction_type, floor)
    return loss.mean()
