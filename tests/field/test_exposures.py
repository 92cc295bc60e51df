"""Images of one kind whose exposures differ: a range for each is proposed, and a run with it knows brighter images."""

import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.commands.evaluate_generation import load_as_learnt
from unet_diffusion.commands.options.evaluate_generation import RealData
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

datasets.disable_progress_bars()

GAINS = (1, 2, 4, 8)
OWN_RANGE = ["--percentiles", "0", "100", "--percentiles-of", "image"]


def write(folder: Path, gains: tuple[int, ...], count: int = 12) -> list[str]:
    """Writes scenes of squares on a dark ground, each exposed by one of the gains, with masks; returns the options."""
    random = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        mask = np.zeros((32, 32), np.uint8)
        for _ in range(3):
            y, x = random.integers(0, 24, 2)
            mask[y : y + 8, x : x + 8] = 1
        scene = (2 + 20 * mask + random.integers(0, 8, mask.shape)).astype(np.uint8)
        Image.fromarray(scene * gains[index % len(gains)]).save(folder / "images" / f"{index:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index:02}.png")
    return ["--data", str(folder / "images"), "--masks", str(folder / "masks"), "--cache-dir", str(folder / "cache")]


def doctor(capsys, options: list[str], *further: str) -> str:
    run("doctor", [options[1], *options[2:], *further])
    return capsys.readouterr().out


def test_different_exposures_are_noted_and_answered(tmp_path, capsys):
    options = write(tmp_path, GAINS)
    assert "percentiles 1 99.8 with percentiles_of image" in doctor(capsys, options)
    text = doctor(capsys, options, *OWN_RANGE)
    assert "percentiles_of" not in text
    assert "each image is stretched, its percentiles 0 and 100 to the ends of the range" in text


def test_equal_exposures_are_not(tmp_path, capsys):
    assert "percentiles_of" not in doctor(capsys, write(tmp_path, (4,)))


def test_the_exposure_of_an_image_does_not_change_its_mask_or_its_scores(tmp_path, capsys):
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    short = ["--steps", "3", "--warmup-steps", "1", "--batch-size", "2", "--validate-every", "3"]
    place = ["--model", str(network), "--output", str(tmp_path / "run")]
    run("train-segmentation", [*write(tmp_path / "labelled", GAINS), *OWN_RANGE, *short, *place])
    pipe = SegmentationPipeline.from_pretrained(tmp_path / "run")
    assert pipe.pixel_range == PixelRange.stretched("uint8", (0.0, 100.0))
    assert "its percentiles 0 and 100" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")

    scores = []
    for gain in (1, 8):
        options = write(tmp_path / f"gain-{gain}", (gain,), count=3)
        run("segment", ["--run", str(tmp_path / "run"), "--inputs", options[1], "--output", str(tmp_path / f"m{gain}")])
        run("evaluate", ["--run", str(tmp_path / "run"), *options, "--output", str(tmp_path / f"s{gain}")])
        text = (tmp_path / f"s{gain}" / "evaluation.json").read_text(encoding="utf-8")
        scores.append(json.loads(text)["masks"]["pooled"])
    assert scores[0] == pytest.approx(scores[1])
    for name in ("00.png", "01.png", "02.png"):
        one, other = (np.asarray(Image.open(tmp_path / f"m{gain}" / name)) for gain in (1, 8))
        assert np.array_equal(one, other)
    run("segment", ["--run", str(tmp_path / "run"), "--inputs", str(tmp_path / "gain-8" / "images"), "--instances",
                    "--output", str(tmp_path / "objects")])  # fmt: skip
    table = pandas.read_csv(tmp_path / "objects" / "objects.csv")
    assert len(table) and table["mean_0"].min() >= 8 * 2  # of the file, not of the range


@pytest.mark.parametrize(
    "learnt",
    [PixelRange.full("uint8"), PixelRange((0.0,), (200.0,), "uint8"), PixelRange.stretched("uint8", (0.0, 100.0))],
)
def test_real_images_are_compared_in_the_range_that_the_run_generates(tmp_path, learnt):
    write(tmp_path, GAINS)
    unet = UNet(in_channels=1, out_channels=1, channels=[8, 16], head_channels=8, sample_size=32)
    ImageGenerationPipeline(unet, DDPMScheduler(), learnt.to_dict()).save_pretrained(tmp_path / "run")
    options = {"data": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.2}
    images = load_as_learnt(RealData(**options), tmp_path / "run")
    stretch = Preparation(percentiles=learnt.percentiles)
    for part in (images.train, images.validation):
        assert part.pixel_range == learnt
    expected = {stretch(np.asarray(Image.open(path))[..., None]).tobytes() for path in (tmp_path / "images").iterdir()}
    assert {part.fetch(index)["image"].numpy().tobytes() for part in (images.train, images.validation)
            for index in range(len(part))} == expected  # fmt: skip
    with pytest.raises(ValueError, match="are mapped by .*; leave value_range and percentiles out"):
        load_as_learnt(RealData(**options, value_range=(0.0, 100.0)), tmp_path / "run")
    ImageGenerationPipeline(unet, DDPMScheduler(), PixelRange.full("uint16").to_dict()).save_pretrained(tmp_path / "16")
    with pytest.raises(ValueError, match="hold uint8, but the run generates uint16"):
        load_as_learnt(RealData(**options), tmp_path / "16")


def test_real_images_in_colour_become_grey_for_a_run_that_learnt_from_images_made_grey(tmp_path):
    write(tmp_path, (4,))
    for path in (tmp_path / "images").iterdir():
        Image.open(path).convert("RGB").save(path)
    unet = UNet(in_channels=1, out_channels=1, channels=[8, 16], head_channels=8, sample_size=32)
    ImageGenerationPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "run")
    options = {"data": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache")}
    for stated, channels in ((None, 3), (1, 1)):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"data": {"channels": stated}}))
        assert load_as_learnt(RealData(**options), tmp_path / "run").train.channels == channels
    assert load_as_learnt(RealData(**options, channels=3), tmp_path / "run").train.channels == 3
