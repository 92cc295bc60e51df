"""Time to quality: the recipes, the timing, resuming after a stop, and the arithmetic of the ratio."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from scripts.experiments.time_to_quality import __main__ as script
from scripts.experiments.time_to_quality.quality import end_of
from scripts.experiments.time_to_quality.training import WEIGHTS, PeerTraining, PublishedRecipe, seconds_a_step
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
    network.write_text(json.dumps({"channels": [8, 16, 12], "head_channels": 4}))
    return script.TimeToQuality(
        images,
        tmp_path / "run",
        peer_steps=(2, 4),
        tuned_learning_rates=(1e-2,),
        our_steps=(2,),
        images=64,
        sampler_steps=2,
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


def test_the_example_has_attention_at_the_resolution_nearest_to_16_pixels():
    network = script.peer_network(64, 3, (16, 16, 32, 32))
    assert network.config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D")
    assert network.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    assert script.peer_network(28, 1, (24, 32, 48)).config.down_block_types[1] == "AttnDownBlock2D"  # 14 pixels


@pytest.mark.parametrize("widths", [(16, 32, 48), (24, 32, 48), (16, 24, 32, 32)])
def test_every_block_of_the_example_sees_the_timestep(widths):
    """A group of one channel would not: its normalisation takes away what the timestep adds to whole channels."""
    network = script.peer_network(32, 1, widths)
    blocks = [block for name, block in network.named_modules() if name.split(".")[-2:-1] == ["resnets"]]
    assert len(blocks) == 5 * len(widths) + 2
    for block in blocks:
        maps = torch.randn(1, block.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        early, late = (block(maps, value * torch.ones(1, block.time_emb_proj.in_features)) for value in (0.5, 3.0))
        assert (early - late).abs().max() > 0.01
    assert script.peer_network(32, 3, (128, 256, 256, 256)).config.norm_num_groups == 32  # as published


def test_the_tuned_example_has_its_own_rate_and_precision_and_the_published_one_has_not(tmp_path):
    config = script.TimeToQuality("x", tmp_path, tuned_learning_rates=(3e-3,), tuned_precision="bf16")
    recipes = {run.label: config.recipe(run) for run in config.runs if run.name != script.OURS}
    assert list(recipes) == ["tuned-0.003-1125", "tuned-0.003-2250", "tuned-0.003-4500", "published-4500"]
    published, tuned = recipes["published-4500"], recipes["tuned-0.003-1125"]
    assert (published.learning_rate, published.mixed_precision, published.steps) == (1e-4, "no", 4500)
    assert (tuned.learning_rate, tuned.mixed_precision, tuned.steps) == (3e-3, "bf16", 1125)


def test_a_run_with_other_options_has_another_folder(config):
    """So that nothing is reused that depends on an option that has changed, and what does not depend on it is."""

    def folders(**changes):
        changed = replace(config, **changes)
        return {run.label: changed.folder(run, data).name for run in changed.runs}

    data = script.load_images(script.DataConfig(data=config.data)).train
    before = folders()
    assert folders() == before
    for changes in ({"seed": 1}, {"data": "elsewhere"}):
        assert not set(folders(**changes).values()) & set(before.values())
    ours, tuned, published = (
        {label for label in before if label.startswith(kind)} for kind in ("ours", "tuned", "published")
    )
    for changes, affected in (
        ({"batch_size": 4}, ours),
        ({"tuned_precision": "bf16"}, tuned),
        ({"warmup_steps": 1}, tuned | published),
        ({"peer_channels": (8, 16)}, tuned | published),
    ):
        now = folders(**changes)
        assert {label for label in before if now[label] != before[label]} == affected


def test_the_example_computes_in_its_precision(images, tmp_path):
    training = peer(images, tmp_path, mixed_precision="bf16")
    computed = []
    training.network.conv_out.register_forward_hook(lambda module, given, found: computed.append(found.dtype))
    training._train_step(torch.zeros(2, 1, 8, 8))
    assert computed == [torch.bfloat16]


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
    assert again.step == 4
    for name, weights in whole.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], weights, rtol=0, atol=0)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_are_timed_in_turns(config, images, monkeypatch):
    taken = []
    step = PeerTraining._train_step
    monkeypatch.setattr(PeerTraining, "_train_step", lambda self, clean: (taken.append("peer"), step(self, clean)))
    ours = script.train_ddpm.__globals__["DiffusionTask"]
    loss = ours.loss
    monkeypatch.setattr(ours, "loss", lambda *arguments: (taken.append("ours"), loss(*arguments))[1])
    seconds = seconds_a_step({"peer": lambda folder: peer(images, folder)}, config.ours(2), "ours", rounds=3)
    assert taken == ["peer", "ours"] * (10 + 3) and all(value > 0 for value in seconds.values())


@pytest.mark.slow
def test_everything_is_trained_judged_and_written_and_nothing_twice(config, monkeypatch):
    text = script.time_to_quality(config)
    written = json.loads((config.output / "quality.json").read_text())
    curves, seconds = written["curves"], written["options"]["seconds_a_step"]
    assert list(curves) == [script.OURS, script.TUNED, script.PUBLISHED]
    assert [[point["run"] for point in points] for points in curves.values()] == [
        ["ours-2"],
        ["tuned-0.01-2", "tuned-0.01-4"],
        ["published-4"],
    ]
    for name, points in curves.items():
        for point in points:
            assert point["seconds"] == pytest.approx(point["steps"] * seconds[name]) and point["distance"] > 0
    assert (config.output / "quality.png").exists() and (config.output / "quality.md").read_text() == text
    monkeypatch.setattr(script, "real_features", None)
    monkeypatch.setattr(script, "train_ddpm", None)
    monkeypatch.setattr(script, "PeerTraining", None)
    assert script.time_to_quality(config) == text


def test_a_run_is_judged_by_its_averaged_weights(config):
    data = script.load_images(script.DataConfig(data=config.data)).train
    run = script.Run(script.TUNED, 4, 1e-2)
    training = PeerTraining(config.peer(data), config.recipe(run), data, config.folder(run, data))
    training.run()
    averages = dict(zip(training._names().values(), training.ema.shadow_params))
    for name, weights in script.trained(config, run, data).named_parameters():
        assert torch.equal(weights, averages[name])
    features, real = script.real_features(config)
    trained, untrained = (
        script.judge(network, script.sampler("sde-dpm-solver++", DDPMScheduler()), 2, features, real).value
        for network in (script.trained(config, run, data), config.peer(data))
    )
    assert trained != untrained


def points(*values):
    return [script.Point(f"run-{index}", index, *each, 1.0) for index, each in enumerate(values)]


def test_the_ratio_is_of_seconds_where_ours_first_is_as_near():
    curves = {
        script.PUBLISHED: points((900, 40)),
        script.TUNED: points((100, 30), (900, 10)),
        script.OURS: points((20, 50), (30, 40), (50, 41), (80, 20)),
    }
    published, tuned = script.rows(curves)
    assert published.value == 30 and published.met and "30.0 times sooner, after 30 s" in published.figure
    assert tuned.value is None and tuned.met is False and tuned.figure == "not reached: 10.0 +- 1.0"


def test_ours_has_to_reach_the_shortest_run_of_the_peer_that_is_as_good_as_its_best():
    """A difference of 1.4, the root of the sum of two squared errors of 1, does not count."""
    assert end_of(points((100, 30), (400, 11.4), (900, 10))).seconds == 400
    assert end_of(points((100, 30), (400, 11.5), (900, 10))).seconds == 900


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="only is 'ours', but must be among ours-60, ours-90, ours-180"):
        script.TimeToQuality("x", tmp_path, only=("ours",))
    with pytest.raises(ValueError, match="sampler_steps is 0, but must be at least 1"):
        script.TimeToQuality("x", tmp_path, sampler_steps=0)
    with pytest.raises(ValueError, match="sampler is 'best', but must be"):
        script.TimeToQuality("x", tmp_path, sampler="best")
