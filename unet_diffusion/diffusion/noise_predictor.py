"""A network that returns noise, for pipelines of diffusers that treat every output as noise."""

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from unet_diffusion.checks import require
from unet_diffusion.diffusion.converted import ConvertedNetwork
from unet_diffusion.diffusion.sampling import ends_at_zero_signal, noise_settings
from unet_diffusion.unet import UNet, UNetOutput


class NoisePredictor(ConvertedNetwork):
    """A trained network whose output is turned into noise, for pipelines and schedulers that know no other prediction.

    The noisy image is x = alpha x0 + sigma e, with alpha^2 = alphas_cumprod[t] and sigma^2 = 1 - alpha^2. The noise is
    e = sigma x + alpha v for the velocity v = alpha e - sigma x0 (Salimans & Ho 2022, appendix D), and
    e = (x - alpha x0) / sigma for the clean image.

    It shares the weights of the network, and cannot be saved: save the pipeline of the run.

    Examples:
        >>> import torch
        >>> from diffusers import RePaintPipeline, RePaintScheduler
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.diffusion.noise_predictor import NoisePredictor
        >>> from unet_diffusion.tasks.config import DiffusionConfig

        >>> unet, scheduler = UNet.from_preset("tiny"), DiffusionConfig().make_scheduler()
        >>> noise = RePaintScheduler.from_config(scheduler.config)
        >>> pipe = RePaintPipeline(NoisePredictor(unet, scheduler), noise)

    Args:
        unet: a network with a noise head.
        scheduler: the scheduler of the run; it says what the network predicts, and which noise level a timestep has.

    Raises:
        ValueError: the network has no noise head; or the scheduler has no betas, takes the prediction for something
            else, or ends at zero signal, by which such pipelines would divide.
    """

    def __init__(self, unet: UNet, scheduler: SchedulerMixin) -> None:
        settings = noise_settings(scheduler)
        if settings is None:
            raise ValueError(f"{type(scheduler).__name__} has no betas; give the scheduler of the run.")
        super().__init__(unet, scheduler)
        require(unet.config.out_channels is not None, "out_channels", None, "the network needs a noise head")
        if ends_at_zero_signal(scheduler):
            raise ValueError(
                "the noise schedule ends at zero signal (rescale_betas_zero_snr), which pipelines for noise prediction "
                "divide by; sample it with ImageGenerationPipeline."
            )
        self.prediction_type = settings["prediction_type"]
        self.config = FrozenDict({**unet.config, "prediction_type": "epsilon"})
        signal = scheduler.alphas_cumprod.double()
        self.alphas, self.sigmas = signal.sqrt().float(), (1 - signal).sqrt().float()  # no buffers: always float32

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Any, ...]:
        """Returns the noise (B, C, H, W) in noisy images of this shape, at integer timesteps of shape (), (1,) or (B,).

        Raises:
            ValueError: a timestep lies between those of the schedule.
        """
        steps = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1, 1, 1)
        if steps.is_floating_point() and (steps != steps.round()).any():
            raise ValueError(f"timestep is {timestep}, but must be one of the schedule, an integer; use its scheduler.")
        predicted = self.unet(sample, timestep, class_labels, head="noise").sample
        alpha, sigma = (table.to(sample.device)[steps.long()] for table in (self.alphas, self.sigmas))
        noise = predicted
        if self.prediction_type == "v_prediction":
            noise = (sigma * sample + alpha * predicted).to(predicted.dtype)
        elif self.prediction_type == "sample":
            noise = ((sample - alpha * predicted) / sigma).to(predicted.dtype)
        return UNetOutput(sample=noise) if return_dict else (noise,)
