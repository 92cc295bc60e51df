import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.cuda.runs import CUT, STEPS, TASKS, distance, run_of, state, train
from tests.support.runs import metrics
from tests.support.tiny import power_cut
from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.randomness import keyed_generator, standard_normal
from unet_diffusion.training.metrics_log import series
from unet_diffusion.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("--image-size", "8", "--preview-images", "2", "--batch-size", "4", "--warmup-steps", "1", "--log-every", "4")


def assert_alike(resumed, whole) -> None:
    """The two differ by far less than the steps after the checkpoint changed them."""
    ends = [state(run, STEPS) for run in (resumed, whole)]
    before = state(whole, CUT)
    for part in ("model", "ema", "optimizer"):
        assert distance(*ends, part) < 0.02 * distance(before, ends[1], part), part
    logged = [series(metrics(run), "loss") for run in (resumed, whole)]
    assert logged[0][0] == logged[1][0]
    assert logged[0][1] == pytest.approx(logged[1][1], rel=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(task, tmp_path):
    options = run_of(task, tmp_path, accumulate=2, keep_checkpoints=STEPS)
    whole = train(replace(options, output=tmp_path / "whole"))
    with power_cut(TASKS[task], 2 * CUT + 3):  # in the middle of a step
        train(options)
    assert_alike(train(options), whole)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("task", ["noise prediction", "distillation", "joint"])
def test_half_precision_stays_near_the_full_loss_and_resumes(task, precision, tmp_path):
    full = train(run_of(task, tmp_path, keep_checkpoints=STEPS))
    options = run_of(task, tmp_path, mixed_precision=precision, keep_checkpoints=STEPS)
    whole = train(replace(options, output=tmp_path / "whole"))
    with power_cut(TASKS[task], CUT + 2):
        train(replace(options, output=tmp_path / "resumed"))
    resumed = train(replace(options, output=tmp_path / "resumed"))
    assert_alike(resumed, whole)
    scaler = json.loads((resumed / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())["scaler"]
    assert (scaler is not None) == (precision == "fp16")
    losses = [series(metrics(run), "loss")[1] for run in (full, whole)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_compiled_blocks_learn_as_eager_ones(tmp_path):
    options = run_of("noise prediction", tmp_path)
    (tmp_path / "network.json").write_text(json.dumps({"channels": [16, 32], "head_channels": 16}))  # no dropout
    compiled = replace(options, output=tmp_path / "compiled", training=replace(options.training, compile=True))
    losses = [series(metrics(train(each)), "loss")[1] for each in (options, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_steps_do_not_wait_for_the_device(tmp_path, monkeypatch, device):
    """PyTorch raises in the steps between two readings of lost steps if anything waits."""
    step = Trainer._train_step

    def watched(self, batches):
        if device.type != "cuda" or self.step < 3:  # the first ones choose kernels and fill caches
            return step(self, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", watched)
    for task in ("noise prediction", "segmentation", "joint"):
        train(run_of(task, tmp_path, log_every=100, checkpoint_every=100))


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_lost_step_changes_nothing(tmp_path, monkeypatch, precision):
    """Steps 3 and 4 are lost and read later; only their checkpoints say so."""
    task, calls = TASKS["noise prediction"], []
    compute = task.loss

    def spoilt(self, *arguments):
        calls.append(1)
        return compute(self, *arguments) * (float("nan") if len(calls) in (4, 5) else 1)

    monkeypatch.setattr(task, "loss", spoilt)
    options = run_of(
        "noise prediction", tmp_path, mixed_precision=precision, checkpoint_every=1, keep_checkpoints=STEPS
    )
    run = train(options)
    states = {step: state(run, step) for step in (3, 5, 6)}
    assert all(torch.equal(states[3][name], states[5][name]) for name in states[3])
    assert distance(states[5], states[6], "model") > 0
    assert metrics(run)[-1].get("skipped_steps", metrics(run)[-2].get("skipped_steps")) == 2


# commands


def command(options, steps: int) -> list[str]:
    data = ["--data", options.data.data, "--validation-fraction", "0.25", "--cache-dir", options.data.cache_dir]
    run = ["--output", str(options.output), "--model", options.model, "--steps", str(steps), "--checkpoint-every", "10"]
    return [str(ROOT / "scripts" / "train_ddpm.py"), *run, *data, *COMMAND, "--trackers"]


def test_a_killed_run_started_again_ends_near_an_undisturbed_one(tmp_path):
    options = run_of("noise prediction", tmp_path)
    whole = replace(options, output=tmp_path / "whole")
    subprocess.run([sys.executable, *command(whole, 40)], check=True, env=dict(os.environ))
    process = subprocess.Popen([sys.executable, *command(options, 40)], env=dict(os.environ))
    while not (options.output / "checkpoints" / "step-00000010").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, *command(options, 40)], check=True, env=dict(os.environ))
    losses = [series(metrics(run.output), "loss")[1] for run in (options, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_one_process_of_ddp_gives_the_losses_of_a_plain_one(tmp_path):
    options = run_of("noise prediction", tmp_path)
    launched = replace(options, output=tmp_path / "launched")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    subprocess.run([sys.executable, *command(options, 8)], check=True, env=dict(os.environ))
    subprocess.run([*launch, *command(launched, 8)], check=True, env=dict(os.environ))
    losses = [series(metrics(run.output), "loss")[1] for run in (options, launched)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


# what is drawn and varied on the device


def generators(*indices: int) -> list[torch.Generator]:
    return [keyed_generator(0, "sample", index) for index in indices]


def test_noise_depends_on_the_generator_of_its_sample_alone(device):
    batch = standard_normal((1, 16, 16), generators(0, 1, 2), device)
    assert batch.device.type == device.type
    assert torch.equal(standard_normal((1, 16, 16), generators(2, 0), device), batch[[2, 0]])


def test_images_and_masks_are_varied_as_on_a_cpu(device):
    images, masks = torch.rand(6, 3, 24, 24) * 1.6 - 0.8, torch.randint(0, 3, (6, 24, 24))
    config = AugmentationConfig(noise=0.0, colour=0.3, invert=0.5)
    expected = augment(images, masks, config, generators(*range(6)), images[:, :1] + 1)
    found = augment(
        *(each.to(device) for each in (images, masks)), config, generators(*range(6)), (images[:, :1] + 1).to(device)
    )
    torch.testing.assert_close(found.images.cpu(), expected.images, atol=1e-3, rtol=0)
    assert (found.masks.cpu() != expected.masks).float().mean() < 0.01  # nearest neighbours at equal distances
