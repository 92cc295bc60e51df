"""The search over recipes: what differs from the defaults, and going on after a stop."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.features import Blocks
from tests.support.scripts import SCRIPTS, load_script
from unet_diffusion.evaluation.feature_networks import FeatureNetwork


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield load_script("recipe_search")


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def task(script, name: str):
    kind = script.VARIANTS[name].task
    made = kind.__new__(kind)
    made.config = script.DiffusionConfig()
    return made


def test_evenly_spread_timesteps_have_one_in_each_part(script):
    timesteps = task(script, "timesteps evenly spread")._timesteps(generators(50))
    assert (timesteps // 20).tolist() == list(range(50))


def test_logit_normal_timesteps_have_their_quantiles(script):
    timesteps = task(script, "timesteps logit-normal")._timesteps(generators(2000)) / 1000
    quantiles = torch.quantile(timesteps, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([-1.2816, 0, 1.2816]).sigmoid(), rtol=0, atol=0.02)


def test_every_variant_sees_as_many_images_and_differs(script):
    seen = []
    for variant in script.VARIANTS.values():
        assert variant not in seen
        seen.append(variant)
        values = {"steps": script.STEPS, "batch_size": script.BATCH} | variant.training
        assert values["steps"] * values["batch_size"] == script.STEPS * script.BATCH
        script.DiffusionConfig(**variant.diffusion)


def test_what_is_judged_is_not_trained_again(script, tmp_path, monkeypatch):
    import time_to_quality

    monkeypatch.setattr(script, "STEPS", 2)
    monkeypatch.setattr(time_to_quality, "feature_network", lambda name: FeatureNetwork(name, Blocks()))
    (tmp_path / "images").mkdir()
    for index, levels in enumerate(np.random.default_rng(0).integers(0, 256, (70, 8, 8), dtype=np.uint8)):
        Image.fromarray(levels).save(tmp_path / "images" / f"{index}.png")
    only = ("defaults", "timesteps evenly spread")
    config = script.RecipeSearch(str(tmp_path / "images"), tmp_path / "run", only, images=64)
    first = script.search(config)
    assert all(f"| {name} | 2 | " in first for name in only)
    distances = [
        point["distance"] for point in json.loads((config.output / "recipes.json").read_text())["points"].values()
    ]
    assert len(set(distances)) == 2 and min(distances) > 0
    monkeypatch.setattr(script, "train_ours", None)
    assert script.search(config) == first


def test_an_unknown_variant_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="only is 'magic', but must be among defaults, the noise"):
        script.RecipeSearch("images", tmp_path, only=("magic",))
