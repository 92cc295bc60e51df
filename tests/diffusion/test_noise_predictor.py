"""The noise that a network of any prediction stands for, against the closed form and in stock pipelines."""

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    PNDMPipeline,
    PNDMScheduler,
    RePaintPipeline,
    RePaintScheduler,
)

from unet_diffusion import UNet
from unet_diffusion.diffusion.noise_predictor import NoisePredictor
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.unet import UNetOutput

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Knowing(UNet):
    """A network that knows image and noise, and returns what its prediction type asks for."""

    def know(self, clean, noise, scheduler):
        self.clean, self.noise, self.table = clean, noise, scheduler.alphas_cumprod.double()
        self.kind = scheduler.config.prediction_type
        return self

    def forward(self, sample, timestep, class_labels=None, return_dict=True, *, head=None):
        signal = self.table[torch.as_tensor(timestep).long()].reshape(-1, 1, 1, 1)
        alpha, sigma = signal.sqrt().float(), (1 - signal).sqrt().float()
        velocity = alpha * self.noise - sigma * self.clean
        return UNetOutput(sample={"epsilon": self.noise, "v_prediction": velocity, "sample": self.clean}[self.kind])


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("timestep", [1, torch.tensor([40]), torch.tensor([700, 999]), torch.tensor(5.0)], ids=str)
def test_the_noise_comes_out_of_every_prediction(kind, timestep):
    scheduler = DiffusionConfig(prediction_type=kind, beta_schedule="linear").make_scheduler()
    clean, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.manual_seed(0))
    steps = torch.as_tensor(timestep).long().reshape(-1)
    noisy = scheduler.add_noise(clean, noise, steps.expand(2))
    unet = Knowing(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), head_channels=8)
    predictor = NoisePredictor(unet.know(clean, noise, scheduler), scheduler)
    found = predictor(noisy, timestep).sample
    # rounding of the noisy image, divided by sigma where the clean image is predicted: 0.015 at timestep 1
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=0)
    assert torch.equal(predictor(noisy, timestep, return_dict=False)[0], found)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_stock_pipelines_with_a_scheduler_for_noise_make_the_images_of_the_run(kind):
    unet = UNet.from_preset("tiny", sample_size=8).eval()
    scheduler = DiffusionConfig(prediction_type=kind, beta_schedule="linear").make_scheduler()
    own = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config, clip_sample=False))
    theirs = DDIMPipeline(NoisePredictor(unet, scheduler), DDIMScheduler(clip_sample=False))
    for pipe in (own, theirs):
        pipe.set_progress_bar_config(disable=True)
    images = [pipe(4, torch.manual_seed(1), num_inference_steps=5, output_type="np").images for pipe in (own, theirs)]
    torch.testing.assert_close(*map(torch.from_numpy, images), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_half_precision_does_not_round_the_noise_levels(kind):
    """Rounded to 8 bits, the signal of the first timesteps would be 1, and their noise 0."""
    scheduler = DiffusionConfig(prediction_type=kind).make_scheduler()
    unet = UNet.from_preset("tiny", sample_size=8).eval()
    sample = torch.randn(1, 1, 8, 8, generator=torch.manual_seed(0))
    expected = NoisePredictor(unet, scheduler)(sample, 1).sample
    half = NoisePredictor(unet, scheduler).to(torch.bfloat16)(sample.bfloat16(), 1).sample
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


def test_it_works_in_pipelines_for_noise_only_and_shares_the_weights():
    unet, scheduler = UNet.from_preset("tiny", sample_size=8).eval(), DiffusionConfig().make_scheduler()
    predictor = NoisePredictor(unet, scheduler)
    assert {id(parameter) for parameter in predictor.parameters()} == {id(parameter) for parameter in unet.parameters()}
    assert predictor.config.prediction_type == "epsilon" and predictor.state_dict().keys() == {
        f"unet.{name}" for name in unet.state_dict()
    }
    repaint = RePaintPipeline(predictor, RePaintScheduler.from_config(scheduler.config))
    pndm = PNDMPipeline(predictor, PNDMScheduler.from_config(scheduler.config, prediction_type="epsilon"))
    for pipe in (repaint, pndm):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.device == unet.device and pipe.dtype == unet.dtype
    keep = torch.ones(1, 1, 8, 8)
    keep[..., 2:6, 2:6] = 0
    settings = {"num_inference_steps": 4, "jump_length": 2, "jump_n_sample": 2, "output_type": "np"}
    clean = torch.full((1, 1, 8, 8), 0.5)
    image = repaint(image=clean, mask_image=keep, generator=torch.manual_seed(0), **settings).images[0]
    assert abs(image[0] - 0.75).max() < 0.02  # a row that the mask keeps, in [0, 1]
    assert pndm(num_inference_steps=4, output_type="np").images.shape == (1, 8, 8, 1)


def test_what_it_cannot_turn_into_noise_is_refused():
    unet, scheduler = UNet.from_preset("tiny", sample_size=8), DiffusionConfig().make_scheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler has no betas"):
        NoisePredictor(unet, EDMEulerScheduler())
    with pytest.raises(ValueError, match="ends at zero signal"):
        NoisePredictor(unet, DiffusionConfig(zero_terminal_snr=True).make_scheduler())
    with pytest.raises(ValueError, match="DDPMScheduler with prediction_type='epsilon', but the network was trained"):
        NoisePredictor(UNet.from_preset("tiny", prediction_type="v_prediction"), DDPMScheduler())
    with pytest.raises(ValueError, match="out_channels is None, but the network needs a noise head"):
        NoisePredictor(UNet.from_preset("tiny", out_channels=None, num_classes=2), scheduler)
    with pytest.raises(ValueError, match=r"timestep is 3.5, but must be one of the schedule, an integer"):
        NoisePredictor(unet, scheduler)(torch.zeros(1, 1, 8, 8), 3.5)


def test_the_networks_config_says_what_it_predicts_and_pipelines_hold_to_it(tmp_path):
    unet = UNet.from_preset("tiny", sample_size=8)
    assert unet.config.prediction_type is None
    with pytest.raises(ValueError, match="prediction_type is 'noise', but must be one of 'epsilon', 'v_prediction'"):
        UNet.from_preset("tiny", prediction_type="noise")
    UNet.from_preset("tiny", sample_size=8, prediction_type="v_prediction").save_pretrained(tmp_path)
    unet = UNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDIMScheduler with prediction_type='epsilon', but the network was trained"):
        ImageGenerationPipeline(unet, DDIMScheduler())  # which knows nothing of a run
    ImageGenerationPipeline(unet, DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="RePaintScheduler with prediction_type='epsilon'"):
        ImageGenerationPipeline(unet, RePaintScheduler())
