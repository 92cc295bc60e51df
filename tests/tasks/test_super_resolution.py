"""Runs of super-resolution: training, resuming, other pipelines and commands on them, and `upscale`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.support.runs import assert_same_run, metrics
from tests.support.super_resolution import BYTES, image, network, seeded
from unet_diffusion import cli
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import make_unet, train_ddpm
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk, with_noise
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import load_pipeline, load_unet
from unet_diffusion.tasks.config import DiffusionConfig, SuperResolutionConfig
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import series
from unet_diffusion.training.run_folder import claim

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2


@pytest.fixture
def options(tmp_path) -> TrainDDPM:
    model = tmp_path / "network.json"
    model.write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    return TrainDDPM(
        output=tmp_path / "run",
        task="super-resolution",
        model=str(model),
        data=DataConfig(max_images=60, validation_fraction=0.1, image_size=8),
        diffusion=DiffusionConfig(preview_images=4),
        super_resolution=SuperResolutionConfig(scale=2),
        training=TrainingConfig(
            steps=4, batch_size=4, warmup_steps=2, log_every=2, checkpoint_every=2, validate_every=4, trackers=()
        ),
    )


def task_of(options: TrainDDPM) -> SuperResolutionTask:
    data = load_images(options.data)
    unet = make_unet(options, data.train.height, data.train.width, data.train.channels, data.train.class_names)
    return SuperResolutionTask(unet, data, options.diffusion, options.super_resolution)


def test_a_run_is_a_pipeline_that_knows_its_scale(options):
    run = train_ddpm(options)
    for name in ("curves.png", "config.json", "previews/step-00000004.png"):
        assert (run / name).stat().st_size > 0
    assert Image.open(run / "samples.png").size == (3 * 10 + 2, 4 * 10 + 2)  # 4 rows of three images of 8 x 8
    assert "2 times larger" in (run / "README.md").read_text()
    pipe = load_pipeline(SuperResolutionPipeline, run)
    assert pipe.scale == 2 and pipe.unet.config.in_channels == 2 and pipe.unet.config.sample_size == 8
    assert len(series(metrics(run), "validation_loss")[1]) == 1


def test_an_interrupted_run_ends_as_an_undisturbed_one(options, tmp_path, monkeypatch):
    """The loss raises in step 3, after the checkpoint of step 2; the noise of the condition is drawn again."""
    whole = train_ddpm(replace(options, output=tmp_path / "whole"))
    compute, calls = SuperResolutionTask.condition, []

    def failing(self, clean, generators=()):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return compute(self, clean, generators)

    monkeypatch.setattr(SuperResolutionTask, "condition", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        train_ddpm(options)
    monkeypatch.undo()
    assert_same_run(train_ddpm(options), whole, 4)


def test_the_condition_is_noisy_in_training_and_clean_in_validation(options):
    task = task_of(replace(options, super_resolution=SuperResolutionConfig(scale=2, condition_noise=0.2)))
    clean = BYTES.to_model(torch.stack([task.data.train[i]["image"] for i in range(3)]))
    plain = task.condition(clean)
    assert torch.equal(plain, enlarged(shrunk(clean, 2, BYTES), 2, BYTES))
    noisy = task.condition(clean, seeded(0, 1, 2))
    generators = seeded(0, 1, 2)
    levels = torch.stack([0.2 * torch.rand((), generator=each) for each in generators])
    noise = torch.stack([torch.randn(1, 8, 8, generator=each) for each in generators])
    torch.testing.assert_close(noisy, with_noise(plain, levels, noise))
    alone = task.condition(clean[1:2], seeded(1))
    assert torch.equal(alone[0], noisy[1])  # for any other images in the batch
    task.condition_noise = 0.0
    assert torch.equal(task.condition(clean, seeded(0, 1, 2)), plain)


def test_the_timestep_is_the_first_number_of_a_generator(options):
    """So that `describe` can draw it again for the message about a skipped step."""
    task = task_of(options)
    seen = []
    task.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    batch = {"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "label": torch.zeros(2, dtype=torch.int64)}
    task.loss(task.network, batch, [keyed_generator(0, i) for i in range(2)])
    assert torch.equal(seen[0], task._timesteps([keyed_generator(0, i) for i in range(2)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"super_resolution": SuperResolutionConfig()}, "there is no scale; set it to 2 or 4"),
        ({"super_resolution": SuperResolutionConfig(scale=3)}, "8x8 pixels, but both sides must be multiples"),
        ({"task": "generation"}, "task is 'generation', which starts from noise alone"),
        ({"task": "denoising"}, "task is 'denoising', but must be one of 'generation', 'super-resolution'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_an_image_is_read(options, change, message):
    with pytest.raises(ValueError, match=message):
        replace(options, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DataConfig(streaming=True, image_size=8)}, "streaming is set and no validation set is named"),
        ({"data": DataConfig(max_images=20), "super_resolution": SuperResolutionConfig(scale=3)}, "28x28 pixels"),
        ({"diffusion": DiffusionConfig(class_conditional=True)}, "class_conditional is True, but super-resolution"),
        ({"model": "ronneberger-2015"}, "padding='valid', .* train a network with these"),
    ],
)
def test_data_and_networks_that_do_not_fit_are_refused_before_training(options, change, message):
    options.training = TrainingConfig(trackers=())
    with pytest.raises(ValueError, match=message):
        train_ddpm(replace(options, **change))
    assert not (options.output / "checkpoints").exists()


@pytest.mark.parametrize("wrong", [{"scale": 1}, {"scale": 0}, {"condition_noise": -0.1}, {"condition_noise": 1.0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}, but must be"):
        SuperResolutionConfig(**wrong)


# --- commands and other runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    SuperResolutionPipeline(network(), DDPMScheduler(), 2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generation_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    ImageGenerationPipeline(network(in_channels=1), DDPMScheduler()).save_pretrained(folder)
    return folder


def test_a_run_resumes_only_with_its_own_task(options):
    options.training = replace(options.training, steps=1, warmup_steps=1)
    train_ddpm(options)
    with pytest.raises(ValueError, match="scale is 4, but the run in .* was started with 2"):
        train_ddpm(replace(options, super_resolution=SuperResolutionConfig(scale=4)))
    with pytest.raises(ValueError, match="task is 'generation', but the run in .* was started with 'super-resolution'"):
        train_ddpm(replace(options, task="generation", super_resolution=SuperResolutionConfig()))


def test_runs_from_before_there_was_a_task_option_generate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "small-32"}))
    with pytest.raises(ValueError, match="task is 'super-resolution', but the run in .* was started with 'generation'"):
        claim(tmp_path, {"model": "small-32", "task": "super-resolution", "super_resolution": {"scale": 2}})
    claim(tmp_path, {"model": "small-32", "task": "generation"})
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "generation"


def test_other_pipelines_and_commands_refuse_the_run(run, generation_run, tmp_path):
    for kind in (ImageGenerationPipeline, SegmentationPipeline):
        with pytest.raises(
            ValueError, match="is a super-resolution run, which only enlarges images; use it with upscale"
        ):
            load_pipeline(kind, run)
    with pytest.raises(ValueError, match="holds a ImageGenerationPipeline, which does not enlarge images"):
        load_pipeline(SuperResolutionPipeline, generation_run)
    for wanted in ({"in_channels": 1}, {"in_channels": 2}, {"in_channels": 1, "out_channels": 1}):
        with pytest.raises(ValueError, match="a super-resolution run, whose network sees a small image beside"):
            load_unet(str(run), wanted)
    assert load_unet(str(run), {"in_channels": 2, "out_channels": 1}).config.in_channels == 2
    with pytest.raises(ValueError, match="in_channels is 2 for these data and options, but the network in .* has 1"):
        load_unet(str(generation_run), {"in_channels": 2, "out_channels": 1})
    with pytest.raises(SystemExit, match="sample: .* is a super-resolution run"):
        cli.run("sample", ["--run", str(run), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="upscale: .* does not enlarge images"):
        cli.run("upscale", ["--run", str(generation_run), "--inputs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_images_that_depend_on_seed_and_name_alone(run, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name, seed in (("a.png", 0), ("b.png", 1)):
        Image.fromarray(image(5, 4, seed=seed)[..., 0]).save(images / name)
    arguments = ["--run", str(run), "--steps", "2", "--device", "cpu"]
    cli.run("upscale", [*arguments, "--inputs", str(images), "--output", str(tmp_path / "both")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both")
    cli.run("upscale", [*arguments, "--inputs", str(images / "b.png"), "--output", str(tmp_path / "one")])
    both, one = (Image.open(tmp_path / folder / "b.png") for folder in ("both", "one"))
    assert both.size == (8, 10) and np.array_equal(np.asarray(both), np.asarray(one))

    (tmp_path / "one" / "b.png").write_bytes(b"mine")
    again = [*arguments, "--inputs", str(images), "--output", str(tmp_path / "one")]
    with pytest.raises(SystemExit, match="b.png exists already; set overwrite"):
        cli.run("upscale", again)
    assert (tmp_path / "one" / "b.png").read_bytes() == b"mine"
    assert (tmp_path / "one" / "a.png").read_bytes() == (tmp_path / "both" / "a.png").read_bytes()  # the others go on
    (images / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"(?s)1 of 3 inputs failed.*broken.png cannot be decoded"):
        cli.run("upscale", [*again, "--overwrite"])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / "b.png")), np.asarray(both))


def test_images_that_no_png_holds_are_arrays(tmp_path):
    SuperResolutionPipeline(network(2), DDPMScheduler(), 2).save_pretrained(tmp_path / "run")
    np.save(tmp_path / "small.npy", image(3, 4, 2))
    output = ["--output", str(tmp_path / "out"), "--steps", "1"]
    cli.run("upscale", ["--run", str(tmp_path / "run"), "--inputs", str(tmp_path / "small.npy"), *output])
    large = np.load(tmp_path / "out" / "small.npy")
    assert large.shape == (6, 8, 2) and large.dtype == np.uint8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "inputs is empty"),
        (["--inputs", __file__, "--steps", "0"], "steps is 0"),
        (["--inputs", __file__, "--tile-size", "0"], "tile_size is 0"),
        (["--inputs", __file__, "--condition-noise", "1"], "condition_noise is 1"),
        (["--inputs", "nowhere"], "there is no image outside of"),
    ],
)
def test_mistakes_end_with_one_sentence(run, tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run("upscale", ["--run", str(run), "--output", str(tmp_path / "out"), *arguments])
    assert message in f"{ended.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
