"""The convolution blocks: operations that training computes in another way than inference."""

import copy

import pytest
import torch
from torch import nn

from unet_diffusion.network.blocks import ScaleShift


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation_and_condition_in_one_pass_equal_the_two_layers(channels_last):
    torch.manual_seed(0)
    norm, condition = nn.GroupNorm(3, 6).double(), ScaleShift(6, 5).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, embedding = torch.randn(2, 6, 7, 4).double(), torch.randn(2, 5).double()
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight_of_output = torch.randn_like(x)

    def outputs_and_gradients(compute):
        layers = copy.deepcopy(nn.ModuleList([condition, norm]))
        inputs = [tensor.clone().requires_grad_() for tensor in (x, embedding)]
        output = compute(*layers, *inputs)
        tensors = [*inputs, *layers.parameters()]
        return [output, *torch.autograd.grad((output * weight_of_output).sum(), tensors)]

    fused = outputs_and_gradients(lambda condition, norm, x, e: condition.after(norm, x, e))
    apart = outputs_and_gradients(lambda condition, norm, x, e: condition(norm(x), e))
    for one, other in zip(fused, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_training_keeps_one_map_less_for_the_backward_pass():
    norm, condition = nn.GroupNorm(2, 4), ScaleShift(4, 3)
    x, embedding = torch.randn(1, 4, 50, 50, requires_grad=True), torch.randn(1, 3)

    def kept(compute) -> int:
        maps = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: maps.add(tensor.data_ptr()) if tensor.numel() == x.numel() else None, lambda _: None
        ):
            output = compute()
        return len(maps) if output.requires_grad else 0

    assert kept(lambda: condition.after(norm, x, embedding)) == 1
    assert kept(lambda: condition(norm(x), embedding)) == 2
