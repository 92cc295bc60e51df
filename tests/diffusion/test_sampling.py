"""Samplers keep the noise schedule of the training, and clip where they would diverge otherwise."""

import inspect
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
)

from unet_diffusion import UNet
from unet_diffusion.diffusion.config import SamplerName, best_sampling
from unet_diffusion.diffusion.sampling import (
    check_classes,
    check_scheduler,
    check_steps,
    denoised,
    sampler,
    start_sampling,
    step_arguments,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
NAMES = get_args(SamplerName)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}])
def test_noise_schedule_and_prediction_type_are_those_of_the_training(name, settings):
    # In diffusers, HeunDiscreteScheduler.from_config(DDPMScheduler().config) has another noise schedule: values that
    # the first class had by default are replaced by the defaults of the second.
    training = DDPMScheduler(prediction_type="v_prediction", **settings)
    made = sampler(name, training)
    torch.testing.assert_close(made.alphas_cumprod, training.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", NAMES)
def test_sampler_of_a_sampler_is_that_of_the_training(name):
    training = DDPMScheduler(beta_schedule="scaled_linear")
    direct = sampler(name, training)
    for other in NAMES:
        roundabout = sampler(name, sampler(other, training))
        torch.testing.assert_close(roundabout.alphas_cumprod, direct.alphas_cumprod)
        images = []
        for scheduler in (direct, roundabout):
            scheduler.set_timesteps(3)
            t = scheduler.timesteps[0]
            sample = torch.full((1, 1, 2, 2), 2.0) * scheduler.init_noise_sigma
            arguments = step_arguments(scheduler, 0, torch.Generator().manual_seed(0), None)
            noise = torch.zeros(1, 1, 2, 2)
            scheduler.scale_model_input(sample, t)
            images.append(scheduler.step(noise, t, sample, **arguments).prev_sample)
        torch.testing.assert_close(images[1], images[0])


def test_sde_solver_adds_noise_and_the_other_does_not():
    def made(name, seed):
        scheduler = sampler(name, DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"))
        scheduler.set_timesteps(4)
        sample, generator = torch.full((1, 1, 4, 4), 0.5), torch.Generator().manual_seed(seed)
        for step, t in enumerate(scheduler.timesteps):
            arguments = step_arguments(scheduler, step, generator, None)
            sample = scheduler.step(0.1 * sample, t, sample, **arguments).prev_sample
        return sample

    assert torch.equal(made("dpm-solver++", 0), made("dpm-solver++", 1))
    assert torch.equal(made("sde-dpm-solver++", 0), made("sde-dpm-solver++", 0))
    assert not torch.equal(made("sde-dpm-solver++", 0), made("sde-dpm-solver++", 1))


def test_given_scheduler_is_left_as_it_is():
    training = DDPMScheduler()
    before = dict(training.config)
    made = sampler("dpm-solver++", training)
    made.set_timesteps(5)
    assert dict(training.config) == before
    assert training.num_inference_steps is None


@pytest.mark.parametrize("name", ["dpm-solver++", "sde-dpm-solver++", "unipc", "heun", "ddim", "ddpm"])
def test_cosine_schedule_survives_an_error_in_the_noise(name):
    # At its noisy end alpha is 5e-5: an error of 0.01 in the noise is one of 200 in the clean image, unless clipped.
    # One that is clipped gives a next sample of at most |alpha| + |sigma noise| + what the sampler adds.
    scheduler = sampler(name, DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[0]
    assert t == 999
    noise = torch.randn(1, 1, 8, 8)
    noisy = noise * scheduler.init_noise_sigma
    scheduler.scale_model_input(noisy, t)
    arguments = step_arguments(scheduler, 0, torch.Generator().manual_seed(0), None)
    following = scheduler.step(noise + 0.01, t, noisy, **arguments).prev_sample
    sigma = scheduler.sigmas[1] if name == "heun" else 1.0  # Heun's samples are not scaled to unit variance
    assert (following / max(sigma, 1.0)).abs().max() < 6


def test_clipping_is_for_noise_prediction_where_the_training_clips():
    for training, clips in (
        (DDPMScheduler(), True),
        (DDPMScheduler(clip_sample=False), False),
        (DDPMScheduler(prediction_type="v_prediction"), False),
    ):
        assert sampler("dpm-solver++", training).config.thresholding is clips
        assert sampler("ddim", training).config.clip_sample is clips
        assert sampler("ddpm", training).config.clip_sample is training.config.clip_sample


def test_thresholding_of_diffusers_is_clipping_to_the_range_of_images():
    scheduler = sampler("dpm-solver++", DDPMScheduler())
    images = 3 * torch.randn(2, 1, 8, 8)
    stock = type(scheduler).from_config(scheduler.config)._threshold_sample(images)  # by quantiles
    torch.testing.assert_close(stock, images.clamp(-1, 1))
    torch.testing.assert_close(scheduler._threshold_sample(images), stock)


@pytest.mark.parametrize("name", ["dpm-solver++", "unipc"])
def test_more_values_than_quantiles_can_be_computed_of_are_clipped(name, tmp_path):
    sampler(name, DDPMScheduler()).save_pretrained(tmp_path)
    scheduler = type(sampler(name, DDPMScheduler())).from_pretrained(tmp_path)  # the class of diffusers
    start_sampling(scheduler, 2, torch.device("cpu"))
    prediction = torch.zeros(1, 1, 1, 2**24 + 1)
    noisy = torch.full_like(prediction, 0.5)
    assert denoised(scheduler, 0, prediction, noisy, None).abs().max() <= 1.01


@pytest.mark.parametrize("timesteps", [100, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_no_timestep_is_negative(name, timesteps):
    def too_many(steps):  # as diffusers counts them
        return len(np.arange(timesteps, 0, -timesteps / steps)) > steps

    affected = [steps for steps in range(1, timesteps + 1) if too_many(steps)]
    assert {100: 5, 1000: 62}[timesteps] == len(affected)
    scheduler = sampler(name, DDPMScheduler(num_train_timesteps=timesteps))
    for steps in affected:
        start_sampling(scheduler, steps, torch.device("cpu"))
        assert scheduler.timesteps.min() >= 0 and scheduler.num_inference_steps == steps
        assert len(scheduler.timesteps) == (2 * steps - 1 if name == "heun" else steps)
        if hasattr(scheduler, "sigmas"):
            assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 and scheduler.sigmas[-1] == 0
            assert (scheduler.sigmas[:-1] > 0).all()


def test_more_steps_than_training_timesteps_are_refused():
    scheduler = sampler("dpm-solver++", DDPMScheduler(num_train_timesteps=10))
    check_steps(scheduler, 10)
    with pytest.raises(ValueError, match="num_inference_steps is 11, but the network was trained with 10 timesteps"):
        check_steps(scheduler, 11)
    check_steps(EDMEulerScheduler(num_train_timesteps=10), 11)  # its times are continuous


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_steps_that_begin_far_from_noise_are_warned_of(kind, beta_schedule):
    """With leading spacing, n of 1000 timesteps begin at (n - 1) * (1000 // n)."""
    scheduler = kind(beta_schedule=beta_schedule, timestep_spacing="leading")
    share = {"linear": 0.28, "squaredcos_cap_v2": 0.70}[beta_schedule]
    message = f"starts at timestep 50[01], whose images keep {share:.0%} of their signal.* that divides 1000"
    with pytest.warns(UserWarning, match=f"num_inference_steps is 501, .*{message}"):
        check_steps(scheduler, 501)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_a_step_from_an_almost_clean_image_is_refused(kind):
    with pytest.raises(ValueError, match=r"num_inference_steps is 1, .* starts at timestep 0, .* keep 100%"):
        check_steps(kind(timestep_spacing="leading"), 1)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("timesteps", [4, 10, 1000])  # noise at the last of few timesteps is less than at that of many
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", NAMES)
def test_samplers_begin_at_noise_with_any_number_of_steps(name, beta_schedule, timesteps):
    training = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=beta_schedule, prediction_type="v_prediction")
    for steps in {1, 2, 3, min(20, timesteps), timesteps // 2 + 1, timesteps}:
        check_steps(sampler(name, training), steps)
    for scheduler in (training, DDIMScheduler.from_config(training.config)):
        check_steps(scheduler, timesteps)
        if timesteps == 1000:
            check_steps(scheduler, 20)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (
            DDIMScheduler(steps_offset=1),
            1000,
            "DDIMScheduler starts at timestep 1000, but the network knows 0 to 999; .* steps_offset to 0",
        ),
        (PNDMScheduler(), 3, "PNDMScheduler finds no timesteps .*; take another number, or another sampler"),
        (UnCLIPScheduler(), 1, r"UnCLIPScheduler finds no timesteps \(division by zero\); take another number"),
    ],
)
def test_steps_that_a_scheduler_cannot_take_are_refused(scheduler, steps, message):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}, for which {message}"):
        check_steps(scheduler, steps)


@pytest.mark.parametrize("kind", [DDPMScheduler, UnCLIPScheduler])
def test_variances_that_the_network_does_not_predict_are_refused(kind):
    check_scheduler(kind(), None)
    with pytest.raises(ValueError, match="variance_type is 'learned_range', but the network predicts no variances"):
        check_scheduler(kind(variance_type="learned_range"), None)


@pytest.mark.parametrize("eta", [-0.1, 2.0, True, "1", float("nan")])
def test_eta_is_a_number_from_0_to_1(eta):
    for valid in (0, 1.0, None):
        check_scheduler(DDIMScheduler(), valid)
    with pytest.raises(ValueError, match="eta is .*, but must be a number from 0 to 1, or None"):
        check_scheduler(DDIMScheduler(), eta)


def test_default_number_of_steps_is_at_most_that_of_the_training_timesteps():
    assert best_sampling("v_prediction", None, 10) == ("dpm-solver++", 10)
    assert best_sampling("epsilon", None, 1000) == ("sde-dpm-solver++", 20)
    assert best_sampling("v_prediction", 4, 1) == ("lcm", 1)


@pytest.mark.parametrize("name", ["dpm-solver++", "sde-dpm-solver++", "unipc", "euler", "ddim", "ddpm"])
def test_schedule_that_ends_at_zero_signal_starts_there(name):
    training = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler = sampler(name, training)
    scheduler.set_timesteps(7)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[999] < 1e-6


@pytest.mark.parametrize(
    ("name", "scheduler", "message"),
    [
        ("dpm", DDPMScheduler(), "choose one of dpm-solver"),
        ("ddim", FlowMatchEulerDiscreteScheduler(), "no schedule of betas"),
        ("ddim", EDMEulerScheduler(), "no schedule of betas"),
        ("ddim", DDPMScheduler(rescale_betas_zero_snr=True), "train with 'v_prediction'"),
        ("heun", DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="sample"), "HeunDiscreteScheduler"),
        ("euler", DDPMScheduler(beta_schedule="squaredcos_cap_v2"), "EulerDiscreteScheduler lacks"),
    ],
)
def test_combinations_that_cannot_be_sampled_are_refused(name, scheduler, message):
    with pytest.raises(ValueError, match=message):
        sampler(name, scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_step_gets_only_arguments_that_it_takes(name):
    scheduler = sampler(name, DDPMScheduler())
    scheduler.set_timesteps(3)
    arguments = step_arguments(scheduler, 0, torch.Generator(), None)
    assert set(arguments) <= set(inspect.signature(scheduler.step).parameters)
    assert ("generator" in arguments) == (name in ("dpm-solver++", "sde-dpm-solver++", "euler", "ddim", "ddpm", "lcm"))


def test_classes_are_checked_against_the_network():
    config = UNet.from_preset("tiny", num_class_embeds=3).config
    check_classes(config, 2, [0, 2], 1.0, None)
    for arguments, message in (
        ((2, None, 1.0, None), "from 0 to 2, or train with label_dropout"),
        ((2, [0], 1.0, None), "there are 1 class_labels, but batch_size is 2"),
        ((1, [3], 1.0, None), "class label 3"),
        ((1, [0], 2.0, None), "train with label_dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            check_classes(config, *arguments)
