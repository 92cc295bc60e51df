"""Maps keep their channels last on a GPU, where PyTorch's own GroupNorm returned contiguous ones up to 2.13."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.support import tiny
from tests.support.layouts import count_other_layouts
from unet_diffusion import UNet
from unet_diffusion.network import blocks

SIZE = 128  # pixels; maps so large that copies cost more than starting them


def network(**config) -> UNet:
    channels = {"channels": (32, 64), "attention": (False, True), "head_channels": 32}
    return tiny.network(in_channels=3, out_channels=3, **channels, **config)


def step(unet: UNet, images: Tensor) -> Tensor:
    loss = unet(images, 3).sample.square().mean()
    loss.backward()
    return loss.detach()


def copies(compute: Callable[[], object]) -> int:
    """Counts the tensors that are copied to another layout or type, in the forward and in the backward pass."""
    compute()  # chooses kernels
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        compute()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.key == "aten::copy_")


def seconds(compute: Callable[[], object], repetitions: int = 20) -> float:
    for _ in range(3):
        compute()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repetitions):
        compute()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repetitions


@pytest.mark.parametrize("block", ["residual", "plain"])
def test_maps_keep_their_channels_last_and_values_are_those_of_a_cpu(block, device):
    unet, images = network(block=block).train(), torch.rand(2, 3, 33, 30)
    expected = step(unet, images)
    gradients = [parameter.grad.clone() for parameter in unet.parameters()]
    unet.zero_grad()
    unet.to(device, memory_format=torch.channels_last)
    others = count_other_layouts(unet)
    found = step(unet, images.to(device).contiguous(memory_format=torch.channels_last))
    assert others and not others.total(), others
    torch.testing.assert_close(found.cpu(), expected, rtol=0.01, atol=0)
    for parameter, gradient in zip(unet.parameters(), gradients):
        torch.testing.assert_close(parameter.grad.cpu().contiguous(), gradient, rtol=0.05, atol=1e-4)


def test_fewer_maps_are_copied_than_with_the_layouts_of_pytorch(device, monkeypatch, record_property):
    """Also records how much faster a step is, which depends on the GPU and on PyTorch."""
    images = torch.rand(8, 3, SIZE, SIZE, device=device).contiguous(memory_format=torch.channels_last)
    ours = network().train().to(device, memory_format=torch.channels_last)
    kept = copies(lambda: step(ours, images)), seconds(lambda: step(ours, images))
    monkeypatch.setattr(blocks.GroupNorm, "forward", nn.GroupNorm.forward)
    monkeypatch.setattr(blocks.ScaleShift, "after", lambda self, norm, x, embedding: self(norm(x), embedding))
    theirs = network().train().to(device, memory_format=torch.channels_last)
    converted = copies(lambda: step(theirs, images)), seconds(lambda: step(theirs, images))
    record_property("copies", f"{kept[0]} instead of {converted[0]}")
    record_property("time of a step", f"{kept[1] / converted[1]:.2f} of that with PyTorch's layouts")
    print(f"copies: {kept[0]} instead of {converted[0]}; time of a step: {kept[1] / converted[1]:.2f}")
    keeps = nn.GroupNorm(2, 4, device=device)(
        torch.rand(2, 4, 8, 8, device=device).to(memory_format=torch.channels_last)
    )
    if not keeps.is_contiguous(memory_format=torch.channels_last):  # a later PyTorch may keep the layout itself
        assert kept[0] < converted[0]
