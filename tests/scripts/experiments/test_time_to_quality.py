"""Time to quality: the recipes, the timing, resuming after a stop, and the arithmetic of the ratio."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from scripts.experiments.time_to_quality import __main__ as script
from scripts.experiments.time_to_quality.training import PeerTraining, PublishedRecipe, SnapshotTrainer
from tests.support.features import Blocks
from unet_diffusion.evaluation.feature_networks import FeatureNetwork


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, levels in enumerate(np.random.default_rng(0).integers(0, 256, (70, 8, 8), dtype=np.uint8)):
        Image.fromarray(levels).save(folder / f"{index}.png")
    return str(folder)


@pytest.fixture(autouse=True)
def features(monkeypatch):
    monkeypatch.setattr(script, "feature_network", lambda name: FeatureNetwork(name, Blocks()))


@pytest.fixture
def config(images, tmp_path):
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16, 16], "head_channels": 8}))
    return script.TimeToQuality(
        images,
        tmp_path / "run",
        peer_steps=4,
        our_steps=(2,),
        snapshots=1,
        images=64,
        model=str(network),
        peer_channels=(8, 8),
    )


def peer(images, folder, steps=4, **recipe):
    data = script.load_images(script.DataConfig(data=images)).train
    torch.manual_seed(0)
    published = PublishedRecipe(steps, learning_rate=1e-2, batch_size=4, warmup_steps=2, **recipe)
    return PeerTraining(script.peer_network(8, 1, (8, 8)), published, data, folder)


def test_both_networks_have_equal_parameters_within_5_percent(tmp_path):
    config = script.TimeToQuality("x", tmp_path)
    unet = script.make_unet(config.ours(1), 28, 28, 1, None)
    script.check_parameters(unet, script.peer_network(28, 1, config.peer_channels))
    with pytest.raises(ValueError, match=r"peer_channels is .*16, 16.*, but must give as many parameters as ours"):
        script.check_parameters(unet, script.peer_network(28, 1, (16, 16)))


def test_the_example_has_attention_on_maps_of_at_most_16_pixels():
    network = script.peer_network(64, 3, (16, 16, 32))
    assert network.config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert network.config.up_block_types == ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")


def test_the_tuned_example_has_its_own_rate_and_precision_and_the_published_one_has_not(tmp_path):
    config = script.TimeToQuality("x", tmp_path, tuned_learning_rate=3e-3, tuned_precision="bf16")
    published, tuned = (config.recipe(name) for name in (script.PUBLISHED, script.TUNED))
    assert (published.learning_rate, published.mixed_precision) == (1e-4, "no")
    assert (tuned.learning_rate, tuned.mixed_precision) == (3e-3, "bf16")


def test_the_example_computes_in_its_precision(images, tmp_path):
    training = peer(images, tmp_path, mixed_precision="bf16")
    computed = []
    training.network.conv_out.register_forward_hook(lambda module, given, found: computed.append(found.dtype))
    training._train_step(torch.zeros(2, 1, 8, 8))
    assert computed == [torch.bfloat16]


def test_snapshots_come_at_doubled_steps_and_at_the_end():
    assert script.snapshot_steps(64) == [2, 4, 8, 16, 32, 64]
    assert script.snapshot_steps(5) == [1, 2, 5]


def test_the_moving_average_and_the_learning_rate_are_those_of_the_example(images, tmp_path):
    training = peer(images, tmp_path)
    rates = []
    step = training._train_step
    training._train_step = lambda clean: (rates.append(training.optimizer.param_groups[0]["lr"]), step(clean))
    training.run()
    assert rates == pytest.approx([0, 0.5e-2, 1e-2, 0.5e-2])  # a warm-up of 2 steps, then half a cosine over 2
    assert training.ema.get_decay(11) == pytest.approx(1 - 11 ** (-3 / 4))
    assert training.ema.get_decay(10**9) == 0.9999


@pytest.mark.slow
def test_a_stopped_peer_resumes_exactly(images, tmp_path):
    whole = peer(images, tmp_path / "whole")
    whole.run()
    stopped = peer(images, tmp_path / "stopped")
    step = stopped._train_step

    def dies(clean):
        if stopped.step == 2:
            raise KeyboardInterrupt
        step(clean)

    stopped._train_step = dies
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = peer(images, tmp_path / "stopped")
    again.run()
    assert again.step == 4 and again.seconds > stopped.seconds > 0
    for name, weights in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], weights, rtol=0, atol=0)
    first, second = (read(tmp_path / name, 4) for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def read(folder, step):
    from safetensors.torch import load_file

    return load_file(script.snapshot_path(folder, step))


def test_our_trainer_counts_its_steps_across_a_stop(config, monkeypatch):
    step = SnapshotTrainer._train_step

    def slow_but_dies_at(last):
        def train_step(self, batches):
            if self.step == last:
                raise KeyboardInterrupt
            step(self, batches)
            self.cpu_seconds += 100

        return train_step

    ours = config.ours(2)
    ours.training.checkpoint_every = 1
    monkeypatch.setattr(SnapshotTrainer, "_train_step", slow_but_dies_at(1))
    with pytest.raises(KeyboardInterrupt):
        script.train_ours(ours)
    monkeypatch.setattr(SnapshotTrainer, "_train_step", step)
    script.train_ours(ours)
    from safetensors import safe_open

    with safe_open(script.snapshot_path(ours.output, 2), "pt") as file:
        assert 100 < float(file.metadata()["seconds"]) < 200


@pytest.mark.slow
def test_everything_is_trained_judged_and_written_and_nothing_twice(config, monkeypatch):
    text = script.time_to_quality(config)
    written = json.loads((config.output / "quality.json").read_text())
    curves = written["curves"]
    assert list(curves) == ["diffusers, as published", "diffusers, learning rate tuned", "unet-diffusion, 2 steps"]
    assert [[point["step"] for point in points] for points in curves.values()] == [[4], [4], [2]]
    assert all(point["seconds"] > 0 and point["distance"] > 0 for points in curves.values() for point in points)
    assert (config.output / "quality.png").exists() and (config.output / "quality.md").read_text() == text
    monkeypatch.setattr(script, "real_features", None)
    monkeypatch.setattr(script, "train_ours", None)
    monkeypatch.setattr(script, "PeerTraining", None)
    assert script.time_to_quality(config) == text


def test_a_snapshot_is_judged_by_its_own_weights(images, tmp_path):
    peer(images, tmp_path, steps=2).run()
    network = script.peer_network(8, 1, (8, 8))
    features, real = script.real_features(script.TimeToQuality(images, tmp_path, images=64))
    points = [
        script.judge(tmp_path, step, network, script.sampler("sde-dpm-solver++", DDPMScheduler()), features, real)
        for step in (1, 2, 1)
    ]
    assert points[0] == points[2] and points[0].distance != points[1].distance
    assert points[0].seconds < points[1].seconds


def test_the_ratio_is_of_seconds_where_ours_first_is_as_near():
    def curve(*values):
        return [script.Point(index, seconds, distance, 1.0) for index, (seconds, distance) in enumerate(values)]

    curves = {
        script.PUBLISHED: curve((100, 80), (900, 40)),
        script.TUNED: curve((100, 30), (900, 10)),
        "unet-diffusion, 3 steps": curve((10, 60), (30, 40)),
        "unet-diffusion, 9 steps": curve((20, 50), (50, 41), (80, 20)),
    }
    published, tuned = script.rows(curves)
    assert published.value == 30 and published.met and "30.0 times sooner, after 30 s" in published.figure
    assert tuned.value is None and tuned.met is False and tuned.figure == "not reached: 10.0 +- 1.0"


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only is 'ours', but must be among published, tuned, ours-180"):
        script.TimeToQuality("x", tmp_path, only=("ours",))
    with pytest.raises(ValueError, match="snapshots is 0, but must be at least 1"):
        script.TimeToQuality("x", tmp_path, snapshots=0)
    with pytest.raises(ValueError, match="sampler is 'best', but must be"):
        script.TimeToQuality("x", tmp_path, sampler="best")
