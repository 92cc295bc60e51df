"""Consistency tuning against Gaussian data, for which the consistency function and its loss have closed forms.

Data N(m, d^2), independent per pixel. At the level s = sigma / alpha, y = x / alpha - m = (x0 - m) + s eps has the
variance d^2 + s^2, and the probability-flow trajectories keep y / sqrt(d^2 + s^2). So the clean end of the one through
x is f = m + g y with g(s) = d / sqrt(d^2 + s^2), and the velocity that stands for it is (alpha x - f) / sigma.
"""

import math

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, LCMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from unet_diffusion import UNetOutput
from unet_diffusion.diffusion.consistency import (
    CLEAN,
    FINEST,
    HUBER,
    LAST_SHARE,
    LOG_MEAN,
    NoiseLevels,
    consistency_function,
    consistency_loss,
    stage_step,
)
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import DiffusionConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2

MEAN, STD = 0.2, 0.5
SIDE = 128
SCHEDULES = [
    {},
    {"beta_schedule": "linear"},
    {"zero_terminal_snr": True},
    {"beta_schedule": "linear", "zero_terminal_snr": True, "num_train_timesteps": 10},
]


def scheduler_of(**settings):
    return DiffusionConfig(**settings).make_scheduler()


class GaussianEnds(ModelMixin, ConfigMixin):
    """The velocity that stands for the consistency function of N(MEAN, STD^2), with its deviation times `gain`."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, sample_size: int = SIDE, in_channels: int = 1, abar: list | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, class_labels=None, return_dict=True, head="noise"):
        abar = torch.tensor(self.config.abar)[torch.as_tensor(timestep).long()].reshape(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        end = MEAN + self.gain * STD * (sample - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        velocity = (alpha * sample - end) / sigma
        return UNetOutput(sample=velocity) if return_dict else (velocity,)


def gaussian_ends(scheduler) -> GaussianEnds:
    return GaussianEnds(abar=scheduler.alphas_cumprod.tolist())


@pytest.mark.parametrize("settings", SCHEDULES)
def test_r_is_before_t_and_nearest_to_the_formula(settings):
    scheduler = scheduler_of(**settings)
    levels = NoiseLevels(scheduler)
    timesteps = torch.arange(len(scheduler.alphas_cumprod))
    s = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt().clamp(max=80)
    table = torch.cat([torch.zeros(1, dtype=torch.float64), s])  # CLEAN, 0, 1, ...
    for stage in range(8):
        earlier = levels.earlier(timesteps, 2.0 ** -(stage + 1))
        assert (earlier < timesteps).all() and (earlier >= CLEAN).all()
        wanted = s * (1 - (1 + 8 / (1 + s.exp())) / 2 ** (stage + 1)).clamp(min=0)
        assert (earlier[wanted == 0] == CLEAN).all()
        limit = torch.where(s < 80, timesteps, (s < 80).sum())  # the first timestep whose level does not count as less
        best = torch.minimum((table[None] - wanted[:, None]).abs().argmin(dim=1) - 1, limit - 1)
        assert torch.equal(earlier, best)
        weights = levels.weights(timesteps, earlier, 2.0 ** -(stage + 1))
        expected = 2.0 ** -(stage + 1) / (s - table[earlier + 1])
        expected[-1] *= (1 + s[-1] ** 2).sqrt()
        torch.testing.assert_close(weights, expected.float())
        assert weights.isfinite().all() and (weights > 0).all()


def test_the_stages_end_where_the_paper_ends():
    """q = 2 in 8 stages, 4 in 4, 256 in one, of equal length."""
    for stages, q in ((8, 2), (4, 4), (1, 256)):
        found = [stage_step(step / 80, stages) for step in range(80)]
        assert found == pytest.approx([1 / q ** (step * stages // 80 + 1) for step in range(80)])
        assert stage_step(1.0, stages) == pytest.approx(1 / FINEST)


def test_levels_are_drawn_log_normal_and_the_last_timestep_explicitly():
    scheduler = scheduler_of(zero_terminal_snr=True)
    levels, count = NoiseLevels(scheduler), 2000
    drawn = levels.draw([keyed_generator(0, i) for i in range(count)])
    error = 4 * (0.25 / count) ** 0.5  # of a share
    assert (drawn == 999).float().mean() == pytest.approx(LAST_SHARE, abs=4 * (LAST_SHARE / count) ** 0.5)
    below = [levels.nearest(torch.tensor(math.exp(LOG_MEAN + 2.0 * z))) for z in (-1, 0, 1)]
    shares = [0.95 * share for share in (0.1587, 0.5, 0.8413)]
    assert [(drawn < t).float().mean().item() for t in below] == pytest.approx(shares, abs=error + 0.005)
    assert torch.equal(levels.draw([keyed_generator(0, 7)]), drawn[7:8])  # for any other images in the batch


@pytest.mark.parametrize("timestep", [200, 500, 800])
@pytest.mark.parametrize("step", [1 / 8, 1 / 64])
def test_the_loss_and_its_gradient_at_the_consistency_function_have_their_closed_form(timestep, step):
    """E d^2 = g_t^2 V_t + g_r^2 V_r - 2 g_t g_r (d^2 + s_t s_r), V = d^2 + s^2; 16,384 pixels give it to 2 %.

    The gradient by the gain, E (f_t - f_r) g_t y_t, is of second order in s_t - s_r: the function is where tuning ends.
    """
    scheduler = scheduler_of()
    levels, unet = NoiseLevels(scheduler), gaussian_ends(scheduler)
    t = torch.tensor([timestep])
    r = levels.earlier(t, step)
    s_t, s_r = (levels.levels[i].item() for i in (t, r))
    v_t, v_r = STD**2 + s_t**2, STD**2 + s_r**2
    g_t, g_r = STD / v_t**0.5, STD / v_r**0.5
    distance = (g_t**2 * v_t + g_r**2 * v_r - 2 * g_t * g_r * (STD**2 + s_t * s_r)) ** 0.5
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + STD * torch.randn(1, 1, SIDE, SIDE, generator=generator)
    noise = torch.randn(1, 1, SIDE, SIDE, generator=generator)
    loss = consistency_loss(unet, scheduler, levels, clean, noise, t, step)
    weight = step / (s_t - s_r)
    assert loss.item() / weight == pytest.approx((distance**2 + HUBER**2) ** 0.5 - HUBER, rel=0.04)
    loss.backward()
    slope = (g_t**2 * v_t - g_t * g_r * (STD**2 + s_t * s_r)) / distance  # the last factor is of the first order
    spread = g_t * v_t**0.5 / SIDE  # of the mean of products with f_t - f_r over the distance, of unit variance
    assert unet.gain.grad.item() / weight == pytest.approx(slope, abs=4 * spread)
    assert abs(slope) * distance < ((s_t - s_r) * g_t) ** 2


def test_the_gradient_flows_through_t_alone_and_the_clean_image_is_the_target_at_r_zero():
    scheduler = scheduler_of()
    levels, unet = NoiseLevels(scheduler), gaussian_ends(scheduler)
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    earlier = levels.earlier(timesteps, 1 / 8)
    assert earlier[0] == CLEAN and (earlier[1:] > 0).all()
    ends = []
    for which in (timesteps, earlier.clamp(min=0)):
        noisy = scheduler.add_noise(clean, noise, which)
        ends.append(consistency_function(scheduler, noisy, which, unet(noisy, which).sample))
    difference = ends[0] - torch.cat([clean[:1], ends[1][1:]]).detach()
    distances = (difference.square().mean(dim=(1, 2, 3)) + HUBER**2).sqrt() - HUBER
    expected = (levels.weights(timesteps, earlier, 1 / 8) * distances).mean()
    (gradient,) = torch.autograd.grad(expected, unet.gain)
    loss = consistency_loss(unet, scheduler, levels, clean, noise, timesteps, 1 / 8)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(unet.gain.grad, gradient)


def test_both_passes_drop_the_same_activations():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.dropped = nn.Dropout(0.5), []

        def forward(self, sample, timesteps, class_labels, head):
            self.dropped.append(self.dropout(torch.ones_like(sample)))
            return UNetOutput(sample=self.dropped[-1] * sample)

    scheduler, unet = scheduler_of(), Dropping().train()
    arguments = (scheduler, NoiseLevels(scheduler), *torch.randn(2, 2, 1, 8, 8), torch.tensor([500, 900]), 1 / 64)
    torch.manual_seed(0)
    values = []
    for _ in range(2):
        consistency_loss(unet, *arguments)
        values.append(torch.rand(()))
    first, second, third, fourth = unet.dropped
    assert torch.equal(first, second) and torch.equal(third, fourth)
    assert not torch.equal(first, third) and values[0] != values[1]  # the global generator goes on from call to call


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_perfect_prediction_is_the_clean_image(prediction_type):
    scheduler = scheduler_of(prediction_type=prediction_type, zero_terminal_snr=True)
    clean, noise = torch.randn(2, 4, 1, 2, 2)
    timesteps = torch.tensor([0, 10, 500, 999])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    predicted = clean if prediction_type == "sample" else scheduler.get_velocity(clean, noise, timesteps)
    torch.testing.assert_close(consistency_function(scheduler, noisy, timesteps, predicted), clean)


def test_noise_predictors_are_refused():
    scheduler = scheduler_of(recipe="ddpm")
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', but .* train one with 'v_prediction'"):
        consistency_function(scheduler, torch.zeros(1, 1, 2, 2), torch.tensor([5]), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("settings", SCHEDULES[:3])
def test_one_step_maps_the_prior_to_the_data(settings):
    """The noise x has variance 1, and the trajectories of pure Gaussian data end at m + d x, for small alpha at T."""
    scheduler = scheduler_of(**settings)
    unet, noise = gaussian_ends(scheduler), torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for name in ("lcm", "ddim"):
        made = sampler(name, scheduler)
        made.set_timesteps(1)
        (t,) = made.timesteps
        assert t == 999
        with torch.no_grad():
            end = made.step(unet(noise, t).sample, t, noise).prev_sample
        torch.testing.assert_close(end, MEAN + STD * noise, atol=0.005, rtol=0)  # alpha_T m is at most 0.0013


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_lcm_steps_to_a_clean_image_and_adds_noise_again(steps):
    scheduler = scheduler_of()
    unet, made = gaussian_ends(scheduler), sampler("lcm", scheduler)
    made.set_timesteps(steps)
    assert made.timesteps.tolist() == [999 - 1000 * i // steps for i in range(steps)] or steps == 3
    for t in made.timesteps.tolist():
        assert made.get_scalings_for_boundary_condition_discrete(t) == pytest.approx((0, 1), abs=1e-9)
    sample = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    ours = sample.clone()
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for i, t in enumerate(made.timesteps):
        with torch.no_grad():
            sample = made.step(unet(sample, t).sample, t, sample, generator=generators[0]).prev_sample
            ours = consistency_function(scheduler, ours, t[None], unet(ours, t).sample)
        if i + 1 < steps:
            abar = scheduler.alphas_cumprod[made.timesteps[i + 1]]
            ours = abar.sqrt() * ours + (1 - abar).sqrt() * torch.randn(ours.shape, generator=generators[1])
    torch.testing.assert_close(sample, ours)


def test_lcm_takes_any_table_of_timesteps():
    for count in (1, 7, 10, 1000):
        made = sampler("lcm", scheduler_of(num_train_timesteps=count))
        made.set_timesteps(1)
        assert made.timesteps.tolist() == [count - 1]
        assert sampler("ddim", made).config.num_train_timesteps == count


def test_stock_pipelines_generate_from_a_consistency_function():
    """As the model card says: DDIM in one step, LCM in two to four, from a scheduler with trailing timesteps."""
    scheduler = scheduler_of()
    scheduler.register_to_config(timestep_spacing="trailing")
    unet = gaussian_ends(scheduler)
    for pipe, steps in (
        (DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config)), 1),
        (DDPMPipeline(unet, LCMScheduler.from_config(scheduler.config)), 2),
        (DDPMPipeline(unet, LCMScheduler.from_config(scheduler.config)), 4),
    ):
        pipe.set_progress_bar_config(disable=True)
        image = pipe(generator=torch.manual_seed(0), num_inference_steps=steps, output_type="np").images * 2 - 1
        low, high = ((end - MEAN) / STD for end in (-1, 1))  # images are clipped
        assert pipe.scheduler.timesteps[0] == 999
        expected = MEAN + STD * torch.linspace(-6, 6, 4001)
        density = torch.exp(-(((expected - MEAN) / STD) ** 2) / 2)
        clipped = (expected.clamp(-1, 1) * density).sum() / density.sum()
        assert low < high and image.mean() == pytest.approx(clipped.item(), abs=4 * STD / SIDE)
