"""Pipelines give on a GPU what they give on a CPU, up to rounding."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from tests.support import segmentation, super_resolution, tiny
from unet_diffusion.pipelines import ImageGenerationPipeline, SuperResolutionPipeline


def generated(pipe, device: torch.device) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)(
        batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images


@pytest.mark.parametrize("kind", [DDPMPipeline, ImageGenerationPipeline])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_those_of_a_cpu(kind, layout, device):
    unet = tiny.network()
    expected = generated(kind(unet, DDPMScheduler()), torch.device("cpu"))
    found = generated(kind(unet.to(memory_format=layout), DDPMScheduler()), device)
    assert np.abs(found - expected).max() < 0.02 and expected.std() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_near(dtype, device):
    unet = tiny.network()
    expected = generated(ImageGenerationPipeline(unet, DDIMScheduler()), torch.device("cpu"))
    found = generated(ImageGenerationPipeline(unet.to(dtype), DDIMScheduler()), device)
    assert np.abs(found - expected).mean() < 0.05


def test_masks_are_those_of_a_cpu(device):
    pipe, image = segmentation.pipeline(), segmentation.image(37, 50)
    expected = np.asarray(pipe(image).masks[0])
    found = np.asarray(pipe.to(device)(image).masks[0])
    assert (found == expected).mean() > 0.99 and len(np.unique(expected)) > 1


def test_enlarged_images_are_those_of_a_cpu(device):
    pipe = SuperResolutionPipeline(super_resolution.network(), DDIMScheduler(), 2, super_resolution.BYTES.to_dict())
    pipe.set_progress_bar_config(disable=True)
    small = torch.from_numpy(super_resolution.image(8, 8)).permute(2, 0, 1)
    expected, found = (
        pipe.to(place)(small, 3, super_resolution.seeded(0), output_type="pt").images[0].cpu()
        for place in (torch.device("cpu"), device)
    )
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
