import torch
from diffusers.training_utils import EMAModel

from unet_diffusion.training.moving_average import MovingAverage


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4), requires_grad=False)]


def test_it_is_the_average_of_diffusers():
    values = parameters()
    own, theirs = (kind(values, decay=0.7, foreach=True) for kind in (MovingAverage, EMAModel))
    for _ in range(30):  # from the 21st on, the decay is 0.7
        torch.nn.init.normal_(values[0])
        own.step_unless(torch.tensor(False), values)
        theirs.step(values)
    for a, b in zip(own.shadow_params, theirs.shadow_params):
        torch.testing.assert_close(a, b)
    assert own.optimization_step == theirs.optimization_step == 30


def test_a_lost_step_leaves_it_as_it_is():
    values = parameters()
    average = MovingAverage(values, decay=0.7, foreach=True)
    before = [value.clone() for value in average.shadow_params]
    torch.nn.init.normal_(values[0])
    average.step_unless(torch.tensor(True), values)
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, before))
    assert average.optimization_step == 0
