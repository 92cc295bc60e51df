"""A step whose loss is not finite changes nothing; half precision learns like float32."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.tiny import squares
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series

PROMISE = "Numbers stay numbers"
LOST = 3  # the step whose loss is spoilt, from 0
MARGIN = 0.02  # of the loss of float32, relative
TRAINING = TrainingConfig(
    steps=6,
    batch_size=4,
    warmup_steps=1,
    log_every=1,
    checkpoint_every=1,
    keep_checkpoints=6,
    max_skipped_steps=2,
    trackers=(),
)
TASKS = {"noise prediction": DiffusionTask, "segmentation": SegmentationTask, "joint training": DiffusionTask}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Images, masks, and a network small enough for many runs."""
    folder = tmp_path_factory.mktemp("numbers")
    squares(folder, 16)
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return folder


def train(output: Path, work: Path, name: str, training: TrainingConfig = TRAINING) -> Path:
    """Trains for a task of `TASKS`; returns the folder of the run."""
    model = str(work / "network.json")
    if name == "noise prediction":
        data = DataConfig(data=str(work / "images"), validation_fraction=0.25)
        return train_ddpm(TrainDDPM(output, model, data, DiffusionConfig(preview_images=1), training))
    return train_segmentation(
        TrainSegmentation(
            data=MaskedDataConfig(data=str(work / "images"), masks=str(work / "masks"), validation_fraction=0.25),
            output=output,
            model=model,
            segmentation=SegmentationConfig(preview_images=1),
            joint=JointConfig(denoising_weight=1.0 if name == "joint training" else 0.0),
            training=training,
        )
    )


@pytest.fixture
def spoil(monkeypatch) -> Callable[[type, range, float], None]:
    """Multiplies the loss of some steps of a task by a number."""

    def apply(task: type, steps: range, number: float) -> None:
        compute, calls = task.loss, []

        def loss(self, *arguments) -> Tensor:
            calls.append(1)
            return compute(self, *arguments) * (number if len(calls) - 1 in steps else 1)

        monkeypatch.setattr(task, "loss", loss)

    return apply


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Returns the weights, moving average and optimizer of a checkpoint."""
    parts = {file.stem: load_file(file) for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("noise prediction", float("nan")),
        ("noise prediction", float("inf")),
        ("segmentation", float("nan")),
        ("segmentation", float("inf")),
        ("joint training", float("nan")),
    ],
)
def test_the_loss_is_not_finite_in_one_step(name, number, work, spoil, tmp_path, record_property):
    record_property("fault", f"{name}: the loss is {number} in one step")
    spoil(TASKS[name], range(LOST, LOST + 1), number)
    run = train(tmp_path, work, name)
    before, after, last = (state(run, step) for step in (LOST, LOST + 1, TRAINING.steps))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    learnt = sum(not torch.equal(after[key], last[key]) for key in after)
    assert learnt > 0
    assert all(value.isfinite().all() for value in last.values())
    counts = series(read_metrics(run / "metrics.jsonl"), "skipped_steps")[1]
    assert counts == [0] * LOST + [1] * (TRAINING.steps - LOST)
    record_property("figure", f"{len(before)} tensors unchanged by it, {learnt} changed later; 1 skipped step logged")


def test_the_loss_is_nan_in_every_step(work, spoil, tmp_path, record_property):
    """The run says which images and timesteps, and leaves a good checkpoint."""
    limit = TRAINING.max_skipped_steps
    record_property("fault", f"the loss is nan from step {LOST} on, and {limit} such steps in a row are allowed")
    spoil(DiffusionTask, range(LOST, 100), float("nan"))
    with pytest.raises(FloatingPointError) as error:
        train(tmp_path, work, "noise prediction")
    step = LOST + limit - 1
    message = str(error.value).replace(f"{work}/", "")
    assert all(words in message for words in (f"up to step {step}", "timesteps ", "images "))
    newest = max((tmp_path / "checkpoints").iterdir()).name
    assert newest == f"step-{step:08d}"
    assert all(value.isfinite().all() for value in state(tmp_path, step).values())
    record_property("figure", f"stopped with: {message.split('. ')[0]}; newest checkpoint {newest}, all finite")


@pytest.fixture(scope="module")
def final_loss(work, full) -> Callable[[str], float]:
    """The mean loss of the last fifth of a run, by its precision."""
    steps = 200 if full else 40
    training = replace(TRAINING, steps=steps, checkpoint_every=steps, learning_rate=3e-3)

    def loss(precision: str) -> float:
        run = train(work / precision, work, "noise prediction", replace(training, mixed_precision=precision))
        losses = series(read_metrics(run / "metrics.jsonl"), "loss")[1]
        assert len(losses) == steps
        return float(np.mean(losses[-steps // 5 :]))

    return loss


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_half_precision(precision, final_loss, full, record_property):
    cuda = torch.cuda.is_available()
    record_property("fault", f"{200 if full else 40} steps in {precision}, on {'CUDA' if cuda else 'the CPU'}")
    if precision == "fp16" and not cuda:
        pytest.skip("fp16 needs a GPU")
    half, single = final_loss(precision), final_loss("no")
    off = half / single - 1
    assert abs(off) < MARGIN
    figure = f"mean loss of the last fifth {half:.4f}, in float32 {single:.4f}: {off:+.2%} (margin {MARGIN:.0%})"
    record_property("figure", figure)
