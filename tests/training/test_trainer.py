import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers import DDIMPipeline, DDPMPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from filelock import FileLock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import assert_same_run, final_state, metrics
from tests.support.tiny import power_cut
from unet_diffusion import UNet
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import make_unet, train_ddpm
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import series

ROOT = Path(__file__).resolve().parents[2]
WITH_LAYOUT = """
import runpy, torch
import unet_diffusion.training.trainer as trainer
trainer.memory_layout = lambda device: torch.{layout}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """A JSON config small enough for many runs."""
    path = tmp_path_factory.mktemp("network") / "network.json"
    path.write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    return str(path)


def options_of(output: Path, network: str) -> TrainDDPM:
    training = TrainingConfig(
        steps=6,
        batch_size=4,
        warmup_steps=2,
        log_every=2,
        validate_every=3,
        preview_every=100,
        checkpoint_every=2,
        trackers=(),
    )
    return TrainDDPM(
        output=output,
        model=network,
        data=DataConfig(max_images=60, validation_fraction=0.1, image_size=8),
        diffusion=DiffusionConfig(preview_images=4),
        training=training,
    )


@pytest.fixture
def options(tmp_path, network) -> TrainDDPM:
    return options_of(tmp_path / "run", network)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, network) -> Path:
    """A run by the options that all these tests begin with; to be read or copied, not changed."""
    return train_ddpm(options_of(tmp_path_factory.mktemp("finished") / "run", network))


def without_dropout(network: str, folder: Path) -> str:
    """The same network without dropout, whose losses do not depend on how a step is divided."""
    path = folder / "without_dropout.json"
    path.write_text(json.dumps(json.loads(Path(network).read_text()) | {"dropout": 0.0}))
    return str(path)


def test_a_run_is_a_pipeline_folder_with_images_and_numbers(finished):
    run = finished
    for name in ("README.md", "curves.png", "samples.png", "config.json", "previews/step-00000006.png"):
        assert (run / name).stat().st_size > 0
    assert [row["step"] for row in metrics(run)] == [2, 3, 4, 6, 6]
    assert json.loads((run / "config.json").read_text())["training"]["steps"] == 6
    assert ImageGenerationPipeline.from_pretrained(run).pixel_range.high == (255.0,)


def test_validations_and_previews_take_no_more_images_at_once_than_a_step(options, monkeypatch):
    """So a batch that fits the memory is not too large at the first validation."""
    options.training = replace(options.training, batch_size=2, preview_every=3)
    options.diffusion = replace(options.diffusion, preview_images=5)
    assert len(load_images(options.data).validation) > 2
    seen, forward = [], UNet.forward

    def counted(self, sample, *arguments, **keywords):
        seen.append((self.training, len(sample)))
        return forward(self, sample, *arguments, **keywords)

    monkeypatch.setattr(UNet, "forward", counted)
    train_ddpm(options)
    assert {count for training, count in seen if training} == {2}
    assert {count for training, count in seen if not training} == {1, 2}  # 5 and 6 images, in twos


@pytest.mark.slow
def test_a_new_process_makes_bit_equal_images(options, tmp_path):
    """Images made before saving equal those of a new process that imports only `unet_diffusion`."""
    before = []
    for kind in (DDPMPipeline, ImageGenerationPipeline):
        unet, scheduler = UNet.from_preset("tiny", sample_size=12), options.diffusion.make_scheduler()
        pipe = kind(unet.eval(), scheduler)
        before.append(pipe(3, num_inference_steps=4, generator=torch.manual_seed(1), output_type="np").images)
        pipe.save_pretrained(tmp_path / kind.__name__)
    code = f"""
import numpy, torch, unet_diffusion
from diffusers import DDPMPipeline
from unet_diffusion.pipelines import ImageGenerationPipeline
torch.set_num_threads({torch.get_num_threads()})
for kind in (DDPMPipeline, ImageGenerationPipeline):
    pipe = kind.from_pretrained({str(tmp_path)!r} + "/" + kind.__name__)
    images = pipe(3, num_inference_steps=4, generator=torch.manual_seed(1), output_type="np").images
    numpy.save({str(tmp_path)!r} + f"/{{kind.__name__}}.npy", images)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for kind, images in zip((DDPMPipeline, ImageGenerationPipeline), before):
        assert images.std() > 0
        assert np.array_equal(images, np.load(tmp_path / f"{kind.__name__}.npy"))


def test_the_saved_weights_are_the_moving_average(options, layout):
    run = train_ddpm(options)
    state = final_state(run, 6)
    names = [name.removeprefix("ema.") for name in state if name.startswith("ema.")]
    assert names
    for name in names:
        assert torch.equal(state[f"ema.{name}"], state[f"exported.{name}"])
    assert any(not torch.equal(state[f"ema.{name}"], state[f"model.{name}"]) for name in names)


def test_an_interrupted_run_ends_as_an_undisturbed_one(options, tmp_path, layout):
    """The loss raises in the middle of step 5, after the checkpoint of step 4 and a half-filled log interval."""
    options.training = replace(options.training, accumulate=2, log_every=3)
    whole = train_ddpm(replace(options, output=tmp_path / "whole"))
    with power_cut(DiffusionTask, 10):
        train_ddpm(options)
    assert_same_run(train_ddpm(options), whole, 6)


@pytest.mark.parametrize("log_every", [4, 100])
def test_fewer_steps_than_are_done_end_a_stopped_run_where_it_is(options, log_every):
    """The run was stopped before its first validation, which then takes place once."""
    options.training = replace(options.training, log_every=log_every, validate_every=100)
    with power_cut(DiffusionTask, 5):
        train_ddpm(options)
    logged = metrics(options.output)
    assert len(logged) == (log_every == 4)
    options.training = replace(options.training, steps=3)
    for _ in range(2):
        run = train_ddpm(options)
        *before, row = metrics(run)
        assert before == logged and row["step"] == 4 and row["validation_loss"] > 0
        assert "Optimizer steps: 4" in (run / "README.md").read_text()
    ImageGenerationPipeline.from_pretrained(run)


def test_loader_processes_change_nothing(options, finished, tmp_path):
    with_workers = replace(options, output=tmp_path / "workers", data=replace(options.data, num_workers=1))
    assert_same_run(finished, train_ddpm(with_workers), 6)


def test_a_run_can_be_extended_but_not_changed(options):
    options.training = replace(options.training, schedule="constant")
    train_ddpm(options)
    train_ddpm(replace(options, training=replace(options.training, steps=8)))
    assert metrics(options.output)[-1]["step"] == 8
    with pytest.raises(ValueError, match="learning_rate is 0.5, but the run in .* was started with 0.001"):
        train_ddpm(replace(options, training=replace(options.training, learning_rate=0.5)))


def test_a_resumed_run_may_divide_a_step_differently_but_not_change_its_size(options, tmp_path):
    options.training = replace(options.training, schedule="constant", log_every=1)
    options.model = without_dropout(options.model, tmp_path)
    whole = train_ddpm(replace(options, output=tmp_path / "whole"))
    train_ddpm(replace(options, training=replace(options.training, steps=3)))
    train_ddpm(replace(options, training=replace(options.training, batch_size=2, accumulate=2)))
    losses = [series(metrics(run), "loss")[1] for run in (options.output, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ValueError, match="images_per_step is 8, but the run in .* was started with 4"):
        train_ddpm(replace(options, training=replace(options.training, batch_size=8)))


def test_a_finished_run_is_not_trained_again(options, finished):
    before = metrics(shutil.copytree(finished, options.output))
    train_ddpm(options)
    assert metrics(options.output) == before


def test_a_finished_run_without_checkpoints_is_not_started_again(options, finished):
    run = shutil.copytree(finished, options.output)
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match="is finished and has no checkpoints, so it cannot go on"):
        train_ddpm(replace(options, training=replace(options.training, steps=8)))
    assert {path: path.read_bytes() for path in before} == before


def test_a_loss_of_some_steps_is_averaged_over_these(options, monkeypatch):
    plain, step = DiffusionTask.loss, iter(range(100))

    def loss(self, *arguments):
        value = plain(self, *arguments)
        return {"loss": value, **({"rare": 3 + 0 * value.detach()} if next(step) in (2, 3, 5) else {})}

    monkeypatch.setattr(DiffusionTask, "loss", loss)
    monkeypatch.setattr(DiffusionTask, "validate", lambda *arguments: {"validation_loss": 0.0})
    options.training = replace(options.training, log_every=5, checkpoint_every=4, schedule="constant", steps=4)
    train_ddpm(options)
    state = json.loads((options.output / "checkpoints/step-00000004/state.json").read_text())
    assert state["loss_counts"] == {} and state["seconds"] == 0  # the last step ends a line
    train_ddpm(replace(options, training=replace(options.training, steps=10)))
    assert [row.get("rare") for row in metrics(options.output) if "loss" in row] == [3, None, 3]


def test_the_steps_of_a_stopped_line_go_on(options, monkeypatch):
    options.training = replace(options.training, log_every=6)
    with power_cut(DiffusionTask, 5):
        train_ddpm(options)
    state = json.loads((options.output / "checkpoints/step-00000004/state.json").read_text())
    assert state["loss_counts"] == {"loss": 4} and state["seconds"] > 0
    monkeypatch.setattr("unet_diffusion.training.trainer.time.perf_counter", lambda: 0.0)  # the rest takes no time
    train_ddpm(options)
    lines = (options.output / "metrics.jsonl").read_text().splitlines()
    (row,) = [row for row in map(json.loads, lines) if "loss" in row]
    assert row["images_per_second"] == pytest.approx(6 * 4 / state["seconds"], abs=0.1)


def test_accumulation_is_that_of_the_options(options, tmp_path, monkeypatch):
    options.training = replace(options.training, batch_size=2, accumulate=2)
    whole = train_ddpm(replace(options, output=tmp_path / "whole"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert_same_run(train_ddpm(options), whole, 6)


def test_a_second_run_in_the_folder_is_refused(options, monkeypatch):
    monkeypatch.setattr("unet_diffusion.training.run_folder.WORKERS_END", 0.1)
    options.output.mkdir()
    with FileLock(options.output / ".lock"), pytest.raises(RuntimeError, match="another process is training"):
        train_ddpm(options)


def test_the_learning_rate_follows_the_schedule_in_optimizer_steps(options):
    """Compares with diffusers' own schedule, for any accumulation and any step at which the run was resumed."""
    options.training = replace(options.training, accumulate=2, log_every=1)
    run = train_ddpm(options)
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], options.training.learning_rate)
    schedule = get_cosine_schedule_with_warmup(reference, 2, 6)
    expected = []
    for _ in range(6):
        reference.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert series(metrics(run), "learning_rate")[1] == pytest.approx(expected, abs=1e-12)


def test_accumulation_sees_the_same_images_and_noise_as_one_large_batch(options, tmp_path, network):
    """Without dropout, the mean loss of two halves is the loss of the whole, as the draws are the same."""
    options.model = without_dropout(network, tmp_path)
    halves = replace(
        options, output=tmp_path / "halves", training=replace(options.training, batch_size=2, accumulate=2)
    )
    losses = [series(metrics(train_ddpm(each)), "loss")[1] for each in (options, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_lowers_the_loss(options):
    options.training = replace(options.training, steps=60, warmup_steps=5, learning_rate=5e-3, log_every=20)
    losses = series(metrics(train_ddpm(options)), "loss")[1]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_stays_near_the_full_loss(options, finished, tmp_path, precision):
    half = replace(options, output=tmp_path / precision, training=replace(options.training, mixed_precision=precision))
    run = train_ddpm(half)
    losses = [series(metrics(each), "loss")[1] for each in (finished, run)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
    with power_cut(DiffusionTask, 5):
        train_ddpm(replace(half, output=options.output))
    told = replace(half.training, mixed_precision="auto")  # which is what the run was started with
    assert_same_run(train_ddpm(replace(half, output=options.output, training=told)), run, 6)
    assert json.loads((options.output / "config.json").read_text())["mixed_precision"] == precision


def test_fp16_needs_a_gpu_and_says_so(options):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator, where fp16 works")
    options.training = replace(options.training, mixed_precision="fp16")
    with pytest.raises(ValueError, match="there is only a CPU, which has no fp16"):
        train_ddpm(options)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_divided_among_processes_are_refused(options, monkeypatch, kind):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])  # neither starts on a CPU
    with pytest.raises(ValueError, match=f"distributed_type is {kind}, .* use plain data parallelism"):
        train_ddpm(options)
    assert not options.output.exists()


def test_metrics_reach_tensorboard(options):
    options.training = replace(options.training, steps=2, trackers=("tensorboard",))
    events = EventAccumulator(str(train_ddpm(options) / "logs" / "metrics")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2]


def test_a_stream_trains_and_resumes_where_it_stopped(options, tmp_path):
    """The images come from an Arrow file; a run in two parts equals one without a stop."""
    images = [Image.fromarray(np.full((8, 8), 10 * i, dtype=np.uint8)) for i in range(20)]
    Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()})).save_to_disk(tmp_path / "arrow")
    (arrow,) = (tmp_path / "arrow").glob("*.arrow")
    options.data = DataConfig(data=str(arrow), streaming=True, image_size=8)
    never = TrainingConfig().validate_every  # nothing of a stream is held out
    options.training = replace(options.training, schedule="constant", validate_every=never)
    whole = train_ddpm(replace(options, output=tmp_path / "whole"))
    train_ddpm(replace(options, training=replace(options.training, steps=3)))
    train_ddpm(options)
    assert series(metrics(options.output), "loss")[1][-1] == series(metrics(whole), "loss")[1][-1]
    weights = [final_state(run, 6) for run in (options.output, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_class_labels_are_learnt_and_saved(options):
    options.diffusion = replace(options.diffusion, class_conditional=True)
    pipe = ImageGenerationPipeline.from_pretrained(train_ddpm(options))
    assert pipe.label_names == [str(digit) for digit in range(10)]
    assert pipe.unet.config.num_class_embeds == 10
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, class_labels=["3", "7"], guidance_scale=2.0, num_inference_steps=2).images
    assert len(images) == 2


def test_labels_that_are_dropped_or_missing_are_the_null_class(options):
    options.diffusion = replace(options.diffusion, class_conditional=True)
    data = load_images(options.data)
    unet = make_unet(options, 8, 8, 1, data.train.class_names)
    task = DiffusionTask(unet, data, options.diffusion)
    labels = task._labels(torch.tensor([4, -1, 7]), torch.tensor([False, False, True]))
    assert labels.tolist() == [4, 10, 10]


def test_a_run_can_start_from_the_weights_of_another(options, finished, tmp_path):
    second = replace(
        options, output=tmp_path / "second", model=str(finished), training=replace(options.training, steps=2)
    )
    train_ddpm(second)
    with pytest.raises(ValueError, match="in_channels is 3 for these data .* has 1"):
        train_ddpm(replace(second, output=tmp_path / "third", data=replace(options.data, channels=3)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_before_leaving(options, number, monkeypatch):
    compute, calls = DiffusionTask.loss, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return compute(self, *arguments)

    monkeypatch.setattr(DiffusionTask, "loss", stopped)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        train_ddpm(options)
    assert (options.output / "checkpoints" / "step-00000003").is_dir()
    assert signal.getsignal(number) not in (None, stopped)


def test_signals_are_left_alone_outside_the_main_thread(options):
    thread = threading.Thread(target=train_ddpm, args=(options,))
    thread.start()
    thread.join()
    assert (options.output / "model_index.json").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"schedule": "step"}, "one of 'cosine', 'constant'"),
        ({"mixed_precision": "fp8"}, "one of 'auto', 'no', 'bf16', 'fp16'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_wrong_training_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**wrong)


def test_the_classic_recipe_loads_in_stock_pipelines(options):
    run = train_ddpm(replace(options, diffusion=DiffusionConfig(recipe="ddpm", preview_images=4)))
    for kind in (DDPMPipeline, DDIMPipeline):
        pipe = kind.from_pretrained(run)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.scheduler.config.prediction_type == "epsilon"
        assert np.isfinite(pipe(num_inference_steps=2, output_type="np").images).all()


# --- the command itself ---


def command(options: TrainDDPM, steps: int) -> list[str]:
    training = options.training
    return [
        *(str(ROOT / "scripts" / "train_ddpm.py"), "--output", str(options.output), "--model", options.model),
        *("--max-images", "60", "--validation-fraction", "0.1", "--image-size", "8", "--preview-images", "4"),
        *("--steps", str(steps), "--batch-size", str(training.batch_size), "--warmup-steps", "2", "--log-every", "2"),
        *("--validate-every", "3", "--preview-every", "100", "--checkpoint-every", "2", "--trackers"),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_weights(options, tmp_path):
    """SIGKILL, then the same command: the weights are equal bit for bit on a CPU."""
    steps = 60
    whole = replace(options, output=tmp_path / "whole")
    subprocess.run([sys.executable, *command(whole, steps)], check=True, env=environment())
    process = subprocess.Popen([sys.executable, *command(options, steps)], env=environment())
    while not (options.output / "checkpoints" / "step-00000010").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (options.output / "model_index.json").exists()
    subprocess.run([sys.executable, *command(options, steps)], check=True, env=environment())
    assert_same_run(options.output, whole.output, steps)


@pytest.mark.slow
def test_compiled_blocks_learn_as_eager_ones(options, tmp_path, network):
    options.model = without_dropout(network, tmp_path)
    compiled = replace(options, output=tmp_path / "compiled", training=replace(options.training, compile=True))
    losses = [series(metrics(train_ddpm(each)), "loss")[1] for each in (options, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_two_processes_give_the_losses_of_one(options, tmp_path, network, layout):
    options.model = without_dropout(network, tmp_path)
    one = replace(options, output=tmp_path / "one", training=replace(options.training, batch_size=8))
    subprocess.run([sys.executable, *command(one, 6)], check=True, env=environment())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script, *arguments = command(options, 6)
    with_layout = tmp_path / "with_layout.py"
    with_layout.write_text(WITH_LAYOUT.format(layout=layout, script=script))
    result = subprocess.run(
        [*launch, str(with_layout), *arguments], check=True, env=environment(), capture_output=True, text=True
    )
    assert json.loads((options.output / "config.json").read_text())["processes"] == 2, result.stderr
    for quantity in ("loss", "validation_loss", "learning_rate"):
        single, double = (series(metrics(run.output), quantity) for run in (one, options))
        assert single[0] == double[0]
        assert single[1] == pytest.approx(double[1], rel=1e-4)
