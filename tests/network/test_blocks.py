"""The convolution blocks: operations that training computes in another way than inference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layouts import group_norm_like_cuda
from unet_diffusion.network.blocks import GroupNorm, ScaleShift, norm_scale_shift

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("always", [False, True])  # in one pass, also where a CPU calls the layers
def test_normalisation_and_condition_in_one_pass_equal_the_two_layers(channels_last, always):
    torch.manual_seed(0)
    norm, condition = nn.GroupNorm(3, 6).double(), ScaleShift(6, 5).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, embedding = torch.randn(2, 6, 7, 4).double(), torch.randn(2, 5).double()
    x = x.contiguous(memory_format=LAYOUTS[channels_last])
    weight_of_output = torch.randn_like(x)

    def outputs_and_gradients(compute):
        layers = copy.deepcopy(nn.ModuleList([condition, norm]))
        inputs = [tensor.clone().requires_grad_() for tensor in (x, embedding)]
        output = compute(*layers, *inputs)
        tensors = [*inputs, *layers.parameters()]
        return [output, *torch.autograd.grad((output * weight_of_output).sum(), tensors)]

    def in_one_pass(condition, norm, x, e):
        return norm_scale_shift(norm, x, *condition.linear(e).chunk(2, dim=1))

    fused = outputs_and_gradients(in_one_pass if always else lambda condition, norm, x, e: condition.after(norm, x, e))
    assert fused[0].stride() == x.stride()
    apart = outputs_and_gradients(lambda condition, norm, x, e: condition(norm(x), e))
    for one, other in zip(fused, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta tensors stand for those of an accelerator
def test_training_keeps_one_map_less_for_the_backward_pass(device, channels_last):
    norm, condition = GroupNorm(2, 4).to(device), ScaleShift(4, 3).to(device)
    x, embedding = torch.randn(2, 4, 50, 50, requires_grad=True), torch.randn(2, 3)
    x, embedding = x.to(device).contiguous(memory_format=LAYOUTS[channels_last]), embedding.to(device)

    def kept(compute) -> int:
        maps = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: maps.add(tensor.untyped_storage()._cdata) if tensor.numel() == x.numel() else None,
            lambda _: None,
        ):
            output = compute()
        return len(maps) if output.requires_grad else 0

    layers = device == "cpu" and channels_last
    assert kept(lambda: condition.after(norm, x, embedding)) == (2 if layers else 1)
    assert kept(lambda: condition(norm(x), embedding)) == 2


def test_hooks_of_layers_run_in_training_too():
    norm, condition = GroupNorm(2, 4), ScaleShift(4, 3)
    x, embedding, called = torch.randn(2, 4, 5, 5), torch.randn(2, 3), []
    expected = condition.after(norm, x, embedding)
    for module in (norm, condition):
        handle = module.register_forward_hook(lambda *_, module=module: called.append(module))
        torch.testing.assert_close(condition.after(norm, x, embedding), expected)
        assert called.pop() is module and not called
        handle.remove()


@pytest.mark.parametrize("offset", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the parameters; autocast leaves them float32
def test_group_norm_of_bfloat16_maps_on_a_cpu_is_exact_to_the_rounding_of_its_result(dtype, offset):
    """Without gradients, in both layouts, and for maps whose mean is far from zero."""
    norm = GroupNorm(4, 24).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (torch.randn(3, 24, 7, 9) * 3 + offset).bfloat16()
    exact = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    for layout in LAYOUTS.values():
        given = x.contiguous(memory_format=layout)
        with torch.no_grad():
            found = norm(given)
        assert (found.dtype, found.stride()) == (torch.bfloat16, given.stride())
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    assert norm(given).requires_grad  # with gradients it is PyTorch's


def test_group_norm_of_equal_values_is_zero_and_not_nan():
    values = torch.linspace(1, 50, 100).bfloat16()[:, None, None, None]
    with torch.no_grad():
        found = GroupNorm(1, 16)(values.expand(-1, 16, 17, 17).contiguous(memory_format=torch.channels_last))
    # The mean, float32, is off by a few units in the last place of 50, which is divided by the root of eps.
    torch.testing.assert_close(found.float(), torch.zeros_like(found).float(), rtol=0, atol=4 * 2**-18 / 1e-5**0.5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_group_norm_is_that_of_pytorch_in_both_layouts(channels_last, monkeypatch):
    """Bit for bit on a CPU; and if GroupNorm returns contiguous maps, as on CUDA, the layout is that of the input."""
    norm, theirs = GroupNorm(3, 6).double(), nn.GroupNorm(3, 6).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(norm.state_dict())  # the same names
    x = torch.randn(2, 6, 3, 2).double().contiguous(memory_format=LAYOUTS[channels_last]).requires_grad_()
    assert torch.equal(norm(x), theirs(x)) and norm(x).stride() == x.stride()
    groups = x.detach().view(2, 3, 2, 3, 2)  # Wu & He 2018, equations 1 and 2, written out
    mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
    expected = ((groups - mean) / (variance + norm.eps).sqrt()).view(2, 6, 3, 2)
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    for contiguous in (False, True):
        if contiguous:
            group_norm_like_cuda(monkeypatch)
            assert theirs(x).is_contiguous()
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
        assert norm(x).stride() == x.stride()
        torch.autograd.gradcheck(norm, x)
