"""Distribution matching of Gaussians, where the gradient of the divergence has a closed form."""

import pytest
import torch
from torch import nn

from tests.support.tiny import network
from unet_diffusion import UNetOutput
from unet_diffusion.diffusion.consistency import consistency_function
from unet_diffusion.diffusion.distillation import on_images, signal_and_noise
from unet_diffusion.diffusion.distribution_matching import (
    GeneratorAndCritic,
    between_ends,
    matching_loss,
    sampled_starts,
)
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import DiffusionConfig

SCHEDULER = DiffusionConfig(zero_terminal_snr=True).make_scheduler()


def clean_mean(noisy, timesteps, mean, std):
    """E[x0 | x] of pixels with N(mean, std^2): what a perfect network sees."""
    alpha, sigma = (on_images(each, torch.ones_like(noisy)) for each in signal_and_noise(SCHEDULER, timesteps))
    return mean + std**2 * alpha * (noisy - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def test_the_gradient_moves_a_gaussian_to_that_of_the_data():
    """d KL(N(m, s^2) || N(m', s'^2)) / dm at a noise level is (m - m') alpha^2 / (alpha^2 s'^2 + sigma^2) for s = s'.

    In the clean image, E[x0 | x] of one less that of the other is (m - m') sigma^2 / (alpha^2 s^2 + sigma^2), in the
    same direction; the weight divides it by the mean distance from what the teacher sees.
    """
    mean, data, std, count = 0.5, -0.2, 0.4, 20_000
    generated = (mean + std * torch.randn(count, 1, 1, 4, generator=keyed_generator(0, "x"))).requires_grad_()
    timesteps = torch.full((count,), 500)
    noise = torch.randn(generated.shape, generator=keyed_generator(0, "noise"))
    noised = SCHEDULER.add_noise(generated.detach(), noise, timesteps)
    critic, teacher = (clean_mean(noised, timesteps, m, std) for m in (mean, data))
    matching_loss(generated, critic, teacher).backward()
    alpha, sigma = (each[0].item() for each in signal_and_noise(SCHEDULER, timesteps))
    offset = (mean - data) * sigma**2 / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(critic - teacher, torch.full_like(critic, offset), rtol=1e-4, atol=1e-5)
    weight = 1 / (generated.detach() - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(generated.grad, offset * weight.expand_as(critic) / critic.numel(), rtol=1e-3, atol=0)
    assert (generated.grad > 0).all()  # a step against it lowers the mean, towards that of the data
    generated.grad = None
    matching_loss(generated, teacher, teacher).backward()
    assert generated.grad.abs().max() == 0  # images like the data stay


def test_the_critic_sees_the_generated_images_and_gives_the_generator_no_gradient():
    pair = GeneratorAndCritic(network(in_channels=1, out_channels=1), SCHEDULER)
    nn.init.normal_(pair.generator.noise_head.weight)
    noisy, noise = torch.randn(2, 2, 1, 8, 8, generator=keyed_generator(0, "noise"))
    timesteps, later = torch.tensor([999, 499]), torch.tensor([300, 600])
    generated, predicted = pair(noisy, timesteps, noise, later)
    with torch.no_grad():
        expected = consistency_function(
            SCHEDULER, noisy, timesteps, pair.generator(noisy, timesteps, head="noise").sample
        )
        seen = pair.critic(SCHEDULER.add_noise(expected, noise, later), later, head="noise").sample
    torch.testing.assert_close(generated, expected)
    torch.testing.assert_close(predicted, seen)
    predicted.square().mean().backward()
    assert all(p.grad is None for p in pair.generator.parameters())
    assert all(p.grad is not None for p in pair.critic.noise_head.parameters())
    names = {name.split(".")[0] for name, _ in pair.named_parameters()}
    assert names == {"generator", "critic"} and pair.config is pair.generator.config


def test_later_steps_start_where_the_sampler_starts_them():
    """Each image as `LCMScheduler` leads it to its own timestep, with the same noise."""
    unet = network(in_channels=1, out_channels=1).eval()
    nn.init.normal_(unet.noise_head.weight)
    noise, *more = torch.randn(4, 4, 1, 8, 8, generator=keyed_generator(0, "noise"))
    paths = [[999], [999, 499], [999, 666, 333], [999, 749, 499, 249]]
    found = sampled_starts(unet, SCHEDULER, noise, paths, iter(more).__next__)
    for image, path, end in zip(range(4), paths, found):
        lcm = sampler("lcm", SCHEDULER)
        lcm.set_timesteps(timesteps=[*path, 0])
        x = noise[image : image + 1]
        for step, now in enumerate(path[:-1]):
            with torch.no_grad():
                predicted = unet(x, now, head="noise").sample
            _, clean = lcm.step(predicted, now, x, return_dict=False)
            x = SCHEDULER.add_noise(clean, more[step][image : image + 1], torch.tensor([path[step + 1]]))
        torch.testing.assert_close(end, x[0], rtol=1e-4, atol=1e-4)
    assert not found.requires_grad and torch.equal(found[0], noise[0])


def test_the_condition_and_the_classes_reach_both_networks():
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def forward(self, sample, timesteps, class_labels, head):
            self.seen.append((sample[:, 1:], class_labels))
            return UNetOutput(sample=sample[:, :1])

    pair = GeneratorAndCritic(Seeing(), SCHEDULER)

    def noisy_again():
        return torch.randn(2, 1, 4, 4)

    condition, classes = torch.rand(2, 1, 4, 4), torch.tensor([1, 0])
    pair(
        *torch.randn(1, 2, 1, 4, 4),
        torch.tensor([999, 499]),
        torch.randn(2, 1, 4, 4),
        torch.tensor([5, 6]),
        classes,
        condition,
    )
    sampled_starts(pair.generator, SCHEDULER, torch.randn(2, 1, 4, 4), [[9], [9, 4]], noisy_again, classes, condition)
    assert torch.equal(pair.generator.seen.pop()[0], condition)
    for part in (pair.generator, pair.critic):
        ((seen, labels),) = part.seen
        assert torch.equal(seen, condition) and labels is classes


def test_the_timesteps_keep_away_from_the_ends():
    drawn = between_ends(1000, [keyed_generator(0, i) for i in range(2000)])
    assert drawn.min() >= 20 and drawn.max() < 980 and drawn.float().mean() == pytest.approx(500, abs=25)
    assert torch.equal(between_ends(1000, [keyed_generator(0, 3)]), drawn[3:4])
    assert between_ends(2, [keyed_generator(0, 3)]).item() in (0, 1)
