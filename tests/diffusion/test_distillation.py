"""Distillation against the solver of diffusers, and against Gaussian data, whose trajectories have a closed form."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from torch import nn

from tests.support.tiny import network
from unet_diffusion import UNetOutput
from unet_diffusion.diffusion.distillation import (
    EVALUATIONS,
    StartingPoints,
    on_images,
    signal_and_noise,
    trajectory_end,
)
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import DiffusionConfig

MEAN, STD = 0.2, 0.5  # of the pixels, which are independent
SCHEDULES = [
    {},
    {"beta_schedule": "linear"},
    {"zero_terminal_snr": True},
    {"prediction_type": "sample", "zero_terminal_snr": True},
]


def scheduler_of(**settings):
    return DiffusionConfig(**settings).make_scheduler()


class GaussianMean(nn.Module):
    """A perfect network for N(MEAN, STD^2): E[x0 | x] = m + d^2 alpha (x - alpha m) / (alpha^2 d^2 + sigma^2)."""

    def __init__(self, scheduler) -> None:
        super().__init__()
        self.scheduler, self.calls = scheduler, []

    def forward(self, sample, timesteps, class_labels=None, head="noise"):
        self.calls.append((timesteps, class_labels))
        alpha, sigma = (
            on_images(each, torch.ones_like(sample)) for each in signal_and_noise(self.scheduler, timesteps)
        )
        clean = MEAN + STD**2 * alpha * (sample - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        return UNetOutput(sample=(alpha * sample - clean) / sigma if is_velocity else clean)


def true_end(scheduler, noisy, timesteps):
    """The clean end: the normalised distance from the mean is kept, (x - alpha m) / sqrt(alpha^2 d^2 + sigma^2)."""
    alpha, sigma = (on_images(each, torch.ones_like(noisy)) for each in signal_and_noise(scheduler, timesteps))
    return MEAN + STD * (noisy - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


@pytest.mark.parametrize("settings", SCHEDULES)
def test_many_evaluations_reach_the_closed_form_of_the_trajectory_from_every_timestep(settings):
    scheduler = scheduler_of(**settings)
    timesteps = torch.tensor([999, 750, 400, 100, 3])
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = true_end(scheduler, noisy, timesteps)
    errors = [
        (trajectory_end(GaussianMean(scheduler), scheduler, noisy, timesteps, evaluations=n) - exact)
        .abs()
        .amax((1, 2, 3))
        for n in (EVALUATIONS, 250)
    ]
    assert (
        errors[0].max() < 0.5 and errors[1].max() < 0.02
    )  # evenly spread timesteps are coarse at the end of linear betas


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_timestep_that_comes_again_changes_nothing_even_at_zero_signal(prediction_type):
    """Eight evaluations of two timesteps: 1, 1, 1, 1, 0, 0, 0, 0."""
    scheduler = scheduler_of(num_train_timesteps=2, zero_terminal_snr=True, prediction_type=prediction_type)
    noisy = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    many, once = (
        trajectory_end(GaussianMean(scheduler), scheduler, noisy, torch.tensor([1]), evaluations=n) for n in (8, 2)
    )
    assert once.isfinite().all()
    torch.testing.assert_close(many, once)


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "sample", "beta_schedule": "linear"}])
def test_each_image_takes_the_steps_of_diffusers_from_its_own_timestep(settings):
    scheduler, unet = scheduler_of(**settings), network(in_channels=3, out_channels=3).eval()
    timesteps = torch.tensor([999, 500, 40])
    noisy = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = trajectory_end(unet, scheduler, noisy, timesteps)
    for image, timestep, end in zip(noisy, timesteps.tolist(), found):
        theirs = sampler("dpm-solver++", scheduler)
        assert isinstance(theirs, DPMSolverMultistepScheduler)
        theirs.set_timesteps(timesteps=[round(timestep * (1 - done / EVALUATIONS)) for done in range(EVALUATIONS)])
        x = image[None]
        for now in theirs.timesteps:
            with torch.no_grad():
                x = theirs.step(unet(x, now, head="noise").sample, now, x).prev_sample
        torch.testing.assert_close(end, x[0], rtol=1e-3, atol=1e-4)


def test_classes_and_the_condition_are_seen_in_every_evaluation():
    scheduler = scheduler_of()

    class Seeing(GaussianMean):
        def forward(self, sample, timesteps, class_labels=None, head="noise"):
            seen.append(sample[:, 1:])
            return super().forward(sample[:, :1], timesteps, class_labels, head)

    seen: list = []
    unet, condition, classes = Seeing(scheduler), torch.rand(2, 1, 4, 4), torch.tensor([3, 1])
    ends = trajectory_end(unet, scheduler, torch.randn(2, 1, 4, 4), torch.tensor([999, 300]), classes, condition)
    assert ends.shape == (2, 1, 4, 4) and not ends.requires_grad
    assert len(seen) == EVALUATIONS and all(torch.equal(each, condition) for each in seen)
    assert all(labels is classes for _, labels in unet.calls)
    assert torch.stack([t for t, _ in unet.calls])[:, 0].tolist() == [999, 874, 749, 624, 500, 375, 250, 125]


def test_the_timesteps_are_those_of_one_to_four_steps_of_lcm_each_number_as_often():
    scheduler = scheduler_of()
    points = StartingPoints(scheduler)
    assert [len(each) for each in points.by_steps] == [1, 2, 3, 4]
    for steps, timesteps in enumerate(points.by_steps, start=1):
        lcm = LCMScheduler.from_config(scheduler.config, original_inference_steps=1000)
        lcm.set_timesteps(steps)
        assert timesteps == lcm.timesteps.tolist()
    count = 3000
    paths = points.draw([keyed_generator(0, i) for i in range(count)])
    assert all(path in (each[: len(path)] for each in points.by_steps) for path in paths)
    ends = torch.tensor([path[-1] for path in paths])
    expected = {999: (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, points.by_steps[1][1]: (1 / 2 + 1 / 4) / 4}
    for timestep, share in expected.items():
        error = (share * (1 - share) / count) ** 0.5
        assert (ends == timestep).float().mean().item() == pytest.approx(share, abs=4 * error)
    assert points.draw([keyed_generator(0, 7)]) == paths[7:8]  # for any other images in the batch
    assert len(StartingPoints(scheduler_of(num_train_timesteps=2)).by_steps) == 2
