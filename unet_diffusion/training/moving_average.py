"""The moving average of a network's weights."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class MovingAverage(EMAModel):
    """The `EMAModel` of diffusers, which ignores lost steps without waiting for the device."""

    optimization_step: int | Tensor

    @torch.no_grad()
    def step_unless(self, lost: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Takes a step as `EMAModel.step` does, unless `lost`, bool (), on the device, is true.

        Lost steps are not counted. The count, `optimization_step`, is on the device, and so is the decay, which follows
        from it: n / (n + 9) in the n-th step that counts, but at most `decay`. The first step copies the weights.
        """
        self.optimization_step = self.optimization_step + (~lost).long()
        shares = (9 / (self.optimization_step + 9)).clamp(min=1 - self.decay)  # 1 minus the decay
        shares = torch.where(self.optimization_step > 1, shares, 1.0) * (~lost).float()
        changes = torch._foreach_sub(list(parameters), self.shadow_params)
        torch._foreach_mul_(changes, shares)
        torch._foreach_add_(self.shadow_params, changes)
