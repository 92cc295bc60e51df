"""A network tuned for a few steps, in the form of the consistency models of diffusers."""

from typing import Any

import torch
from diffusers import CMStochasticIterativeScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from unet_diffusion.diffusion.config import check_tunable
from unet_diffusion.diffusion.consistency import HIGHEST, NoiseLevels, consistency_function
from unet_diffusion.diffusion.converted import ConvertedNetwork
from unet_diffusion.unet import UNet, UNetOutput


class ConsistencyPredictor(ConvertedNetwork):
    """A tuned network for `ConsistencyModelPipeline`, whose samples and times are those of Song et al. 2023.

    Its samples have the noise level s = sigma / alpha, and its times are 250 ln s (`sigma_to_t` of the scheduler). The
    network gets the nearest timestep that it knows; from `HIGHEST` on this is the last one. The clean image f(x, s) is
    returned as the F of f = c_skip x + c_out F, from which the scheduler computes f again (appendix C of that paper).

    It shares the weights of the network, and cannot be saved: save the pipeline of the run.

    Examples:
        >>> from diffusers import ConsistencyModelPipeline
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.diffusion.consistency_predictor import ConsistencyPredictor
        >>> from unet_diffusion.tasks.config import DiffusionConfig

        >>> unet, scheduler = UNet.from_preset("tiny"), DiffusionConfig().make_scheduler()
        >>> predictor = ConsistencyPredictor(unet, scheduler)
        >>> pipe = ConsistencyModelPipeline(predictor, predictor.make_scheduler())

    Args:
        unet: the network of a run of `tune-few-steps`.
        scheduler: the scheduler of the run.

    Raises:
        ValueError: the network predicts noise, or the scheduler interprets the prediction differently.
    """

    def __init__(self, unet: UNet, scheduler: SchedulerMixin) -> None:
        super().__init__(unet, scheduler)
        check_tunable(scheduler.config.prediction_type)
        self.scheduler, self.levels = scheduler, NoiseLevels(scheduler)
        self.config = unet.config

    def make_scheduler(self) -> CMStochasticIterativeScheduler:
        """Returns the scheduler for this network: its noise levels, and data of deviation 1."""
        lowest, highest = self.levels.levels[0].item(), self.levels.levels[-1].item()
        return CMStochasticIterativeScheduler(sigma_min=lowest, sigma_max=highest, sigma_data=1.0)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Any, ...]:
        """Returns F (B, C, H, W) for samples (B, C, H, W) divided by sqrt(s^2 + 1), all at the same time 250 ln s."""
        level = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").div(250).exp().reshape(1)
        known = self.levels.nearest(level) if level < 0.999 * HIGHEST else torch.tensor([self.levels.last])
        steps = known.expand(len(sample)).to(sample.device)
        predicted = self.unet(sample, steps, class_labels, head="noise").sample
        clean = consistency_function(self.scheduler, sample, steps, predicted)
        spread, above = (level.square() + 1).sqrt(), level - self.levels.levels[0]
        skip, out = 1 / (above.square() + 1), above.clamp(min=1e-6) / spread
        found = (clean - (skip * spread).item() * sample) / out.item()
        found = found.to(predicted.dtype)
        return UNetOutput(sample=found) if return_dict else (found,)
