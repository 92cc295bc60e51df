"""The memory layout of maps, as PyTorch's layers leave it."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def group_norm_like_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes GroupNorm copy its input to a contiguous map and return such a map, as PyTorch up to 2.13 does on CUDA."""
    compute = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: compute(x.contiguous(), *rest))


def count_other_layouts(network: nn.Module) -> Counter[str]:
    """Counts, from now on, the maps whose channels are not last, by the kind of layer that returned them."""
    found: Counter[str] = Counter()

    def hook(module: nn.Module, inputs: tuple, output: object) -> None:
        for each in output if isinstance(output, tuple) else (output,):
            if isinstance(each, torch.Tensor) and each.ndim == 4:
                found[type(module).__name__] += not each.is_contiguous(memory_format=torch.channels_last)

    for module in network.modules():
        module.register_forward_hook(hook)
    return found
