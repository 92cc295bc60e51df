"""Super-resolution: the input of the network, the pipeline and its tiles."""

import doctest
import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import nn

from tests.support.super_resolution import BYTES, image, network, seeded
from unet_diffusion.diffusion.config import check_sides
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk, with_noise
from unet_diffusion.diffusion.objectives import noise_prediction_loss
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines import SuperResolutionPipeline, super_resolution

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
PIXELS_12_BIT = PixelRange((0.0,), (4095.0,), "uint16")
ROUNDING = 1e-3  # as in test_image_generation: convolutions round by the size of the batch, and steps enlarge that
CONVOLUTIONS = {"norm": "none", "attention": (False, False)}  # a network whose tiles are exact


def pipeline(unet=None, scheduler=None, scale: int = 2, **arguments) -> SuperResolutionPipeline:
    pipe = SuperResolutionPipeline(unet or network(), scheduler or DDIMScheduler(), scale, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_example_in_the_docstring_runs():
    outcome = doctest.testmod(super_resolution)
    assert outcome.attempted and not outcome.failed


# --- what the network is shown


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shrinking_and_enlarging_are_those_of_pillow(scale):
    """Its bicubic filter on 32-bit floats, antialiased where it shrinks; then rounded to what a file stores."""
    pixels = image(12, 24)[..., 0]
    pixels[:, :8], pixels[:, 8:16] = 0, 255  # bicubic overshoots at such an edge, and is clipped
    clean = BYTES.to_model(torch.from_numpy(pixels)[None, None])
    floats = Image.fromarray(pixels.astype(np.float32))
    small = np.asarray(floats.resize((24 // scale, 12 // scale), Image.Resampling.BICUBIC)).clip(0, 255).round()
    found = shrunk(clean, scale, BYTES)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[0, 0].numpy(), small)
    large = np.asarray(Image.fromarray(small).resize((24, 12), Image.Resampling.BICUBIC)).clip(0, 255)
    condition = (enlarged(found, scale, BYTES)[0, 0].numpy() + 1) * 127.5
    np.testing.assert_allclose(condition, large, atol=1e-3)  # of 255: rounding in float32


def test_a_constant_image_is_its_own_condition_at_any_depth():
    stored = torch.full((1, 2, 8, 12), 1365, dtype=torch.uint16)
    clean = PIXELS_12_BIT.to_model(stored)
    small = shrunk(clean, 4, PIXELS_12_BIT)
    assert small.dtype == torch.uint16 and small.shape == (1, 2, 2, 3)
    torch.testing.assert_close(enlarged(small, 4, PIXELS_12_BIT), clean, atol=1e-6, rtol=0)


def test_noise_of_the_condition_keeps_the_variance():
    """sqrt(1 - s^2) c + s eps: unit variance stays one, s = 0 changes nothing."""
    condition, noise = torch.randn(2, 1, 100, 100), torch.randn(2, 1, 100, 100)
    noisy = with_noise(condition, torch.tensor([0.0, 0.6]), noise)
    assert torch.equal(noisy[0], condition[0])
    torch.testing.assert_close(noisy[1], 0.8 * condition[1] + 0.6 * noise[1])
    assert noisy[1].var().item() == pytest.approx(1, abs=4 * (2 / 10_000) ** 0.5)  # 4 standard errors


def test_sides_that_cannot_be_divided_are_named():
    with pytest.raises(ValueError, match="30x28 pixels, but both sides must be multiples of scale, 4; set image_size"):
        check_sides(28, 30, 4)


class Reveals(nn.Module):
    """Reads the clean image from the condition, and predicts the noise that makes the noisy one of it."""

    def __init__(self, scheduler) -> None:
        super().__init__()
        self.scheduler = scheduler

    def forward(self, seen, timesteps, class_labels=None, head=None):
        noisy, clean = seen.chunk(2, dim=1)
        abar = self.scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=(noisy - abar.sqrt() * clean) / (1 - abar).sqrt())


def test_the_condition_follows_the_noisy_image_in_the_channels():
    scheduler = DDPMScheduler()
    clean = torch.rand(4, 2, 6, 6) * 2 - 1
    timesteps = torch.tensor([100, 400, 700, 999])
    loss = noise_prediction_loss(Reveals(scheduler), scheduler, clean, timesteps=timesteps, condition=clean)
    assert loss.item() < 1e-8


# --- the pipeline


def test_a_perfect_predictor_gives_what_the_condition_shows(monkeypatch):
    """If the enlarged image counts as the clean one, every sampler ends at it, from any noise."""
    pixels = image(5, 7)
    for name in ("ddim", "dpm-solver++", "ddpm"):
        pipe = pipeline(scheduler=sampler(name, DDPMScheduler()))
        monkeypatch.setattr(pipe.unet, "forward", Reveals(pipe.scheduler).forward)
        found = pipe(pixels, 10, seeded(0), output_type="pt").images[0]
        condition = enlarged(torch.from_numpy(pixels).permute(2, 0, 1)[None], 2, BYTES)[0]
        torch.testing.assert_close(found, condition / 2 + 0.5, atol=2e-3, rtol=0)  # alpha is 0.006 at the first step


@pytest.mark.parametrize("name", ["ddim", "sde-dpm-solver++", "ddpm", "heun"])
def test_an_image_depends_on_its_own_generator_alone(name):
    pipe = pipeline(scheduler=sampler(name, DDPMScheduler()))
    images = [image(4, 5, seed=0), image(4, 5, seed=1), image(6, 3, seed=2), image(4, 5, seed=3)]
    together = pipe(images, 4, seeded(0, 1, 2, 3), output_type="pt").images
    assert [tuple(each.shape) for each in together] == [(1, 8, 10), (1, 8, 10), (1, 12, 6), (1, 8, 10)]
    for pixels, seed, large in zip(images, range(4), together):
        alone = pipe(pixels, 4, seeded(seed), output_type="pt").images[0]
        torch.testing.assert_close(alone, large, atol=ROUNDING, rtol=0)
    other = pipe(images[0], 4, seeded(9), output_type="pt").images[0]
    assert (other - together[0]).abs().max() > 0.05


def test_images_of_one_size_run_together_up_to_the_memory_of_a_window():
    images = [torch.zeros(1, *size) for size in ((4, 4), (4, 4), (4, 4), (4, 5), (4, 4))]
    tiling = Tiling(stride=2, tile=2, whole=2 * 8 * 10)  # two images of 8x8 or of 8x10 at once
    batches = list(tiling.batches(images, scale=2))
    assert [len(batch) for batch in batches] == [2, 1, 1, 1]
    assert all(found is given for found, given in zip(chain(*batches), images, strict=True))
    assert list(tiling.batches([], scale=2)) == []


def test_more_steps_than_training_timesteps_are_refused():
    pipe = pipeline(scheduler=sampler("dpm-solver++", DDPMScheduler(num_train_timesteps=10)))
    with pytest.raises(ValueError, match="num_inference_steps is 20, but the network was trained with 10 timesteps"):
        pipe(image(4, 5))


def test_large_images_that_are_not_finite_are_an_error(monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(pipe, "_predict", lambda large, *rest: torch.full_like(large, torch.nan))
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        pipe(image(4, 5), 2)


def test_one_generator_goes_from_image_to_image():
    """Like one sequence of noise for all: each image starts where the one before it ended."""
    pipe = pipeline(scheduler=DDIMScheduler(timestep_spacing="trailing"))
    starts = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: starts.append(arguments[0][:, :1]))
    pipe([image(4, 4), image(4, 4)], 1, seeded(0)[0])
    torch.testing.assert_close(torch.cat(starts), torch.randn(2, 1, 8, 8, generator=seeded(0)[0]))


def test_tiles_as_large_as_the_image_change_nothing(monkeypatch):
    """Bit for bit, also for a network with attention and statistics over space: each step is one forward pass."""
    pipe = pipeline()
    pixels = image(12, 10)
    tiled, chosen = (pipe(pixels, 3, seeded(0), tile_size=size, output_type="pt").images[0] for size in (24, None))
    everywhere = (slice(0, 24), slice(0, 20))
    monkeypatch.setattr(super_resolution, "tiled", lambda run, read, *_: [(*everywhere, run(read(*everywhere)))])
    whole = pipe(pixels, 3, seeded(0), output_type="pt").images[0]
    assert torch.equal(tiled, whole) and torch.equal(chosen, whole)


def test_tiles_of_a_convolutional_network_give_the_untiled_image():
    pipe = pipeline(network(**CONVOLUTIONS))
    pixels = image(40, 35)
    whole, tiled = (pipe(pixels, 3, seeded(0), tile_size=size, output_type="pt").images[0] for size in (None, 16))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)  # rounding, enlarged by three steps
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape[2:])))
    pipe(pixels, 3, seeded(0), tile_size=16)
    assert len(sizes) > 3 * 9 and max(max(size) for size in sizes) < 70  # windows, not the 80 x 70 pixels of the whole


class SeesMeans(Reveals):
    """Takes the mean of its window for the clean image, as a network with statistics over space might."""

    def forward(self, seen, timesteps, class_labels=None, head=None):
        noisy, condition = seen.chunk(2, dim=1)
        mean = condition.mean(dim=(2, 3), keepdim=True).expand_as(noisy)
        return super().forward(torch.cat([noisy, mean], dim=1), timesteps)


def test_tiles_with_different_predictions_are_blended(monkeypatch):
    """Two windows with means of their own: four pixels of raised cosine lie between them, and no seam.

    Between weights sin(a)^2 with a = pi/16, 3 pi/16, ... the largest step is sin(pi/8) of the difference.
    """
    pipe = pipeline()
    monkeypatch.setattr(pipe.unet, "forward", SeesMeans(pipe.scheduler).forward)
    pixels = np.tile(np.linspace(60, 180, 15).astype(np.uint8), (4, 1))
    image = pipe(pixels, 10, seeded(0), tile_size=16, output_type="pt").images[0][0]
    steps = image[:, 1:] - image[:, :-1]
    jump = image[:, -1] - image[:, 0]
    assert jump.min() > 0.05
    torch.testing.assert_close(
        steps.max(dim=1).values / jump, torch.full((8,), np.sin(np.pi / 8)).float(), atol=0.02, rtol=0
    )
    assert (steps > 0.01 * jump.max()).sum(dim=1).tolist() == [5] * 8


def test_every_kind_of_input_gives_the_same_image(tmp_path):
    pipe = pipeline(network(3))
    pixels = image(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    inputs = [pixels, Image.fromarray(pixels), str(tmp_path / "image.png"), tensor, tensor[None], [pixels]]
    results = [pipe(each, 2, seeded(0), output_type="np").images for each in inputs]
    assert all(len(result) == 1 and np.array_equal(result[0], results[0][0]) for result in results)
    assert results[0][0].shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("channels", "pixel_range", "mode"),
    [(1, BYTES, "L"), (3, BYTES, "RGB"), (1, PIXELS_12_BIT, "I;16"), (1, PixelRange((0.0,), (1.0,), "float32"), "F")],
)
def test_output_types_agree(channels, pixel_range, mode):
    pipe = pipeline(network(channels), pixel_range=pixel_range.to_dict())
    small = pixel_range.to_stored(torch.rand(channels, 4, 5) * 2 - 1)
    pil, array, tensor, stored = (
        pipe(small, 2, seeded(0), output_type=kind).images[0] for kind in ("pil", "np", "pt", "stored")
    )
    assert (pil.mode, pil.size) == (mode, (10, 8))
    assert np.array_equal(array, tensor.permute(1, 2, 0).numpy())
    assert stored.dtype == small.dtype
    assert torch.equal(stored, pixel_range.to_stored(tensor[None] * 2 - 1)[0])
    assert np.array_equal(np.asarray(pil).reshape(8, 10, channels), stored.permute(1, 2, 0).numpy())


def test_noise_of_the_condition_is_drawn_after_that_of_the_image():
    """So the image starts from the same noise with and without it."""
    pipe = pipeline(scheduler=DDIMScheduler(timestep_spacing="trailing"))
    starts = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: starts.append(arguments[0]))
    pipe(image(4, 4), 1, seeded(0))
    pipe(image(4, 4), 1, seeded(0), condition_noise=0.1)
    assert torch.equal(starts[0][:, 0], starts[1][:, 0])
    difference = starts[1][:, 1] - (1 - 0.1**2) ** 0.5 * starts[0][:, 1]
    expected = torch.randn(2, 1, 8, 8, generator=seeded(0)[0])[1]
    torch.testing.assert_close(difference, 0.1 * expected, atol=1e-5, rtol=0)


def test_saved_pipeline_comes_back_whole(tmp_path):
    pipe = pipeline(pixel_range=PIXELS_12_BIT.to_dict(), scale=3)
    pipe.save_pretrained(tmp_path)
    again = SuperResolutionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scale == 3 and again.pixel_range == PIXELS_12_BIT
    small = torch.full((1, 3, 4), 900, dtype=torch.uint16)
    images = [each(small, 2, seeded(0), output_type="stored").images[0] for each in (pipe, again)]
    assert torch.equal(*images)
    assert json.loads((tmp_path / "model_index.json").read_text())["_scale"] == 3


def test_file_works_as_custom_pipeline(tmp_path, monkeypatch):
    pipe = pipeline(scale=3)
    pipe.save_pretrained(tmp_path / "run")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "run", custom_pipeline=super_resolution.__file__, trust_remote_code=True
    )
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "SuperResolutionPipeline" and type(again) is not SuperResolutionPipeline
    images, expected = (each(image(3, 4), 2, seeded(0), output_type="stored").images[0] for each in (again, pipe))
    assert torch.equal(images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"condition_noise": 1.0}, "condition_noise is 1.0, but must be at least 0 and less than 1"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"output_type": "latent"}, "output_type is 'latent', but must be one of 'pil', 'np', 'pt', 'stored'"),
        ({"generator": seeded(0, 1)}, "there are 2 generators, but the number of images is 1"),
        ({"image": image(4, 4, 3)}, r"has 3 channels, but the network takes 1; convert it to 1 channel \(grey\)"),
        ({"image": image(4, 4).astype(np.uint16)}, "holds uint16, but the network was trained on uint8"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"image": image(4, 4), **arguments})


@pytest.mark.parametrize(
    "config", [{"in_channels": 1}, {"time_embedding": None}, {"num_class_embeds": 2}, {"padding": "valid"}]
)
def test_networks_that_cannot_enlarge_are_refused(config):
    with pytest.raises(ValueError, match="super-resolution needs (twice as many channels|a network without classes)"):
        pipeline(network(**config))


@pytest.mark.parametrize("scale", [None, 1, 2.0, True])
def test_wrong_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale is .*, but must be an integer of at least 2"):
        pipeline(scale=scale)


def test_a_range_for_each_image_is_refused():
    own = PixelRange.stretched("uint16", (1.0, 99.0)).to_dict()
    with pytest.raises(ValueError, match=r"percentiles is \(1.0, 99.0\), but a small image and a large one would each"):
        pipeline(pixel_range=own)
