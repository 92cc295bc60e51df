"""A trained network whose output other code expects in another form."""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from unet_diffusion.diffusion.sampling import check_noise
from unet_diffusion.unet import UNet


class ConvertedNetwork(nn.Module):
    """The base class of such networks. It holds the weights of another network, and checks that network's scheduler.

    Raises:
        ValueError: the scheduler takes the prediction for something else than the network was trained to predict.
    """

    def __init__(self, unet: UNet, scheduler: SchedulerMixin) -> None:
        super().__init__()
        check_noise(scheduler, None, unet.config.get("prediction_type"))
        self.unet = unet

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.unet.device
