"""The measurement of generation at equal quality, with a small network and small images, so that it takes no time."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scripts.benchmarks import generation
from scripts.benchmarks.timing import timed_precisions
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.data.config import DataConfig
from unet_diffusion.evaluation.feature_networks import FeatureNetwork
from unet_diffusion.evaluation.generation_metrics import Measurement
from unet_diffusion.network.precision import PRECISIONS
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.config import TrainingConfig


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return TrainDDPM(
        output=folder / "run",
        model=str(folder / "network.json"),
        data=DataConfig(max_images=100, image_size=8, validation_fraction=0),
        diffusion=DiffusionConfig(preview_images=1),
        training=TrainingConfig(steps=1, batch_size=4, trackers=()),
    )


class Means(nn.Module):
    """uint8 (B, 3, 8, 8) to the means of 4 rows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))  # its device is that of the network

    def forward(self, levels):
        return levels[:, 0, :4].float().mean(dim=2) * self.scale


def test_every_case_is_timed_on_the_same_number_of_images_and_kept(training, tmp_path):
    stock, fast = generation.Case("ddpm", 4), (generation.Case("dpm-solver++", 2), generation.Case("unipc", 2))
    features = FeatureNetwork("means", Means())
    rows = list(generation.speed(training, tmp_path, features, stock, fast, batches=2))
    details = rows[0].details
    cases = ("ddpm, 4 steps", "dpm-solver++, 2 steps", "unipc, 2 steps")
    precisions = [PRECISIONS[each] for each in timed_precisions(torch.device("cpu"))]
    assert set(details["seconds"]) == {f"{case}, {precision}" for case in cases for precision in precisions}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in details["seconds"].values())
    works = [row.work for row in rows][:2]
    assert all(work.startswith(f"{2 * generation.BATCH} images, {case}, ") for work, case in zip(works, fast))
    kept = sorted(tmp_path.glob("*-means/*/*.safetensors"))
    assert len(kept) == 6 * len(precisions)
    batch = load_file(kept[0])
    assert batch["images"].shape == (generation.BATCH, 1, 8, 8) and batch["images"].abs().max() <= 1

    changed = {path: path.stat().st_mtime_ns for path in kept}
    again = list(generation.speed(training, tmp_path, features, stock, fast, batches=2))
    assert again == rows  # nothing is generated twice
    assert changed == {path: path.stat().st_mtime_ns for path in kept}


def test_both_pipelines_make_images_from_the_same_weights(training):
    stock = generation.stock_generator(training.output, 3, "no")(2, torch.manual_seed(0))
    ours = generation.our_generator(training.output, generation.Case("ddpm", 3), "no")(2, torch.manual_seed(0))
    assert stock.shape == ours.shape == (2, 8, 8, 1)
    assert np.ptp(stock) > 0


def measurement(value: float, error: float) -> Measurement:
    return Measurement(value, error, real_count=512, generated_count=128)


def test_errors_are_combined_as_the_root_of_their_squares():
    theirs = measurement(10, 3)
    assert math.hypot(3, 4) == 5
    assert generation.is_equal(measurement(14.9, 4), theirs)
    assert not generation.is_equal(measurement(15.1, 4), theirs)
    assert generation.is_equal(measurement(2, 0.1), theirs)  # a better quality counts as equal


def test_the_target_is_that_of_the_fewest_steps_at_equal_quality():
    stock, *fast = cases = [generation.Case("ddpm", 1000)] + [generation.Case("unipc", n) for n in (30, 20, 10)]
    keys = [(str(case), "no") for case in cases]
    distances = dict(zip(keys, (measurement(value, 1) for value in (10, 10, 11, 12))))  # 12 > 10 + sqrt(2)
    seconds = dict(zip(keys, ([90.0, 110.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0])))
    rows = list(generation.compare(stock, fast, distances, seconds))
    qualities = ("as good", "as good", "worse")
    assert [row.work for row in rows] == [f"128 images, {case}, {quality}" for case, quality in zip(fast, qualities)]
    assert [row.targets for row in rows] == [{}, {"float32": 50.0}, {}]
    assert rows[1].ratios["float32"].median == 50 and not rows[1].missed("float32")


def test_quality_is_equal_only_if_it_is_in_every_precision():
    stock, fast = generation.Case("ddpm", 1000), generation.Case("unipc", 10)
    keys = [(str(case), precision) for precision in ("no", "bf16") for case in (stock, fast)]
    distances = dict(zip(keys, (measurement(value, 1) for value in (10, 10, 12, 12))))
    row, last = generation.compare(stock, (fast,), distances, {key: [1.0, 1.0] for key in keys})
    assert row.work.endswith("worse") and last.missing


def test_a_run_without_equal_quality_says_so():
    stock, fast = generation.Case("ddpm", 1000), generation.Case("unipc", 10)
    distances = {(str(stock), "no"): measurement(1, 0.1), (str(fast), "no"): measurement(9, 0.1)}
    *_, last = generation.compare(stock, (fast,), distances, {key: [9.0, 1.0] for key in distances})
    assert last.figure == "none is as good" and not last.ratios


def test_the_checkpoint_has_at_most_a_million_parameters(tmp_path):
    from unet_diffusion.saved_runs import load_unet

    config = {"sample_size": 28, "in_channels": 1, "out_channels": 1}
    unet = load_unet(generation.recipe(tmp_path / "data.parquet", tmp_path / "run").model, config)
    assert sum(parameter.numel() for parameter in unet.parameters()) < 1e6
