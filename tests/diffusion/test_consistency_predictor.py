"""Tuned networks in diffusers' pipeline of consistency models, against the closed form and against one step of DDIM."""

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMScheduler

from unet_diffusion import UNet
from unet_diffusion.diffusion.consistency_predictor import ConsistencyPredictor
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.unet import UNetOutput

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2


class KnowingTheImage(UNet):
    """A network that returns one clean image at every timestep, and keeps these."""

    def know(self, clean):
        self.clean, self.seen = clean, []
        return self

    def forward(self, sample, timestep, class_labels=None, return_dict=True, *, head=None):
        self.seen.append(timestep[0].item())
        return UNetOutput(sample=self.clean.expand_as(sample))


def pipeline(unet, scheduler):
    predictor = ConsistencyPredictor(unet, scheduler)
    pipe = ConsistencyModelPipeline(predictor, predictor.make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [{"num_inference_steps": 1}, {"num_inference_steps": None, "timesteps": [30, 20, 0]}])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_network_that_knows_the_image_gives_it_in_any_number_of_steps(steps, schedule):
    scheduler = DiffusionConfig(prediction_type="sample", beta_schedule=schedule).make_scheduler()
    clean = torch.rand(1, 1, 8, 8, generator=torch.manual_seed(0)) * 2 - 1
    unet = KnowingTheImage(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), head_channels=8).know(clean)
    images = pipeline(unet, scheduler)(2, generator=torch.manual_seed(0), output_type="pt", **steps).images
    torch.testing.assert_close(images, (clean / 2 + 0.5).expand(2, 1, 8, 8), atol=1e-4, rtol=0)
    assert unet.seen[0] == 999 and unet.seen == sorted(unet.seen, reverse=True)


def test_timesteps_are_those_of_the_noise_levels():
    """The linear schedule has the level 1, where half of the variance is noise, at timestep 259."""
    scheduler = DiffusionConfig(prediction_type="sample", beta_schedule="linear").make_scheduler()
    nearest = (scheduler.alphas_cumprod - 0.5).abs().argmin().item()
    unet = KnowingTheImage(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), head_channels=8)
    ConsistencyPredictor(unet.know(torch.zeros(1, 1, 8, 8)), scheduler)(torch.zeros(1, 1, 8, 8), 0.0)
    assert abs(unet.seen[0] - nearest) <= 1


def test_one_step_is_the_one_step_of_ddim():
    scheduler = DiffusionConfig().make_scheduler()
    unet = UNet.from_preset("tiny", sample_size=8, num_class_embeds=3).eval()
    torch.nn.init.normal_(unet.noise_head.weight, std=0.1)
    ours = pipeline(unet, scheduler)(2, class_labels=[0, 0], generator=torch.manual_seed(0), output_type="pt").images
    theirs = ImageGenerationPipeline(unet, scheduler)
    theirs.scheduler = sampler("ddim", scheduler)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not tuned for a few steps"):
        expected = theirs(2, 1, class_labels=[0, 0], generator=generator, output_type="pt").images
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)


def test_networks_that_predict_noise_and_other_schedulers_are_refused():
    unet = UNet.from_preset("tiny")
    with pytest.raises(ValueError, match="prediction_type is 'epsilon', but a network that predicts noise"):
        ConsistencyPredictor(unet, DDPMScheduler())
    with pytest.raises(ValueError, match="the network was trained with prediction_type='v_prediction'"):
        ConsistencyPredictor(UNet.from_preset("tiny", prediction_type="v_prediction"), DDPMScheduler())
