import pytest
import torch
from diffusers import DDPMScheduler

from unet_diffusion import UNet
from unet_diffusion.diffusion.objectives import (
    min_snr_weight,
    noise_prediction_loss,
    prediction_target,
    signal_to_noise,
)


def tiny() -> UNet:
    return UNet.from_preset("tiny")


def silent() -> UNet:
    unet = tiny()
    for parameter in unet.noise_head.parameters():
        torch.nn.init.zeros_(parameter)
    return unet


def test_a_network_that_predicts_zero_has_the_noise_power_as_its_loss():
    loss = noise_prediction_loss(silent(), DDPMScheduler(), torch.zeros(64, 1, 16, 16))
    assert loss.item() == pytest.approx(1.0, abs=4 * (2 / (64 * 256)) ** 0.5)  # 4 standard errors of a mean of squares


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [1.0, 1.0, 0.25]),  # min(snr, 5) / snr at 0.5, 5, 20
        ("v_prediction", [0.5 / 1.5, 5 / 6, 5 / 21]),  # min(snr, 5) / (snr + 1)
        ("sample", [0.5, 5.0, 5.0]),  # min(snr, 5)
    ],
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    weights = min_snr_weight(torch.tensor([0.5, 5.0, 20.0]), 5.0, prediction_type)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_min_snr_weights_agree_in_clean_image_space():
    """The same wrong clean image has the same loss, whichever of the three quantities expresses it."""
    scheduler = DDPMScheduler()
    timesteps = torch.tensor([10, 300, 900])
    clean, wrong, noise = torch.randn(3, 3, 1, 4, 4)
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    noise_of_wrong = (noisy - abar.sqrt() * wrong) / (1 - abar).sqrt()
    predictions = {
        "sample": wrong,
        "epsilon": noise_of_wrong,
        "v_prediction": abar.sqrt() * noise_of_wrong - (1 - abar).sqrt() * wrong,
    }
    costs = []
    for prediction_type, predicted in predictions.items():
        scheduler.register_to_config(prediction_type=prediction_type)
        error = (predicted - prediction_target(scheduler, clean, noise, timesteps)).square().mean(dim=(1, 2, 3))
        costs.append(error * min_snr_weight(signal_to_noise(scheduler, timesteps), 5.0, prediction_type))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        ("epsilon", [1.0, 1.0, 0.25]),
        ("v_prediction", [1.0, 1 / 1.5, 5 / 21]),  # max(min(snr, 5), 1) / (snr + 1) at 0, 0.5, 20
        ("sample", [1.0, 1.0, 5.0]),
    ],
)
def test_min_snr_weights_with_a_floor_by_hand(prediction_type, expected):
    weights = min_snr_weight(torch.tensor([0.0, 0.5, 20.0]), 5.0, prediction_type, floor=1.0)
    assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_pure_noise_that_sampling_starts_from_is_learnt(prediction_type):
    """At zero terminal SNR, the error of a network that predicts zero counts in full at the last timestep."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    clean, timesteps = torch.randn(1, 1, 4, 4).clamp(-1, 1), torch.tensor([999])
    target = -clean if prediction_type == "v_prediction" else clean  # velocity: 0 * noise - 1 * clean
    loss = noise_prediction_loss(silent(), scheduler, clean, timesteps=timesteps, min_snr_gamma=5.0)
    assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-4)


def test_noise_weight_is_finite_at_zero_terminal_snr():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    snr = signal_to_noise(scheduler, torch.tensor([999]))
    assert snr.item() < 1e-8
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        assert min_snr_weight(torch.tensor([0.0]), 5.0, prediction_type).isfinite().all()


def test_velocity_is_the_derivative_of_the_noisy_image_along_the_circle():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    timesteps = torch.tensor([7, 500])
    clean, noise = torch.randn(2, 2, 1, 3, 3)
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = prediction_target(scheduler, clean, noise, timesteps)
    torch.testing.assert_close(velocity, abar.sqrt() * noise - (1 - abar).sqrt() * clean)


def test_unknown_prediction_type_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        noise_prediction_loss(tiny(), scheduler, torch.zeros(1, 1, 8, 8))


def test_noise_is_added_in_float32_whatever_the_images_are():
    """bfloat16 images and noise would lose the small noise of early steps."""
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, noisy, timesteps, class_labels, head):
            seen.append(noisy.dtype)
            return tiny()(noisy, timesteps)

    noise_prediction_loss(Recorder(), DDPMScheduler(), torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16))
    assert seen == [torch.float32]
