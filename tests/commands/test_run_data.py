"""The data of a finished run."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.tiny import network
from unet_diffusion.commands.options.evaluate_generation import RealData
from unet_diffusion.commands.run_data import held_out_masks, loading, own_images
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import load_images
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline


def test_masks_that_were_held_out_keep_the_classes_of_the_run(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    for folder in ("images", "masks", "run"):
        (tmp_path / folder).mkdir()
    for number in range(6):
        mask = np.random.default_rng(number).integers(0, 3, (8, 8))
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(colours[mask]).save(tmp_path / "masks" / f"{number}.png")
    labelmap = tmp_path / "masks" / "labelmap.txt"
    labelmap.write_text("background:0,0,0::\ncat:255,0,0::\ndog:0,0,255::")
    config = MaskedDataConfig(
        str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.5,
    )
    data = load_masked(config)
    run = tmp_path / "run"
    make_record(data, config.preparation, mask_encoding=data.encoding.to_dict()).write(run)
    (run / "config.json").write_text(json.dumps({"data": asdict(config)}))
    learnt = [data.validation[i]["mask"] for i in range(len(data.validation))]
    for text in ("background:0,0,0::\ndog:0,0,255::\ncat:255,0,0::", None):
        labelmap.unlink() if text is None else labelmap.write_text(text)
        own = held_out_masks(run, 3)
        assert len(own) == len(learnt) > 0
        assert all(torch.equal(own[i]["mask"], mask) for i, mask in enumerate(learnt))


@pytest.fixture
def images(tmp_path):
    """Options of ten grey images, image n of value 20 n; the range is measured on those that are trained on."""
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return DataConfig(
        str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.3, percentiles=(0, 100)
    )


def write_run(run, pipe, config: DataConfig, **options) -> None:
    pipe.save_pretrained(run)
    make_record(load_images(config), config.preparation).write(run)
    (run / "config.json").write_text(json.dumps({"data": asdict(config), **options}))


def test_own_images_keep_the_range_of_the_run_when_images_are_gone(images, tmp_path):
    run, learnt = tmp_path / "run", load_images(images).train
    assert learnt.pixel_range.low < learnt.pixel_range.high
    pipe = ImageGenerationPipeline(network(), DDPMScheduler(), learnt.pixel_range.to_dict())
    write_run(run, pipe, images)
    brightest = int(learnt.pixel_range.high[0]) // 20
    (tmp_path / "images" / f"{brightest}.png").unlink()
    assert load_images(images).train.pixel_range != learnt.pixel_range
    own = own_images(run)
    assert len(own.train) == len(learnt) - 1
    assert own.train.pixel_range == own.validation.pixel_range == learnt.pixel_range


def test_own_images_are_kept_in_the_stated_cache(images, tmp_path):
    write_run(tmp_path / "run", ImageGenerationPipeline(network(), DDPMScheduler()), images)
    place = tmp_path / "other"
    own_images(tmp_path / "run", loading(RealData(cache_dir=str(place))))
    assert any(place.iterdir())


def test_images_with_masks_are_not_those_that_a_kept_noise_head_learnt_from(images, tmp_path):
    pipe = SegmentationPipeline(network(num_classes=2), DDPMScheduler())
    write_run(tmp_path / "run", pipe, images, model="runs/ddpm", segmentation={"learn": "head"})
    with pytest.raises(ValueError, match="noise head of .*run did not learn .* it comes from runs/ddpm; give data"):
        own_images(tmp_path / "run")
