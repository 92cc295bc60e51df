"""The image generation pipeline: its contract with diffusers, guidance, generators, batches and output types."""

import doctest
import json
import logging
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from PIL import Image

from tests.support.tiny import network
from unet_diffusion import UNet
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import ImageGenerationPipeline, image_generation

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
ROUNDING = 1e-3  # convolutions round by the size of the batch, and the steps of a random network enlarge that
PIXELS_12_BIT = PixelRange((0.0,), (4095.0,), "uint16").to_dict()


def pipeline(unet=None, scheduler=None, **arguments) -> ImageGenerationPipeline:
    pipe = ImageGenerationPipeline(unet or network(), scheduler or DDIMScheduler(), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def diffusers_log(caplog):
    """The records of diffusers at WARNING and above, which its own handler does not pass on."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_example_in_the_docstring_runs():
    outcome = doctest.testmod(image_generation)
    assert outcome.attempted and not outcome.failed


# --- the loop


def test_images_are_those_of_the_stock_pipeline():
    unet, scheduler = network(), DDPMScheduler()
    stock = DDPMPipeline(unet, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, torch.Generator().manual_seed(5), num_inference_steps=10, output_type="np").images
    ours = pipeline(unet, scheduler)(2, 10, generator=torch.Generator().manual_seed(5), output_type="np").images
    np.testing.assert_allclose(ours, expected, rtol=0, atol=ROUNDING)  # maps lie channels last here


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_channels_last(channels):
    pipe = pipeline(class_network(in_channels=channels, out_channels=channels))
    formats = []
    pipe.unet.stem.register_forward_hook(lambda module, images, maps: formats.append(maps.stride()[1]))
    images = pipe(2, 2, class_labels=1, guidance_scale=2.0, guidance_interval=(0, 0.5), output_type="latent").images
    assert formats == [1, 1]  # with guidance and without
    assert images.is_contiguous()
    assert all(parameter.is_contiguous() for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm-solver++", "heun"])
def test_image_depends_on_its_own_generator_alone(name):
    pipe = pipeline(scheduler=sampler(name, DDPMScheduler()))
    together = pipe(5, 4, generator=seeded(0, 1, 2, 3, 4), max_batch=5, output_type="latent").images
    in_batches = pipe(5, 4, generator=seeded(0, 1, 2, 3, 4), max_batch=2, output_type="latent").images
    alone = pipe(1, 4, generator=seeded(3), output_type="latent").images
    torch.testing.assert_close(in_batches, together, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(alone[0], together[3], atol=ROUNDING, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_deterministic_sampler_gives_the_same_images_in_any_batches_from_one_generator():
    pipe = pipeline(scheduler=sampler("dpm-solver++", DDPMScheduler()))
    results = [
        pipe(5, 4, generator=torch.Generator().manual_seed(1), max_batch=n, output_type="latent").images for n in (5, 2)
    ]
    torch.testing.assert_close(*results, atol=ROUNDING, rtol=0)


def test_images_of_any_size_and_given_noise():
    pipe = pipeline()
    assert pipe(1, 2, height=5, width=11, output_type="np").images.shape == (1, 5, 11, 1)
    noise = torch.randn(2, 1, 8, 8)
    results = [pipe(2, 3, latents=noise, output_type="latent").images for _ in range(2)]
    assert torch.equal(*results)


def test_non_square_sample_size_is_the_default_size():
    pipe = pipeline(network(sample_size=(4, 6)))
    assert pipe(output_type="pt", num_inference_steps=2).images.shape == (1, 1, 4, 6)


def test_components_are_not_changed_by_a_call():
    unet = network(num_classes=2).to_segmentation().train()
    scheduler = DDPMScheduler()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    config = dict(scheduler.config)
    pipe = pipeline(unet, scheduler)
    pipe(num_inference_steps=2)
    assert unet.active_head == "segmentation" and unet.training
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_eta_reaches_ddim_and_is_refused_elsewhere():
    pipe = pipeline()
    noise = torch.randn(1, 1, 8, 8)
    plain, noisy = (
        pipe(1, 4, latents=noise, eta=eta, generator=seeded(0), output_type="latent").images for eta in (0.0, 1.0)
    )
    assert (plain - noisy).abs().max() > 0.01
    with pytest.raises(ValueError, match="eta is 0.5, but DDPMScheduler.step takes none"):
        pipeline(scheduler=DDPMScheduler())(eta=0.5)


def test_scheduler_without_noise_scale_and_input_scale_works():
    assert not hasattr(FlowMatchEulerDiscreteScheduler, "scale_model_input")
    images = pipeline(scheduler=FlowMatchEulerDiscreteScheduler())(1, 3, output_type="latent").images
    assert torch.isfinite(images).all()


def test_half_precision_network_samples_in_float32():
    images = pipeline(network().to(torch.bfloat16))(1, 2, output_type="latent").images
    assert images.dtype == torch.float32


# --- classes and guidance


def class_network(**config) -> UNet:
    unet = network(num_class_embeds=3, label_dropout=0.1, **config)
    torch.nn.init.normal_(unet.time_embed.classes.weight, std=3.0)
    return unet


def one_step(pipe, **arguments):
    """The result of one DDIM step, in which the prediction enters linearly."""
    return pipe(1, 1, latents=torch.ones(1, 1, 8, 8), output_type="latent", **arguments).images


def test_guidance_goes_from_the_null_class_to_the_class():
    # One step of DDIM is linear in the prediction, so guidance w gives uncond + w (cond - uncond) of the images too.
    settings = {"clip_sample": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    pipe = pipeline(class_network(), DDIMScheduler(**settings))
    unconditional, conditional = one_step(pipe), one_step(pipe, class_labels=1)
    guided = one_step(pipe, class_labels=1, guidance_scale=3.0)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one_step(pipe, class_labels=1, guidance_scale=0.0), unconditional, atol=1e-4, rtol=1e-4)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_guidance_interval_is_a_part_of_the_steps():
    pipe = pipeline(class_network())
    runs = []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: runs.append(len(arguments[0])))
    pipe(1, 4, class_labels=0, guidance_scale=2.0, guidance_interval=(0.25, 0.75))
    assert runs == [1, 2, 2, 1]  # steps at 0, 1/4, 1/2 and 3/4 of the schedule; a guided one sees the image twice


def test_classes_by_index_name_list_and_tensor():
    pipe = pipeline(class_network(), label_names=["cat", "dog", "hen"])
    noise = torch.randn(2, 1, 8, 8)

    def images(class_labels):
        return pipe(2, 2, class_labels, latents=noise, output_type="latent").images

    expected = images([2, 2])
    for same in (2, "hen", ["hen", 2], torch.tensor([2, 2])):
        assert torch.equal(images(same), expected)
    assert not torch.equal(images(["cat", "hen"])[0], expected[0])
    with pytest.raises(ValueError, match="class_labels is 'cow', but the classes are"):
        images("cow")


def test_digits_are_a_name_where_classes_have_names_and_else_an_index():
    noise = torch.randn(2, 1, 8, 8)

    def images(class_labels, label_names):
        pipe = pipeline(class_network(), label_names=label_names)
        return pipe(2, 2, class_labels, latents=noise, output_type="latent").images

    numbers = ["10", "0", "1"]
    assert torch.equal(images("1", numbers), images(2, None))
    assert torch.equal(images(1, numbers), images("1", None))
    with pytest.raises(ValueError, match="class_labels is '2', but the classes are 10, 0, 1"):
        images("2", numbers)
    with pytest.raises(ValueError, match="class_labels is 'cow', but the classes have no names; give an index"):
        images("cow", None)


def test_class_batches_keep_their_labels():
    pipe = pipeline(class_network())
    noise, labels = torch.randn(5, 1, 8, 8), [0, 1, 2, 1, 0]
    results = [pipe(5, 2, labels, 2.0, latents=noise, max_batch=n, output_type="latent").images for n in (5, 2)]
    torch.testing.assert_close(*results, atol=ROUNDING, rtol=0)


# --- output types


@pytest.mark.parametrize(
    ("channels", "pixel_range", "mode"),
    [
        (1, None, "L"),
        (3, None, "RGB"),
        (4, None, "RGBA"),
        (1, PIXELS_12_BIT, "I;16"),
        (1, PixelRange((-2.0,), (3.0,), "float32").to_dict(), "F"),
    ],
)
def test_pil_modes(channels, pixel_range, mode):
    pipe = pipeline(network(in_channels=channels, out_channels=channels), pixel_range=pixel_range)
    images = pipe(2, 2, height=6, width=10).images
    assert [(image.mode, image.size) for image in images] == [(mode, (10, 6))] * 2


@pytest.mark.parametrize(("channels", "pixel_range"), [(2, None), (7, None), (3, PIXELS_12_BIT)])
def test_images_that_pil_cannot_hold_name_the_other_types(channels, pixel_range):
    pipe = pipeline(network(in_channels=channels, out_channels=channels), pixel_range=pixel_range)
    with pytest.raises(ValueError, match=f"{channels} channels of .*'np' or 'pt'.*'stored'"):
        pipe()
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, channels)


def test_output_types_agree():
    pipe = pipeline(pixel_range=PIXELS_12_BIT)
    latent, array, tensor, stored, images = (
        pipe(2, 3, generator=seeded(0, 1), output_type=kind).images for kind in ("latent", "np", "pt", "stored", "pil")
    )
    assert latent.abs().max() <= 1.5 and latent.min() < 0
    assert array.dtype == np.float32 and array.shape == (2, 8, 8, 1)
    torch.testing.assert_close(tensor, (latent / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(array[..., 0], tensor[:, 0].numpy())
    assert stored.dtype == torch.uint16 and stored.shape == (2, 1, 8, 8)
    assert (stored.float() / 4095 - tensor).abs().max() <= 0.5 / 4095 + 1e-6  # rounded to the nearest value
    assert np.array_equal(np.asarray(images[1]), stored[1, 0].numpy())


def test_tuple_on_request():
    (images,) = pipeline()(num_inference_steps=2, return_dict=False)
    assert isinstance(images[0], Image.Image)


# --- callbacks and the progress bar


def test_callback_sees_each_step_of_each_batch_and_may_replace_the_latents():
    pipe = pipeline()
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe(3, 2, max_batch=2, callback_on_step_end=callback, output_type="latent").images
    assert steps == [(0, 500), (1, 0)] * 2
    assert images.shape[0] == 3 and not images.any()


def test_callback_changes_guidance_and_interrupts():
    pipe = pipeline(class_network())

    def stronger(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    pipe(1, 3, 0, 2.0, callback_on_step_end=stronger)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps

    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    pipe(1, 5, 0, callback_on_step_end=stop)
    assert steps == [0, 1]


def test_guidance_that_a_callback_changes_starts_again_with_each_batch():
    pipe = pipeline(class_network())
    scales = []

    def weaker(pipe, step, timestep, tensors):
        scales.append(pipe.guidance_scale)
        pipe._guidance_scale = 1.0

    pipe(2, 3, 0, 5.0, max_batch=1, callback_on_step_end=weaker)
    assert scales == [5.0, 1.0, 1.0] * 2


def test_a_callback_that_only_looks_changes_nothing():
    pipe, noise, seen = pipeline(), torch.randn(1, 1, 8, 8), []

    def look(pipe, step, timestep, tensors):
        seen.append(set(tensors))

    expected = pipe(1, 2, latents=noise, output_type="latent").images
    for names in (["latents"], None):
        options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
        assert torch.equal(pipe(1, 2, latents=noise, output_type="latent", **options).images, expected)
    assert seen == [{"latents"}] * 2 + [set()] * 2


@pytest.mark.parametrize(("last", "count"), [((0, 0), 2), ((0, 4), 2), ((1, 2), 4), ((2, 4), 5)])
def test_batches_that_never_began_are_no_images(last, count):
    """`last` is the batch and the step at which the call is interrupted."""
    pipe, begun = pipeline(), []

    def stop(pipe, step, timestep, tensors):
        begun.extend([step] * (step == 0))
        pipe._interrupt = (len(begun) - 1, step) == last
        return tensors

    noise = torch.randn(5, 1, 8, 8, generator=torch.manual_seed(0))
    images = pipe(5, 5, latents=noise, max_batch=2, callback_on_step_end=stop, output_type="latent").images
    assert len(images) == count
    assert all(not torch.equal(one, other) for one, other in zip(images, noise))


def test_one_progress_bar_over_all_batches(capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(5, 3, max_batch=2)
    assert "9/9" in capsys.readouterr().err


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"max_batch": -1}, "max_batch is -1"),
        ({"width": 1.5}, "width is 1.5"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"generator": seeded(0, 1, 2)}, "there are 3 generators, but the number of images is 1"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"must be \(1, 1, 8, 8\)"),
        ({"latents": np.zeros((1, 1, 8, 8))}, "latents are a ndarray, but must be a tensor"),
        ({"class_labels": 0}, "the network has no classes"),
        ({"guidance_scale": 2.0}, "but there is no class to guide to"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\], but must be among \['latents'\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**arguments)


def test_wrong_classes_are_named():
    untrained_null = pipeline(network(num_class_embeds=3))
    with pytest.raises(ValueError, match="pass class_labels from 0 to 2, or train with label_dropout > 0"):
        untrained_null()
    with pytest.raises(ValueError, match="train with label_dropout > 0"):
        untrained_null(class_labels=0, guidance_scale=2.0)
    pipe = pipeline(class_network())
    for interval, scale, rule in (
        ((0.5, 0.5), 2.0, "must be two numbers, 0 <= low < high <= 1"),
        ((), 2.0, "must be two numbers"),
        ((0.0, 0.5), 1.0, "there is no guidance"),
        ((0.55, 0.7), 2.0, "the 2 steps begin at multiples of 1 / 2, none of them in it"),
    ):
        with pytest.raises(ValueError, match=f"guidance_interval is {re.escape(repr(interval))}, but .*{rule}"):
            pipe(1, 2, class_labels=0, guidance_scale=scale, guidance_interval=interval)
    pipe(1, 2, class_labels=0, guidance_scale=2.0, guidance_interval=np.array([0, 0.5]), eta=np.float32(0.5))


def test_sides_of_zero_are_refused():
    for side in ("height", "width"):
        with pytest.raises(ValueError, match=f"{side} is 0, but must be an integer of at least 1"):
            pipeline()(1, 2, **{side: 0})


def test_more_steps_than_training_timesteps_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps is 20, but the network was trained with 10 timesteps"):
        pipeline(scheduler=DDPMScheduler(num_train_timesteps=10))()


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_noise_prediction_on_a_schedule_that_ends_at_zero_signal_is_refused(kind):
    """Also if its betas are given; velocities are welcome."""
    rescaled = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    given = {"trained_betas": kind(**rescaled).betas.numpy(), "timestep_spacing": "trailing"}
    for settings in (rescaled, given):
        with pytest.raises(ValueError, match="ends at zero signal, .* 'epsilon' cannot be sampled"):
            pipeline(scheduler=kind(**settings))
        pipe = pipeline(scheduler=kind(**settings, prediction_type="v_prediction"))
        assert len(pipe(1, 3).images) == 1
        pipe.scheduler = kind(**settings)
        with pytest.raises(ValueError, match="prediction_type='epsilon', but the network was trained with"):
            pipe(1, 3)


def test_given_betas_are_the_whole_noise_schedule():
    """Classes of schedulers have other defaults for the start and the end, which are not used then."""
    betas = np.linspace(1e-4, 0.02, 50)
    pipe = pipeline(scheduler=DDPMScheduler(num_train_timesteps=50, trained_betas=betas))
    pipe.scheduler = HeunDiscreteScheduler(num_train_timesteps=50, trained_betas=betas)
    assert len(pipe(1, 2).images) == 1
    for other in (betas / 2, None):
        pipe.scheduler = HeunDiscreteScheduler(num_train_timesteps=50, trained_betas=other)
        with pytest.raises(ValueError, match="trained_betas=.* but the network was trained with"):
            pipe(1, 2)


@pytest.mark.parametrize("timesteps", [49, 51])
def test_another_number_of_betas_than_that_of_the_timesteps_is_refused(timesteps):
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, trained_betas=np.linspace(1e-4, 0.02, 50))
    message = f"num_train_timesteps is {timesteps}, but there are 50 trained_betas, .* set num_train_timesteps=50"
    for make in (lambda: pipeline(scheduler=scheduler), lambda: sampler("ddim", scheduler)):
        with pytest.raises(ValueError, match=message):
            make()


def test_images_that_are_not_finite_are_an_error():
    pipe = pipeline()
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        pipe(1, 2, latents=torch.full((1, 1, 8, 8), torch.nan))


def test_more_steps_than_a_network_was_tuned_for_are_warned_of():
    pipe = pipeline(scheduler=sampler("lcm", DDPMScheduler()), few_steps=4)
    with pytest.warns(UserWarning, match="num_inference_steps is 5, but the network was tuned for 1 to 4 steps"):
        pipe(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe(1, 4)


def test_networks_that_cannot_generate_are_refused():
    for config in ({"out_channels": None, "num_classes": 2}, {"in_channels": 2}, {"time_embedding": None}):
        with pytest.raises(ValueError, match="as many channels out as in"):
            ImageGenerationPipeline(network(**config), DDPMScheduler())
    with pytest.raises(ValueError, match="keys low, high, dtype and"):
        pipeline(pixel_range={"low": 0})


# --- saving and loading


def test_saved_pipeline_comes_back_whole_and_without_warning(tmp_path, diffusers_log):
    names = ["cat", "dog", "hen"]
    pipe = pipeline(class_network(), pixel_range=PIXELS_12_BIT, label_names=names)
    pipe.save_pretrained(tmp_path)
    again = ImageGenerationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.pixel_range == PixelRange.from_dict(PIXELS_12_BIT)
    assert again.label_names == names
    expected, images = (p(2, 3, "dog", generator=seeded(0, 1), output_type="pt").images for p in (pipe, again))
    assert torch.equal(images, expected)

    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["_label_names"] == {"list": names}
    assert not diffusers_log.records


def test_stock_pipeline_loads_the_same_folder_without_warning(tmp_path, diffusers_log):
    pipe = pipeline(scheduler=DDPMScheduler(), pixel_range=PIXELS_12_BIT, label_names=["a"])
    pipe.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert not diffusers_log.records
    expected = pipe(1, 5, generator=torch.Generator().manual_seed(0), output_type="np").images
    images = stock(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(images, expected, rtol=0, atol=ROUNDING)


def test_arguments_of_from_pretrained_win_over_the_saved_ones(tmp_path, diffusers_log):
    pipeline(pixel_range=PIXELS_12_BIT).save_pretrained(tmp_path)
    other = PixelRange.full("uint8").to_dict()
    assert ImageGenerationPipeline.from_pretrained(tmp_path, pixel_range=other).pixel_range.dtype == "uint8"
    assert not diffusers_log.records


def test_from_pipe_keeps_components_and_settings(diffusers_log):
    pipe = pipeline(pixel_range=PIXELS_12_BIT, label_names=["a", "b"])
    stock = DDPMPipeline.from_pipe(pipe, unet=pipe.unet)
    for source in (pipe, stock):
        made = ImageGenerationPipeline.from_pipe(source)
        assert made.unet is pipe.unet and made.scheduler is pipe.scheduler
        assert made.pixel_range == pipe.pixel_range and made.label_names == ["a", "b"]


def test_file_works_as_custom_pipeline(tmp_path, monkeypatch, diffusers_log):
    pipe = pipeline(pixel_range=PIXELS_12_BIT)
    pipe.save_pretrained(tmp_path / "run")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    again = DiffusionPipeline.from_pretrained(
        tmp_path / "run", custom_pipeline=image_generation.__file__, trust_remote_code=True
    )
    again.set_progress_bar_config(disable=True)
    assert type(again).__name__ == "ImageGenerationPipeline" and type(again) is not ImageGenerationPipeline
    images, expected = (p(1, 2, generator=seeded(0), output_type="stored").images for p in (again, pipe))
    assert torch.equal(images, expected)
