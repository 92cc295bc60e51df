"""Numbers of NumPy and PyTorch work wherever Python's do, and are saved as these; booleans are no numbers."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tests.support.segmentation import image
from tests.support.segmentation import network as segmenting
from tests.support.segmentation import pipeline as segmentation_pipeline
from tests.support.super_resolution import network as enlarging
from tests.support.tiny import network
from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier, UNet2DAdapter
from unet_diffusion.checks import class_index, is_count, is_number, plain
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.evaluation.classifier import ImageClassifier
from unet_diffusion.pipelines import ImageGenerationPipeline, SuperResolutionPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.config import (
    DiffusionConfig,
    FrozenFeaturesConfig,
    JointConfig,
    SegmentationConfig,
    SuperResolutionConfig,
)
from unet_diffusion.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor]


def as_numpy(value: Any) -> Any:
    """The same value with numbers of NumPy, and arrays in place of tuples of numbers."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return np.array(value)
    return (np.int64 if isinstance(value, int) else np.float64)(value)


# checks


@pytest.mark.parametrize("number", [3, np.int64(3), np.int32(3), np.uint8(3)])
def test_integers_of_numpy_are_counts(number):
    assert is_count(number) and is_count(number, 3) and not is_count(number, 4) and is_number(number)


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float64(3), "3", None, torch.ones(2)])
def test_booleans_floats_and_text_are_no_counts(value):
    assert not is_count(value)
    assert is_number(value) == isinstance(value, (float, np.floating))


def test_plain_numbers_are_found_within_lists_tuples_and_dictionaries():
    mixed = (np.int32(1), [torch.tensor(2.5), "x", None], {"a": np.array([3, 4])}, np.bool_(True))
    assert plain(mixed) == (1, [2.5, "x", None], {"a": (3, 4)}, True)
    assert json.loads(json.dumps(plain(mixed))) == [1, [2.5, "x", None], {"a": [3, 4]}, True]


@pytest.mark.parametrize("kind", INTEGERS)
def test_keyed_seeds_depend_on_the_number_alone(kind):
    assert keyed_seed(kind(7), "noise", kind(2)) == keyed_seed(7, "noise", 2)


# options


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainingConfig, {"steps": 300, "batch_size": 4, "learning_rate": 0.5, "seed": 3, "ema_decay": 0.5}),
        (DataConfig, {"image_size": 9, "crop_size": 8, "max_images": 5, "value_range": (0.0, 4.0)}),
        (MaskedDataConfig, {"data": "x", "num_classes": 3, "mask_encoding": "binary", "mask_threshold": 2.5}),
        (DiffusionConfig, {"num_train_timesteps": 50, "min_snr_gamma": 2.0, "preview_images": 2}),
        (SuperResolutionConfig, {"scale": 2, "condition_noise": 0.5}),
        (SegmentationConfig, {"timestep": 5, "trunk_rate": 0.5, "patience": 2}),
        (FrozenFeaturesConfig, {"timesteps": (1, 2), "stages": (0,), "hidden": (4, 3)}),
        (JointConfig, {"denoising_weight": 0.5, "confidence": 0.75}),
        (AugmentationConfig, {"elastic": 2.5, "elastic_grid": 4, "scale": (0.5, 2.0), "colour": 0.5}),
        (EvaluateGeneration, {"count": 3, "seed": 4, "training_images": 5}),
    ],
)
def test_options_keep_plain_numbers(kind, values):
    expected = kind(**values)
    options = kind(**{name: as_numpy(value) for name, value in values.items()})
    assert options == expected
    assert json.dumps(asdict(options), default=str) == json.dumps(asdict(expected), default=str)


@pytest.mark.parametrize("values", [{"steps": True}, {"seed": True}, {"seed": 0.5}, {"learning_rate": True}])
def test_options_refuse_booleans_and_broken_seeds(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} is .*, but must be"):
        TrainingConfig(**values)


# networks


CONFIG = {"sample_size": (8, 6), "in_channels": 1, "out_channels": 1, "channels": (8, 16), "head_channels": 8}
STOCK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
CLASSIFIER = {"channels": (8,), "strides": (1,), "stages": (0,), "timesteps": (5, 9), "num_classes": 2, "hidden": (4,)}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (UNet, {**CONFIG, "num_classes": 3, "num_class_embeds": 4, "label_dropout": 0.1, "segmentation_timestep": 2}),
        (UNet2DAdapter, {**STOCK, "num_classes": 3}),
        (PixelClassifier, CLASSIFIER),
        (ImageClassifier, {"in_channels": 1, "num_classes": 3, "widths": (8, 16), "dropout": 0.5}),
    ],
)
def test_a_network_of_numpy_numbers_is_saved_as_json(tmp_path, kind, values):
    numbers = {n: v if n.endswith("types") else as_numpy(v) for n, v in values.items()}
    kind(**numbers).save_pretrained(tmp_path / "numpy")
    kind(**values).save_pretrained(tmp_path / "python")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("numpy", "python")]
    assert json.loads(texts[0]) == json.loads(texts[1])


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_head_takes_a_number_of_classes_of_any_kind(tmp_path, kind):
    unet = network().to_segmentation(num_classes=kind(3))
    assert unet.to_segmentation(kind(3)).config.num_classes == 3
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 3
    assert unet(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 3, 8, 8)
    for wrong in (True, np.bool_(True), 3.5):
        with pytest.raises(ValueError, match="num_classes is "):
            network().to_segmentation(wrong)


@pytest.mark.parametrize("labels", [(0, 2), [0, 2], np.array([0, 2]), np.array([0, 2], dtype=np.int32)], ids=str)
def test_a_network_takes_classes_and_timesteps_of_any_kind(labels):
    unet = network(num_class_embeds=3, label_dropout=0.1)
    sample = torch.ones(2, 1, 8, 8)
    expected = unet(sample, 5, torch.tensor([0, 2])).sample
    assert torch.equal(unet(sample, np.int64(5), labels).sample, expected)
    assert torch.equal(unet(sample, np.float32(5), labels).sample, expected)


# pipelines


def generating(**arguments) -> ImageGenerationPipeline:
    unet = network(num_class_embeds=3, label_dropout=0.1)
    pipe = ImageGenerationPipeline(unet, DDIMScheduler(), label_names=["a", "b", "c"], **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def upscaling() -> SuperResolutionPipeline:
    pipe = SuperResolutionPipeline(enlarging(), DDIMScheduler(), scale=np.int64(2))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_generation_takes_numbers_of_any_kind(kind):
    given = {"batch_size": 3, "num_inference_steps": 2, "height": 6, "width": 7, "max_batch": 2}
    pipe, last = generating(), {"guidance_scale": 2.0, "output_type": "latent", "class_labels": [2, 2, 2]}
    expected = pipe(**given, **last, generator=seeded(1, 2, 3)).images
    others = {**last, "guidance_scale": np.float32(2), "class_labels": kind(2)}
    images = pipe(**{name: kind(value) for name, value in given.items()}, **others, generator=seeded(1, 2, 3)).images
    assert torch.equal(images, expected)


LABELS = [[0, 2], (0, 2), np.array([0, 2]), torch.tensor([0, 2]), ["a", np.int64(2)], np.array(["a", "c"])]


@pytest.mark.parametrize("labels", LABELS, ids=repr)
def test_generation_takes_classes_of_any_kind(labels):
    pipe = generating()
    images = [
        pipe(2, 2, class_labels=each, generator=seeded(1, 2), output_type="latent").images for each in (labels, [0, 2])
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("labels", [True, 1.0, [True, 1], [0, 1.5], np.array([0.0, 1.0]), torch.tensor([True, False])])
def test_classes_are_names_or_integers(labels):
    with pytest.raises(ValueError, match="class_labels is .*, but a class is a name, or an integer of at least 0"):
        generating()(2, 2, class_labels=labels)


@pytest.mark.parametrize("name", ["batch_size", "num_inference_steps", "max_batch", "height"])
def test_generation_refuses_booleans(name):
    with pytest.raises(ValueError, match=f"{name} is True, but must be an integer of at least 1"):
        generating()(**{name: True})


def test_pipelines_are_saved_with_plain_numbers(tmp_path):
    pixel_range = {"low": np.array([0.0]), "high": np.array([200.0]), "dtype": "uint8"}
    generating(pixel_range=pixel_range).save_pretrained(tmp_path / "generation")
    upscaling().save_pretrained(tmp_path / "upscaling")
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], dtype=np.uint8)
    segmentation_pipeline(palette=palette, pixel_range=pixel_range).save_pretrained(tmp_path / "segmentation")
    loaded = SuperResolutionPipeline.from_pretrained(tmp_path / "upscaling")
    assert type(loaded.scale) is int and loaded.scale == 2


def calls(generator) -> dict[str, Any]:
    """Calls of our pipelines for two images, whose results depend on the generators."""
    small, noise = [image(4, 4), image(4, 4, seed=1)], {"timesteps": [np.int64(30)], "num_draws": np.int64(2)}
    torch.manual_seed(0)
    masks = segmentation_pipeline(segmenting(), scheduler=DDPMScheduler())
    return {
        "generation": lambda: generating()(2, 2, generator=generator, output_type="latent").images,
        "upscaling": lambda: upscaling()(small, np.int64(2), generator, tile_size=np.int32(8), output_type="pt").images,
        "segmentation": lambda: masks(small, np.int64(8), **noise, generator=generator, output_type="pt").probabilities,
    }


@pytest.mark.parametrize("name", ["generation", "upscaling", "segmentation"])
def test_tuples_of_generators_work_as_lists_do_and_one_for_each_image_is_needed(name):
    listed, tupled, other = (calls(given)[name]() for given in (seeded(1, 2), tuple(seeded(1, 2)), seeded(1, 3)))
    assert all(torch.equal(*pair) for pair in zip(listed, tupled))
    assert torch.equal(listed[0], other[0]) and not torch.equal(listed[1], other[1])
    for wrong in (seeded(1), seeded(1, 2, 3), tuple(seeded(1, 2, 3)), ()):
        message = f"there are {len(wrong)} generators, but the number of images is 2; pass one, or one for each image"
        with pytest.raises(ValueError, match=message):
            calls(wrong)[name]()
    with pytest.raises(ValueError, match=r"generator is \[0, 1\], but must be a torch.Generator"):
        calls([0, 1])[name]()


@pytest.mark.parametrize(("kind", "name"), [(DataConfig, "flip"), (DiffusionConfig, "class_conditional")])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_only_booleans_are_booleans(kind, name, value):
    """Any text would count as True."""
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but must be True or False"):
        kind(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value):
    with pytest.raises(ValueError, match="learning_rate is "):
        TrainingConfig(learning_rate=value)
    with pytest.raises(ValueError, match="guidance_scale is "):
        Sample(guidance_scale=value)
    assert TrainingConfig(max_grad_norm=float("inf")).max_grad_norm > 1  # no clipping


def test_a_string_is_one_input_and_one_class():
    assert Segment(inputs="some/images").inputs == ("some/images",)
    assert Sample(class_labels="cat").class_labels == ("cat",)


def test_an_integer_is_the_index_of_a_class_not_its_name():
    assert Sample(class_labels=1).class_labels == Sample(class_labels=(1,)).class_labels == (1,)
    assert class_index(Sample(class_labels=1).class_labels[0], ("1", "cat"), "class_labels") == 1
