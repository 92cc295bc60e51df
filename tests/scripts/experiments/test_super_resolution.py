"""The comparison of ways to enlarge images: its figures, its regression, and resuming after a stop."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from scripts.experiments import super_resolution
from tests.support.features import Blocks
from unet_diffusion import UNet
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk
from unet_diffusion.evaluation.feature_networks import FeatureNetwork
from unet_diffusion.images.pixel_range import PixelRange

BYTES = PixelRange.full("uint8")


@pytest.fixture
def options(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (("train", 12), ("test", 3)):
        images = [random.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(count)]
        rows = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
        rows.to_parquet(tmp_path / f"{name}.parquet")
    model = tmp_path / "network.json"
    model.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return super_resolution.Comparison(
        data=tmp_path,
        output=tmp_path / "out",
        scale=2,
        model=str(model),
        steps=2,
        batch_size=2,
        sampling_steps=2,
        device="cpu",
    )


@pytest.mark.slow
def test_all_ways_are_scored_on_the_same_images_and_nothing_is_done_twice(options, monkeypatch):
    options.tuning_steps = 2
    text = super_resolution.compare(options)
    results = json.loads((options.output / "comparison.json").read_text())
    few_steps = ["diffusion, 2 steps", "tuned, 2 steps", "tuned, 1 step"]
    assert list(results["scores"]) == ["nearest pixel", "bicubic", "regression", "diffusion", *few_steps]
    assert all(len(values) == 3 for each in results["scores"].values() for values in each["images"].values())
    assert all(each["kernel_distance"] is None for each in results["scores"].values())  # of three images
    assert "efficientnet-lite0" in text and text.count("\n| ") == 8
    assert Image.open(options.output / "comparison.png").size == (8 * 34 + 2, 3 * 34 + 2)  # eight columns, three rows

    written = {path: path.stat().st_mtime_ns for path in (options.output / "scores").iterdir()}
    monkeypatch.setattr(super_resolution, "scores_of", None)  # a call would raise
    assert super_resolution.compare(options) == text
    assert written == {path: path.stat().st_mtime_ns for path in (options.output / "scores").iterdir()}


def test_an_untrained_regression_is_bicubic_interpolation(options):
    data = super_resolution.load_images(super_resolution.data_config(options))
    unet = UNet.from_preset("tiny", in_channels=1, out_channels=1)
    super_resolution.RegressionTask(unet, data, 2, super_resolution.DiffusionConfig())
    condition = enlarged(torch.randint(0, 256, (2, 1, 7, 5), dtype=torch.uint8), 2, BYTES)
    with torch.no_grad():
        assert torch.equal(super_resolution.regressed(unet, condition), condition)


def test_figures_are_those_of_each_image():
    """An error of 0.2 everywhere is 20 dB for a range of 2; equal images have SSIM 1 and no distance."""
    clean = torch.rand(2, 1, 16, 16) * 1.6 - 0.9
    found = torch.stack([clean[0] + 0.2, clean[1]])
    features = super_resolution.feature_network("efficientnet-lite0")
    seen = (super_resolution.features_of(features, each) for each in (found, clean))
    scores = super_resolution.scores_of(found, clean, *seen)
    assert scores["psnr"][0] == pytest.approx(20, abs=1e-3)
    assert scores["psnr"][1] == pytest.approx(10 * math.log10(255**2 * 256), abs=1e-3)  # one value off by one level
    assert scores["ssim"][1] == pytest.approx(1, abs=1e-5) and scores["ssim"][0] < 1
    assert scores["distance"][0] > 0.1 and scores["distance"][1] == 0


def test_the_kernel_distance_is_that_of_the_sets(options):
    """Images that are enlarged without an error have distance 0; noise is far away."""
    options.test_images = 70
    clean = BYTES.to_model(torch.randint(0, 256, (70, 1, 16, 16), dtype=torch.uint8))
    features = FeatureNetwork("blocks", Blocks())
    distances = {}
    for name, enlarge in {"right": lambda _, at: clean[at], "black": lambda _, at: clean[at] * 0 - 1}.items():
        arguments = (options, name, enlarge, clean, clean, features, BYTES)
        scores = super_resolution.scored(*arguments)
        assert super_resolution.scored(*arguments) == scores  # from its file
        distances[name] = scores.kernel_distance
    assert distances["right"].generated_count == 70
    assert abs(distances["right"].value) < 4 * distances["right"].error < distances["black"].value
    assert f"| {distances['black'].value:.3g} ±" in super_resolution.table({"black": scores})


def test_scores_are_those_of_the_files(options):
    clean = BYTES.to_model(torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8))
    features = FeatureNetwork("blocks", Blocks())

    def distances(enlarge) -> list[float]:
        scores = super_resolution.scored(options, "a", enlarge, clean, clean, features, BYTES)
        return scores.images["distance"]

    assert min(before := distances(lambda _, at: clean[at] * 0 - 1)) > 0
    assert distances(None) == before  # from its file
    (options.data / "test.parquet").write_bytes((options.data / "train.parquet").read_bytes())
    assert distances(lambda _, at: clean[at]) == [0, 0, 0]


@pytest.mark.slow
def test_a_regression_of_other_images_is_refused(options):
    super_resolution.train_regression(options)
    (options.data / "train.parquet").write_bytes((options.data / "test.parquet").read_bytes())
    with pytest.raises(ValueError, match="the data have changed since the run in .*regression was started"):
        super_resolution.train_regression(options)


def test_means_have_intervals():
    """1, 2 and 3: mean 2, deviation 1; Student's 97.5% point with 2 degrees is 4.3027."""
    assert super_resolution.mean_and_interval([1.0, 2.0, 3.0]) == "2 +- 2.5"
    assert super_resolution.mean_and_interval([2.0]) == "2"


def test_options_that_do_not_fit_are_refused_before_training(options):
    options.scale = 3
    with pytest.raises(ValueError, match="16x16 pixels, but both sides must be multiples of scale, 3"):
        super_resolution.compare(options)
    assert not options.output.exists()
    with pytest.raises(ValueError, match="test_images is 0"):
        super_resolution.Comparison(data=options.data, output=options.output, test_images=0)


def test_the_small_images_are_those_that_training_makes(options):
    """The regression gets the same input in training and in the test."""
    clean = BYTES.to_model(torch.randint(0, 256, (1, 1, 16, 16), dtype=torch.uint8))
    data = super_resolution.load_images(super_resolution.data_config(options))
    unet = UNet.from_preset("tiny", in_channels=1, out_channels=1)
    task = super_resolution.RegressionTask(unet, data, 2, super_resolution.DiffusionConfig())
    with torch.no_grad():
        assert torch.equal(task.predicted(unet, clean), enlarged(shrunk(clean, 2, BYTES), 2, BYTES))
