"""The moving average of a network's weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class MovingAverage(EMAModel):
    """The `EMAModel` of diffusers, which ignores lost steps without waiting for the device."""

    @torch.no_grad()
    def step_unless(self, lost: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Takes a step as `EMAModel.step` does, unless `lost`, bool (), on the device, is true.

        The step is counted in either case; subtract lost steps from `optimization_step` once they are known.
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        shares = (1 - self.cur_decay_value) * (~lost).float()
        changes = torch._foreach_sub(list(parameters), self.shadow_params)
        torch._foreach_mul_(changes, shares)
        torch._foreach_add_(self.shadow_params, changes)
