"""Every scheduler of diffusers against the one case that has a closed form: Gaussian data and the exact predictor.

Data N(m, s^2), independent per pixel, noised to x = a x0 + b e. The best prediction of the clean value is

    E[x0 | x] = m + a s^2 / (a^2 s^2 + b^2) (x - a m),

noise, velocity and flow follow from it linearly, and the samples of a right scheduler are N(m, s^2) again. Consistency
models predict the end of the probability-flow trajectory instead, m + s (x - a m) / sqrt(a^2 s^2 + b^2).

Run this file to print the table of the documentation.
"""

import inspect
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ScoreSdeVePipeline, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from unet_diffusion import UNetOutput
from unet_diffusion.pipelines import ImageGenerationPipeline

MEAN, STD = 0.2, 0.5
PICTURES, SIDE = 4, 64
SAMPLES = PICTURES * SIDE**2  # 16384 independent pixels
# Four standard errors of the sample mean and of the sample standard deviation of a Gaussian, plus 2 % of s for the
# finite number of steps: a scheduler used wrongly (input not scaled, noise not scaled, wrong prediction) is off by more.
SOLVER_ERROR = 0.02 * STD
MEAN_TOLERANCE = 4 * STD / SAMPLES**0.5 + SOLVER_ERROR
STD_TOLERANCE = 4 * STD / (2 * SAMPLES) ** 0.5 + SOLVER_ERROR


class GaussianPredictor(ModelMixin, ConfigMixin):
    """The exact network for N(MEAN, STD^2), in the units that a family of schedulers gives it.

    Args:
        family: how a timestep becomes the data scale a and the noise scale b, one of the methods below.
        prediction_type: what is returned.
        endpoint: whether the clean value is that of a consistency model.
        sigma_data: of schedulers that precondition the network.
        alphas_cumprod: the schedule of family "vp".
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        prediction_type: str = "epsilon",
        endpoint: bool = False,
        sigma_data: float = 0.5,
        alphas_cumprod: tuple[float, ...] = (),
        sample_size: int = SIDE,
        in_channels: int = 1,
        out_channels: int = 1,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        self.scales = getattr(self, family)
        alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float64)
        self.log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod))
        self.parameter = torch.nn.Parameter(torch.zeros(()))  # gives the pipeline a dtype and a device

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True, head: Any = None):
        assert torch.isfinite(sample).all()
        a, b = self.scales(torch.as_tensor(timestep, dtype=torch.float64))
        x = sample.double()
        variance = a**2 * STD**2 + b**2
        gain = STD / variance.sqrt() if self.config.endpoint else a * STD**2 / variance
        clean = MEAN + gain * (x - a * MEAN)
        noise = (x - a * clean) / b
        output = {
            "epsilon": noise,
            "v_prediction": a * noise - b * clean,
            "sample": clean,
            "flow": noise - clean,
            "reverse_flow": clean - noise,
            "preconditioned": self.invert_preconditioning(clean, x, a, b),
        }[self.config.prediction_type]
        return UNetOutput(sample=output.float())

    def invert_preconditioning(self, clean: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """F of D(x) = c_skip x + c_out F (Karras et al. 2022, table 1); x comes scaled by a = c_in."""
        sigma, sigma_data = b / a, self.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        return (clean - c_skip * x / a) / c_out

    def vp(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a^2 + b^2 = 1 with a^2 = alphas_cumprod[t]; between timesteps the logarithm of the SNR is interpolated."""
        last = len(self.log_snr) - 1
        below = timestep.floor().clamp(0, last).long()
        above = (below + 1).clamp(max=last)
        log_snr = torch.lerp(self.log_snr[below], self.log_snr[above], timestep - below)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def edm(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep log(sigma) / 4, input scaled by c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return self.input_scale((4 * timestep).exp())

    def cosine(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep 2 atan(sigma) / pi, input scaled by c_in."""
        return self.input_scale((timestep * math.pi / 2).tan())

    def karras_consistency(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep 250 log(sigma), input scaled by c_in (Song et al. 2023, appendix C)."""
        return self.input_scale((timestep / 250).exp())

    def input_scale(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        c_in = 1 / (sigma**2 + self.config.sigma_data**2).sqrt()
        return c_in, c_in * sigma

    def angle(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a = cos, b = sin of a quarter turn times the timestep."""
        return (timestep * math.pi / 2).cos(), (timestep * math.pi / 2).sin()

    def flow(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """b = timestep / 1000, a = 1 - b."""
        return 1 - timestep / 1000, timestep / 1000

    def reverse_flow(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """a = timestep, b = 1 - a."""
        return timestep, 1 - timestep
