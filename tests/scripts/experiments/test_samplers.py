"""The comparison of samplers: the evaluations of each case, and resuming after a stop."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from diffusers import HeunDiscreteScheduler
from PIL import Image

from scripts.experiments import samplers
from tests.support.features import Blocks
from unet_diffusion import cli
from unet_diffusion.commands import evaluate_generation
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.record import DataRecord
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.evaluation.feature_networks import FeatureNetwork
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.saved_runs import load_pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A DDPM run on 80 images of 8x8, mirrored at random."""
    folder = tmp_path_factory.mktemp("samplers")
    (folder / "images").mkdir()
    for index, levels in enumerate(np.random.default_rng(0).integers(0, 256, (80, 8, 8), dtype=np.uint8)):
        Image.fromarray(levels).save(folder / "images" / f"{index}.png")
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    arguments = ["--output", str(folder / "run"), "--model", str(folder / "network.json")]
    arguments += ["--data", str(folder / "images"), "--validation-fraction", "0.1", "--preview-images", "4"]
    cli.run("train-ddpm", [*arguments, "--batch-size", "4", "--steps", "2", "--flip"])
    return folder / "run"


@pytest.fixture(autouse=True)
def features(monkeypatch):
    monkeypatch.setattr(evaluate_generation, "feature_network", lambda name: FeatureNetwork(name, Blocks()))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(name, wanted) for name in ("ddim", "dpm-solver++", "sde-dpm-solver++", "heun") for wanted in (4, 9)],
)
def test_evaluations_are_those_of_the_network(run, name, wanted):
    (case,) = samplers.CompareSamplers((run,), run, samplers=(name,), evaluations=(wanted,)).cases()
    pipe = load_pipeline(ImageGenerationPipeline, run)
    pipe.scheduler = sampler(name, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(batch_size=1, num_inference_steps=case.steps)
    assert len(calls) == case.evaluations
    assert isinstance(pipe.scheduler, HeunDiscreteScheduler) == (name == "heun")
    assert abs(case.evaluations - wanted) <= 1


def test_tuned_runs_take_lcm_and_few_evaluations(run, tmp_path):
    tuned = tmp_path / "tuned"
    pipe = load_pipeline(ImageGenerationPipeline, run)
    ImageGenerationPipeline(pipe.unet, pipe.scheduler, few_steps=4).save_pretrained(tuned)
    options = samplers.CompareSamplers((run, tuned), tmp_path, samplers=("ddim", "lcm"), evaluations=(2, 20))
    found = [(case.run, case.sampler, case.evaluations) for case in options.cases()]
    assert found == [(run, "ddim", 2), (tuned, "lcm", 2), (run, "ddim", 20)]
    with pytest.raises(ValueError, match="samplers is .*, but must fit one of the runs"):
        samplers.compare_samplers(replace(options, runs=(run,), samplers=("lcm",)))


@pytest.mark.slow
def test_finished_cases_are_not_measured_again(run, tmp_path, monkeypatch):
    options = samplers.CompareSamplers((run,), tmp_path, samplers=("ddim", "heun"), evaluations=(3, 6), count=64)
    text = samplers.compare_samplers(options)
    title, _, _, _, *cases, _, flag = text.splitlines()
    assert title.startswith("64 images each (60 for the kernel distance), seed 0, features of ")
    held_out = len(DataRecord.read(run).held_out)  # about 8
    assert flag.startswith(f"{held_out} held-out images are too few")
    assert [line.split(" | ")[:3] for line in cases] == [
        ["| run", "ddim", "3"],
        ["| run", "ddim", "6"],
        ["| run", "heun", "3"],
        ["| run", "heun", "5"],
    ]
    (path,) = tmp_path.glob("run-heun-3-*.json")
    figures = json.loads(path.read_text())
    assert figures["options"]["steps"] == 2 and figures["memorisation"]["held_out_count"] == held_out
    (grid,) = tmp_path.glob("run-ddim-6-*-samples.png")
    assert Image.open(grid).size == (6 * 10 + 2, 6 * 10 + 2)
    assert Image.open(tmp_path / "samplers.png").width == 1000
    # the real images are seen once for all cases; alone, a case has the same figures
    again = EvaluateGeneration(**{**figures["options"], "data": DataConfig(**figures["options"]["data"])})
    evaluate_generation.evaluate_generation(replace(again, run=run, output=tmp_path / "alone.json"))
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert all(alone[key] == figures[key] for key in ("figures", "memorisation"))
    monkeypatch.setattr(samplers, "measure", None)
    assert samplers.compare_samplers(options) == text
    retrained = tmp_path / "again" / "run"  # of the same name, with other weights
    shutil.copytree(run, retrained)
    next((retrained / "unet").glob("*.safetensors")).write_bytes(b"others")
    with pytest.raises(TypeError, match="not callable"):  # it would be measured
        samplers.compare_samplers(replace(options, runs=(retrained,)))
    options.count = 70
    with pytest.raises(ValueError, match="was measured with {'count': 64}; choose another output"):
        samplers.compare_samplers(options)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"samplers": ("magic",)}, "samplers is 'magic', but must be one of"),
        ({"evaluations": (2,)}, "evaluations is 2, but each must be at least 3"),
        ({"runs": ()}, "runs is .*, but must be one or more"),
    ],
)
def test_wrong_options_are_refused(run, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        samplers.CompareSamplers(**({"runs": (run,), "output": tmp_path} | wrong))
    with pytest.raises(ValueError, match="there is no config.json"):
        samplers.compare_samplers(samplers.CompareSamplers((run, tmp_path), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
