"""A run reads every image as its own were read: converted channels and stated axes hold for what it gets later."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.files import write_json
from unet_diffusion.pipelines import SegmentationPipeline, SuperResolutionPipeline
from unet_diffusion.saved_runs import load_pipeline, stated_preparation


def saved_run(folder: Path, pipe: SegmentationPipeline | SuperResolutionPipeline, **options: object) -> Path:
    """Saves a pipeline as a run whose training had these options of its data."""
    pipe.save_pretrained(folder)
    write_json(folder / "config.json", {"data": options})
    return folder


@pytest.fixture
def colour_segmenter() -> SegmentationPipeline:
    torch.manual_seed(0)
    unet = UNet(in_channels=3, out_channels=None, channels=[8, 8], attention=[False, False], num_classes=2)
    return SegmentationPipeline(unet)


def test_a_run_on_images_with_alpha_segments_its_own_files(tmp_path):
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for index in range(4):
        image = random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        image[..., 3] = 255 if index else 128
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray((image[..., 0] > 128).astype(np.uint8)).save(tmp_path / "masks" / f"{index}.png")
    data = ["--data", str(tmp_path / "images"), "--masks", str(tmp_path / "masks"), "--channels", "3"]
    network = ["--model", "tiny", "--crop-size", "32", "--steps", "1", "--batch-size", "2", "--warmup-steps", "0"]
    folder = tmp_path / "run"
    run("train-segmentation", [*data, *network, "--output", str(folder)])
    run("segment", ["--run", str(folder), "--inputs", str(tmp_path / "images")])

    colours = Image.open(tmp_path / "images" / "0.png")  # half transparent: alpha is laid on white, as in training
    on_white = np.asarray(colours, dtype=np.float32)[..., :3] * (128 / 255) + 255 * (127 / 255)
    pipe = load_pipeline(SegmentationPipeline, folder)
    (expected,) = pipe(on_white.round().astype(np.uint8), mixed_precision="auto").masks
    assert np.array_equal(np.asarray(Image.open(folder / "masks" / "0.png")), np.asarray(expected))


def test_grey_images_are_read_as_the_colour_ones_of_a_run_that_converted_them(tmp_path, colour_segmenter):
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    converting = load_pipeline(SegmentationPipeline, saved_run(tmp_path / "converting", colour_segmenter, channels=3))
    assert np.array_equal(converting(grey).probabilities, converting(np.stack([grey] * 3, axis=2)).probabilities)
    strict = load_pipeline(SegmentationPipeline, saved_run(tmp_path / "strict", colour_segmenter, channels=None))
    with pytest.raises(ValueError, match="has 1 channel, but the network takes 3"):
        strict(grey)


def test_channels_that_cannot_be_converted_are_refused(tmp_path, colour_segmenter):
    pipe = load_pipeline(SegmentationPipeline, saved_run(tmp_path / "run", colour_segmenter, channels=3))
    with pytest.raises(ValueError, match="7 channels of uint8 cannot be converted to 3"):
        pipe(np.zeros((16, 16, 7), np.uint8))


def test_stated_axes_hold_for_arrays_that_could_be_either(tmp_path, colour_segmenter):
    array = np.random.default_rng(0).integers(0, 256, (3, 16, 3), dtype=np.uint8)
    read = {
        axes: load_pipeline(SegmentationPipeline, saved_run(tmp_path / str(axes), colour_segmenter, axes=axes))
        for axes in ("CHW", "HWC", None)
    }
    shapes = {axes: tuple(next(pipe.read_images(array)).shape) for axes, pipe in read.items()}
    assert shapes == {"CHW": (3, 16, 3), "HWC": (3, 3, 16), None: (3, 3, 16)}


def test_upscale_converts_too(tmp_path):
    unet = UNet(in_channels=2, out_channels=1, channels=[8, 8], attention=[False, False])
    pipe = SuperResolutionPipeline(unet, DDPMScheduler(), scale=2)
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "image.png")
    folder = saved_run(tmp_path / "run", pipe, channels=1)
    run("upscale", ["--run", str(folder), "--inputs", str(tmp_path / "image.png"), "--steps", "1"])
    (large,) = folder.rglob("image.png")
    assert Image.open(large).size == (16, 16)


@pytest.mark.parametrize("content", [{}, {"data": None}, {"data": {"channels": "3", "axes": "WHC"}}, {"data": [3]}])
def test_what_states_nothing_that_is_known_changes_nothing(tmp_path, content):
    write_json(tmp_path / "config.json", content)
    preparation = stated_preparation(tmp_path)
    assert (preparation.channels, preparation.axes) == (None, None)
