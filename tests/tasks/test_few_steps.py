"""Tuned runs: from `tune-few-steps` to images in one and two steps, resuming, records, refusals and warnings."""

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.runs import assert_same_run, metrics
from tests.support.tiny import power_cut
from unet_diffusion import cli
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps, TuningData
from unet_diffusion.commands.options.upscale import Upscale
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.tune_few_steps import make_task, run_images, tune_few_steps
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.consistency import consistency_function
from unet_diffusion.diffusion.distillation import EVALUATIONS
from unet_diffusion.diffusion.low_resolution import enlarged
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline, SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import load_pipeline, load_unet
from unet_diffusion.tasks.config import DiffusionConfig, FewStepsConfig, SuperResolutionConfig
from unet_diffusion.tasks.few_steps import MATCHING, PROGRESS, FewStepsTask
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2

TRAINING = {"batch_size": 4, "warmup_steps": 2, "log_every": 2, "trackers": ()}
EVERY = {"checkpoint_every": 2, "validate_every": 4, "preview_every": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of four steps with classes, on 60 digits of 8 x 8 pixels, some of them held out."""
    folder = tmp_path_factory.mktemp("few-steps")
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    options = TrainDDPM(
        output=folder / "base",
        model=str(folder / "network.json"),
        data=DataConfig(max_images=60, validation_fraction=0.1, image_size=8),
        diffusion=DiffusionConfig(preview_images=4, class_conditional=True),
        training=TrainingConfig(steps=4, **TRAINING, **EVERY),
    )
    return train_ddpm(options)


METHODS = {"distillation": FewStepsConfig(), "consistency": FewStepsConfig("consistency", stages=2)}
SOURCES = {"distillation": "Luhman & Luhman 2021", "consistency": "ECT, Geng et al. 2024"}


def tuning(base: Path, output: Path, method: str = "distillation") -> TuneFewSteps:
    training = TrainingConfig(steps=4, learning_rate=1e-4, schedule="constant", accumulate=2, **TRAINING, **EVERY)
    return TuneFewSteps(model=base, output=output, few_steps=METHODS[method], training=training)


@pytest.fixture(scope="module")
def both(base) -> dict[str, Path]:
    """A tuned run of each method."""
    return {method: tune_few_steps(tuning(base, base.parent / method, method)) for method in METHODS}


@pytest.fixture(scope="module")
def tuned(both) -> Path:
    return both["distillation"]


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_run_knows_what_it_is(base, both, method):
    tuned = both[method]
    index, config = (json.loads((tuned / name).read_text()) for name in ("model_index.json", "config.json"))
    assert index["_few_steps"] == 4 and index["_class_name"] == "DDPMPipeline"
    assert config["few_steps"] == asdict(METHODS[method]) and config["model"] == str(base)
    assert config["data"]["data"] == "mnist-5000" and config["diffusion"]["class_conditional"]
    card = (tuned / "README.md").read_text()
    assert "in 1 to 4 steps" in card and "LCMScheduler" in card and SOURCES[method] in card
    assert Image.open(tuned / "samples.png").size == (2 * 10 + 2, 4 * 10 + 2)  # 4 images in one step, 4 in two
    assert len([row for row in metrics(tuned) if "validation_loss" in row]) == 1
    assert load_pipeline(ImageGenerationPipeline, tuned).few_steps == 4
    assert load_pipeline(ImageGenerationPipeline, base).few_steps is None


def test_the_noise_and_the_held_out_images_are_those_of_the_run(base, tuned):
    before, after = (json.loads((run / "scheduler/scheduler_config.json").read_text()) for run in (base, tuned))
    assert after.pop("timestep_spacing") == "trailing" and before.pop("timestep_spacing") == "leading"
    assert before == after
    records = [DataRecord.read(run) for run in (base, tuned)]
    assert records[0].held_out == records[1].held_out != ()
    assert records[0].fingerprint == records[1].fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_tuning_ends_as_an_undisturbed_one(base, both, method, tmp_path):
    """The loss raises in the second half of step 3, after the checkpoint of step 2 and the change of the stage.

    The targets of distillation are then still those of the run that is tuned, and step 4 matches distributions.
    """
    options = tuning(base, tmp_path / "cut", method)
    with power_cut(FewStepsTask, 6):
        tune_few_steps(options)
    assert_same_run(tune_few_steps(options), both[method], 4)


def test_another_teacher_ends_a_tuning(base, tmp_path):
    """The run to tune was trained further in its folder."""
    model = shutil.copytree(base, tmp_path / "base")
    options = tuning(model, tmp_path / "cut")
    with power_cut(FewStepsTask, 6):
        tune_few_steps(options)
    weights = load_file(model / "unet/diffusion_pytorch_model.safetensors")
    weights["stem.weight"] += 1e-3
    save_file(weights, model / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="the weights of .*base have changed since the run in .*cut was started"):
        tune_few_steps(options)


@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_with_more_steps_stays_in_its_last_phase(base, both, method, tmp_path):
    run = shutil.copytree(both[method], tmp_path / "run")
    options = tuning(base, run, method)
    task = make_task(replace(options, data=run_images(base, options.data)), load_images(run_images(base, options.data)))
    longer = replace(options.training, steps=40)
    saved = load_file(run / "checkpoints/step-00000004/task.safetensors")
    assert saved[PROGRESS] == 0.75
    task.state = saved
    batches = task.batches(RunContext(longer, Accelerator(cpu=True)), 4)
    assert [next(batches)[PROGRESS].item() for _ in range(4)] == [0.75] * 4


def test_a_tuning_of_an_earlier_version_was_for_consistency(base, both, tmp_path):
    """Its options name no method; it resumes as it was, and not as another."""
    run = shutil.copytree(both["consistency"], tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    del saved["few_steps"]["method"]
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="method is 'distillation', but the run .* was started with 'consistency'"):
        tune_few_steps(tuning(base, run))
    tune_few_steps(tuning(base, run, "consistency"))


def test_one_step_of_ddim_is_the_consistency_function_at_the_last_timestep(tuned):
    pipe = DDIMPipeline.from_pretrained(tuned)
    pipe.unet.register_to_config(label_dropout=0.1)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(generator=torch.manual_seed(0), num_inference_steps=1, output_type="np").images
    noise = torch.randn(1, 1, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        prediction = pipe.unet(noise, 999).sample
    end = consistency_function(pipe.scheduler, noise, torch.tensor([999]), prediction)
    np.testing.assert_allclose(image[..., 0], (end / 2 + 0.5).clamp(0, 1)[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
def test_stock_and_own_pipelines_give_the_same_images_from_the_same_noise(tuned, steps):
    ours = load_pipeline(ImageGenerationPipeline, tuned)
    stock = DiffusionPipeline.from_pretrained(tuned)
    assert type(stock) is DDPMPipeline
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, clip_sample=False, original_inference_steps=1000)
    ours.scheduler = sampler("lcm", ours.scheduler)
    images = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(1, num_inference_steps=steps, generator=torch.manual_seed(0), output_type="np").images)
    np.testing.assert_allclose(*images, atol=1e-5)


def test_sample_takes_two_steps_of_lcm_by_default(base, tuned, tmp_path):
    assert GenerationOptions(tuned).sampling == ("lcm", 2)
    assert GenerationOptions(tuned, steps=1).sampling == ("lcm", 1)
    assert GenerationOptions(base).sampling == ("dpm-solver++", 20)
    change_scheduler(run := shutil.copytree(base, tmp_path / "noise"))
    assert GenerationOptions(run).sampling == ("sde-dpm-solver++", 20)
    assert GenerationOptions(run, sampler="ddim").sampling == ("ddim", 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for steps in ([], ["--steps", "1"]):
            output = tmp_path / "-".join(["images", *steps])
            cli.run(
                "sample", ["--run", str(tuned), "--count", "2", "--output", str(output), "--class-labels", "7", *steps]
            )
            assert len(list(output.glob("0*.png"))) == 2


def test_guidance_is_refused_with_the_reason(tuned):
    with pytest.raises(SystemExit, match="guidance_scale is 2.0, but the network was tuned to .*; set it to 1"):
        arguments = ["--run", str(tuned), "--class-labels", "7", "--guidance-scale", "2", "--output", str(tuned / "x")]
        cli.run("sample", arguments)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("dpm-solver++", 1, "num_inference_steps is 1, but the network was not tuned .* tune-few-steps --model RUN"),
        ("dpm-solver++", 2, "num_inference_steps is 2, but the network was not tuned"),
        ("lcm", 4, "the scheduler is LCMScheduler, but the network was not tuned"),
    ],
)
def test_few_steps_of_a_run_that_was_not_tuned_are_warned_of(base, name, steps, message):
    pipe = load_pipeline(ImageGenerationPipeline, base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler(name, pipe.scheduler)
    with pytest.warns(UserWarning, match=message) as caught:
        pipe(num_inference_steps=steps)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
        pipe(num_inference_steps=3)


def test_many_steps_of_a_tuned_run_are_warned_of(tuned):
    pipe = load_pipeline(ImageGenerationPipeline, tuned)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
    with pytest.warns(
        UserWarning, match="DPMSolverMultistepScheduler with num_inference_steps 20, but .* sampler..lcm"
    ):
        pipe(num_inference_steps=20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": TuningData("mnist-5000", validation_fraction=0)}, "validate_every is 4, but no image is held out"),
        ({"data": TuningData("mnist-5000", label_column="kind")}, "label_column is 'kind', but the network does not"),
    ],
)
def test_options_that_decide_nothing_are_refused(base, tmp_path, given, message):
    run = shutil.copytree(base, tmp_path / "run")
    network = json.loads((run / "unet/config.json").read_text())
    (run / "unet/config.json").write_text(json.dumps({**network, "num_class_embeds": None}))
    options = replace(tuning(run, tmp_path / "tuned"), **given)
    with pytest.raises(ValueError, match=message):
        options.check_paths()


def test_validations_of_a_run_that_held_nothing_out_are_refused(tmp_path):
    (tmp_path / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    run = train_ddpm(
        TrainDDPM(
            output=tmp_path / "run",
            model=str(tmp_path / "network.json"),
            data=DataConfig(max_images=4, validation_fraction=0, image_size=8),
            diffusion=DiffusionConfig(preview_images=1),
            training=TrainingConfig(steps=1, batch_size=2, warmup_steps=0, trackers=()),
        )
    )
    with pytest.raises(ValueError, match="validate_every is 4, but no image is held out"):
        tune_few_steps(tuning(run, tmp_path / "tuned"))
    assert not (tmp_path / "tuned" / "config.json").exists()


def test_a_tuned_run_is_no_teacher(both, tmp_path):
    """Distillation learns from means, which no tuned network predicts; consistency tuning learns from the images."""
    for run in both.values():
        with pytest.raises(
            ValueError, match="a run that was tuned for 1 to 4 steps, but distillation learns from the mean"
        ):
            tune_few_steps(tuning(run, tmp_path / "again"))
        tuning(run, tmp_path / "again", "consistency").check_paths()
    assert not (tmp_path / "again" / "config.json").exists()


def test_an_export_says_how_a_tuned_run_generates(base, tuned, tmp_path):
    for run, said, left_out in (
        (tuned, ("pipe(num_inference_steps=1)", "1 to 4 steps of LCMScheduler"), "guidance"),
        (base, ("pipe().images", "any scheduler, classes and guidance"), "LCMScheduler"),
    ):
        cli.run("export", [str(run), str(tmp_path / run.name)])
        text = (tmp_path / run.name / "README.md").read_text()
        assert all(each in text for each in said) and left_out not in text


def test_a_tuned_run_still_segments(tuned):
    unet = load_unet(str(tuned), {"in_channels": 1}).to_segmentation(3).eval()
    assert unet(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 3, 8, 8)


def test_timesteps_can_be_drawn_again_and_the_stage_follows_from_the_step(base):
    """`describe` draws the timesteps again for the message about a lost step; the stage follows from the step alone."""
    options = tuning(base, base.parent / "unused", "consistency")
    task = make_task(options, load_images(run_images(base, DataConfig())))
    context = RunContext(options.training, Accelerator(cpu=True))
    batches = task.batches(context, 1)
    taken = [next(batches) for _ in range(6)]  # two micro-batches of the steps 1, 2 and 3 of 4
    assert [batch[PROGRESS].item() for batch in taken] == [0.25] * 2 + [0.5] * 2 + [0.75] * 2
    seen = []
    task.network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    for batch, step in ((taken[0], 1 / 16), (taken[2], 1 / 256)):
        task.loss(task.network, batch, [keyed_generator(0, i) for i in range(4)])
        assert task.step == step
    expected = task._timesteps([keyed_generator(0, i) for i in range(4)])
    assert torch.equal(seen[-1], expected)
    text = task.describe(context, 1, [keyed_generator(0, i) for i in range(4)])
    assert text.startswith(f"timesteps {', '.join(map(str, expected.tolist()))}; images")


@pytest.fixture(scope="module")
def enlarging(tmp_path_factory) -> Path:
    """A run of super-resolution of four steps, and beside it the same run tuned for four more."""
    folder = tmp_path_factory.mktemp("enlarging")
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    run = train_ddpm(
        TrainDDPM(
            output=folder / "base",
            task="super-resolution",
            model=str(folder / "network.json"),
            data=DataConfig(max_images=60, validation_fraction=0.1, image_size=8),
            diffusion=DiffusionConfig(preview_images=4),
            super_resolution=SuperResolutionConfig(scale=2, condition_noise=0.2),
            training=TrainingConfig(steps=4, **TRAINING, **EVERY),
        )
    )
    tune_few_steps(tuning(run, folder / "tuned"))
    return folder


def test_a_tuned_run_of_super_resolution_enlarges_in_two_steps(enlarging, tmp_path):
    tuned, small = enlarging / "tuned", tmp_path / "small.png"
    pipe = load_pipeline(SuperResolutionPipeline, tuned)
    assert pipe.few_steps == 4 and pipe.scale == 2
    config = json.loads((tuned / "config.json").read_text())
    assert config["super_resolution"] == {"scale": 2, "condition_noise": 0.2}
    card = (tuned / "README.md").read_text()
    assert "2 times larger a side, in 1 to 4 steps" in card and "enlarged in 2 steps of `lcm`" in card
    Image.new("L", (4, 5), 99).save(small)
    options = {run: Upscale(enlarging / run, (str(small),)) for run in ("base", "tuned")}
    assert {run: each.sampling for run, each in options.items()} == {"base": ("dpm-solver++", 20), "tuned": ("lcm", 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cli.run("upscale", ["--run", str(tuned), "--inputs", str(small), "--output", str(tmp_path / "large")])
    assert Image.open(tmp_path / "large" / "small.png").size == (8, 10)
    pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
    with pytest.warns(UserWarning, match="with num_inference_steps 20, but the network was tuned"):
        pipe(small)
    untuned = load_pipeline(SuperResolutionPipeline, enlarging / "base")
    with pytest.warns(UserWarning, match="num_inference_steps is 2, but the network was not tuned") as caught:
        untuned(small, num_inference_steps=2)
    assert caught[0].filename == __file__


def test_one_step_of_a_tuned_run_of_super_resolution_is_the_consistency_function(enlarging):
    pipe = load_pipeline(SuperResolutionPipeline, enlarging / "tuned")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler("lcm", pipe.scheduler)
    small = torch.randint(0, 256, (1, 1, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(1))
    (image,) = pipe(small, 1, torch.manual_seed(0), output_type="pt", return_dict=False)
    noise = torch.randn(1, 1, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        seen = torch.cat([noise, enlarged(small, 2, pipe.pixel_range)], dim=1)
        prediction = pipe.unet(seen, 999, head="noise").sample
    end = consistency_function(pipe.scheduler, noise, torch.tensor([999]), prediction)
    torch.testing.assert_close(image[0], (end[0] / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "step", "passes"),
    [("consistency", 3, 2), ("distillation", 1, EVALUATIONS + 2), ("distillation", 3, 3)],
)
def test_all_passes_of_the_tuning_see_the_same_noisy_condition(enlarging, method, step, passes):
    options = tuning(enlarging / "base", enlarging / "unused", method)
    task = make_task(options, load_images(run_images(options.model, DataConfig())))
    task.points.by_steps = [[999]]
    batch = next(task.batches(RunContext(options.training, Accelerator(cpu=True)), step))
    assert (batch[PROGRESS] >= MATCHING) == (step == 3)
    networks = [task.network] if task.teacher is None else [*task.network.children(), task.teacher]
    seen = []
    for network in networks:
        network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][:, 1:]))
    task.loss(task.network, batch, [keyed_generator(0, i) for i in range(4)])
    assert len(seen) == passes and all(torch.equal(each, seen[0]) for each in seen)
    clean = task.pixel_range.to_model(batch["image"])
    assert not torch.equal(seen[0], task.condition(clean))  # which has no noise


def change_scheduler(run: Path) -> None:
    path = run / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "epsilon"}))


def change_kind(name: str):
    def change(run: Path) -> None:
        index = json.loads((run / "model_index.json").read_text())
        (run / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_scheduler, "prediction_type is 'epsilon', but a network that predicts noise"),
        (change_kind("SegmentationPipeline"), "a run that gives masks, but tuning changes the layers"),
        (lambda run: shutil.rmtree(run / "scheduler"), "there is no scheduler in it"),
        (
            lambda run: (run / "model_index.json").unlink(),
            "there is no model_index.json; give the folder of a finished",
        ),
    ],
)
def test_runs_that_cannot_be_tuned_are_refused_before_an_image_is_read(base, tmp_path, change, message):
    run = shutil.copytree(base, tmp_path / "run")
    change(run)
    with pytest.raises(SystemExit, match=message):
        cli.run("tune-few-steps", ["--model", str(run), "--output", str(tmp_path / "tuned")])
    assert not (tmp_path / "tuned").exists()


def test_the_images_of_the_run_are_mapped_by_the_range_that_it_learnt(base, tmp_path):
    """The saved range is 0 to 200, as of fewer images; measured again, it is another."""
    run = shutil.copytree(base, tmp_path / "run")
    learnt = {"low": [0.0], "high": [200.0], "dtype": "uint8"}
    index = json.loads((run / "model_index.json").read_text())
    (run / "model_index.json").write_text(json.dumps({**index, "_pixel_range": learnt}))
    tuned = tune_few_steps(tuning(run, tmp_path / "tuned"))
    assert json.loads((tuned / "model_index.json").read_text())["_pixel_range"] == learnt


def test_outputs_and_images_that_do_not_fit_are_refused(base, tmp_path):
    options = tuning(base, tmp_path / "tuned")
    with pytest.raises(ValueError, match="the run to tune, which does not change; give another folder"):
        tune_few_steps(replace(options, output=base))
    with pytest.raises(ValueError, match="image_size is 8, but data is not given"):
        TuningData(image_size=8)
    other = DataConfig(max_images=60, validation_fraction=0.1, image_size=8, value_range=(0, 128))
    with pytest.raises(ValueError, match="but these are mapped by .*; give neither value_range nor percentiles"):
        tune_few_steps(replace(options, data=other))
    with pytest.raises(ValueError, match="stages is 0, but must be an integer of at least 1"):
        FewStepsConfig("consistency", stages=0)
    with pytest.raises(ValueError, match="method is 'both', but must be one of"):
        FewStepsConfig("both")


def test_the_number_of_steps_in_a_saved_pipeline_is_checked(base):
    pipe = load_pipeline(ImageGenerationPipeline, base)
    with pytest.raises(ValueError, match="few_steps is 0, but must be an integer of at least 1, or None"):
        ImageGenerationPipeline(pipe.unet, pipe.scheduler, few_steps=0)
