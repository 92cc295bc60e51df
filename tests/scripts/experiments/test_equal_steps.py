"""Networks that learn for the same number of steps: equal images and noise, and figures that survive a stop."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers import UNet2DModel

from scripts.benchmarks.compared_networks import ddpm_32, stock
from scripts.experiments import equal_steps
from unet_diffusion import UNet
from unet_diffusion.training.run_folder import started_with

OURS, PEER = "unet-diffusion", "diffusers UNet2DModel"


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    def tiny(name: str, side: int):
        if name == OURS:
            return stock(UNet(channels=(8, 16), head_channels=8, attention=(False, False)))
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        return stock(UNet2DModel(sample_size=side, block_out_channels=(8, 16), norm_num_groups=4, **blocks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(equal_steps.SIZES, "9m", tiny)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in (("train", 24), ("test", 8)):
        images = list(random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
        Dataset.from_dict({"image": images}, Features({"image": ImageFeature()})).to_parquet(folder / f"{name}.parquet")
    return folder


def options(data, output, **changes):
    values = {"learning_rates": (1e-4, 1e-2), "search_steps": 4, "steps": 8, "validate_every": 4, "batch_size": 4}
    return equal_steps.EqualSteps(data=data, output=output, **{**values, "networks": (OURS, PEER), **changes})


@pytest.mark.slow
def test_each_network_continues_with_its_best_learning_rate(data, tmp_path):
    chosen = options(data, tmp_path / "run")
    text = equal_steps.compare(chosen)
    results = json.loads((chosen.output / "equal_steps.json").read_text())
    for name in (OURS, PEER):
        losses = {float(rate): point["validation_loss"] for rate, point in results["search"][name].items()}
        assert results["learning_rate"][name] == min(losses, key=losses.get)
        assert set(results["runs"][name]) == {"0", "1"}
        for points in results["runs"][name].values():
            assert list(points) == ["4", "8"]
            assert 0 < points["4"]["cpu_seconds"] < points["8"]["cpu_seconds"]
        best = results["runs"][name]["0"]["4"]["validation_loss"]
        assert best == losses[results["learning_rate"][name]]  # the search is the beginning of the run
    assert (chosen.output / "equal_steps.md").read_text() == text
    assert [line.split(" | ")[0] for line in text.splitlines()[-2:]] == ["| 4", "| 8"]
    assert (chosen.output / "equal_steps.png").stat().st_size > 0

    written = {path: path.stat().st_mtime_ns for path in chosen.output.rglob("metrics.jsonl")}
    assert equal_steps.compare(chosen) == text  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_run_in_one(data, tmp_path):
    images = equal_steps.load_images(
        equal_steps.DataConfig(data=str(data / "train.parquet"), validation_data=str(data / "test.parquet"))
    )
    losses = []
    for folder, parts in (("one", (8,)), ("two", (4, 8))):
        chosen = options(data, tmp_path / folder)
        for steps in parts:
            points = equal_steps.train(chosen, images, PEER, 1e-3, 0, steps)
        assert points[4]["cpu_seconds"] < points[8]["cpu_seconds"]  # also those before the stop are counted
        losses.append([point["validation_loss"] for point in points.values()])
    assert losses[0] == losses[1]
    shorter = equal_steps.train(chosen, images, PEER, 1e-3, 0, 4)
    assert list(shorter) == [4]


def test_all_networks_see_the_same_noisy_images(data, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    tiny = equal_steps.SIZES["9m"]

    def watched(name: str, side: int):
        contender = tiny(name, side)
        inputs = seen.setdefault(name, [])

        def predict(noisy, timesteps):
            inputs.extend([noisy, timesteps])
            return contender.predict(noisy, timesteps)

        return equal_steps.Contender(contender.network, predict)

    monkeypatch.setitem(equal_steps.SIZES, "9m", watched)
    chosen = options(data, tmp_path, learning_rates=(1e-3,), seeds=(3,))
    equal_steps.compare(chosen)
    assert len(seen[OURS]) == len(seen[PEER]) == 2 * (8 + 2 * 2)  # 8 steps and 2 validations of 2 batches
    for ours, theirs in zip(seen[OURS], seen[PEER]):
        assert torch.equal(ours, theirs)
    optimizers = [started_with(file.parent)["optimizer"] for file in tmp_path.rglob("config.json")]
    assert optimizers == ["adamw"] * 2  # that of the classic recipe


def test_the_folder_of_a_run_follows_from_all_but_its_length(data, tmp_path):
    chosen = options(data, tmp_path / "run")
    place = (PEER, 1e-3, 0)
    assert options(data, tmp_path / "run", steps=16, seeds=(0, 1)).folder(*place) == chosen.folder(*place)
    (tmp_path / "other").mkdir()
    for name in ("train", "test"):
        (tmp_path / "other" / f"{name}.parquet").write_bytes((data / "test.parquet").read_bytes())
    others = [
        options(data, tmp_path / "run", **changes)
        for changes in (
            {"size": "ddpm-32"},
            {"objective": "default"},
            {"batch_size": 5},
            {"search_steps": 3},
            {"validate_every": 2},
        )
    ]
    others.append(options(tmp_path / "other", tmp_path / "run"))
    assert len({each.folder(*place) for each in (chosen, *others)}) == 1 + len(others)


def test_the_larger_networks_have_equal_parameters():
    with torch.device("meta"):
        ours, theirs = (ddpm_32(name).parameters for name in (OURS, PEER))
    assert ours == pytest.approx(theirs, rel=0.05)
    with pytest.raises(ValueError, match="name is 'MONAI', but only unet-diffusion and diffusers UNet2DModel have"):
        ddpm_32("MONAI")


def test_losses_are_compared_at_the_same_seed():
    def points(*losses: float):
        return {50 * i: {"validation_loss": loss, "cpu_seconds": 10.0 * i} for i, loss in enumerate(losses, start=1)}

    runs = {OURS: {0: points(0.4, 0.2), 1: points(0.6, 0.3, 0.1)}, PEER: {0: points(0.5, 0.2), 1: points(0.4, 0.2)}}
    lines = equal_steps.table(runs).splitlines()[2:]
    assert lines == [
        "| 50 | 0.5000 (0.4000 to 0.6000), 10 | 0.4500 (0.4000 to 0.5000), 10 | 1.150 (0.800 to 1.500) |",
        "| 100 | 0.2500 (0.2000 to 0.3000), 20 | 0.2000 (0.2000 to 0.2000), 20 | 1.250 (1.000 to 1.500) |",
    ]


def test_wrong_options_are_refused(tmp_path):
    for changes, sentence in (
        ({"networks": ("UNet",)}, "networks is 'UNet', but must be one of 'unet-diffusion'"),
        ({"search_steps": 9}, "search_steps is 9, but must be from 1 to steps, 8"),
        ({"seeds": ()}, "seeds is \\(\\), but needs at least one value"),
    ):
        with pytest.raises(ValueError, match=sentence):
            options(tmp_path, tmp_path, **changes)


def test_a_contender_has_the_calls_of_our_networks():
    for name in (OURS, PEER):
        predictor = equal_steps.NoisePredictor(equal_steps.SIZES["9m"](name, 8))
        for parameter in predictor.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        noisy, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 5])
        output = predictor.to_diffusion()(noisy, timesteps, None, head="noise")
        assert output.sample.abs().min() > 0
        assert torch.equal(output.sample, predictor.network(noisy, timesteps).sample)
