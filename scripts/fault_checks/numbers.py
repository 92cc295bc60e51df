"""Numbers stay numbers: lost losses and gradients, and half precision."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault_checks.finding import Finding
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from unet_diffusion.commands.options import TrainDDPM, TrainSegmentation
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
LOST = 3  # the step that is spoilt, counted from 0
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


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """Spoilt steps in each kind of run, too many of them, and runs in half precision beside one in float32."""
    prepare(work)
    for name, task in (("noise prediction", DiffusionTask), ("segmentation", SegmentationTask)):
        for number in (float("nan"), float("inf")):
            yield skipped(work / f"{name}-{number}", work, name, task, number)
    yield skipped(work / "joint", work, "joint training", DiffusionTask, float("nan"))
    yield ended(work / "ended", work)
    yield from half_precision(work, 40 if reduced else 200)


def prepare(work: Path) -> None:
    """Images of a bright square, masks that say where it is, and a network small enough for many runs."""
    random = np.random.default_rng(0)
    for i in range(16):
        top, left = random.integers(0, 10, 2)
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[top : top + 6, left : left + 6] = 1
        image = (random.integers(0, 60, (16, 16)) + 150 * mask).astype(np.uint8)
        for kind, pixels in (("images", image), ("masks", mask)):
            path = work / kind / f"{i:02d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
    (work / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))


def train(output: Path, work: Path, name: str, training: TrainingConfig = TRAINING) -> Path:
    """A run of one kind on these images."""
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


def spoilt(task: Any, steps: set[int], number: float) -> Callable[[], None]:
    """Multiplies the loss of these steps; returns what takes that back."""
    compute, calls = task.loss, []

    def loss(self: Any, *arguments: Any) -> Tensor:
        calls.append(1)
        return compute(self, *arguments) * (number if len(calls) - 1 in steps else 1)

    task.loss = loss
    return lambda: setattr(task, "loss", compute)


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Weights, moving average and optimizer in a checkpoint."""
    parts = {file.stem: load_file(file) for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")}
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def skipped(output: Path, work: Path, name: str, task: Any, number: float) -> Finding:
    """One lost step: nothing changes in it, the next ones learn, and it is counted."""
    restore = spoilt(task, {LOST}, number)
    try:
        train(output, work, name)
    finally:
        restore()
    before, after, last = (state(output, step) for step in (LOST, LOST + 1, TRAINING.steps))
    unchanged = all(torch.equal(before[key], after[key]) for key in before)
    learnt = sum(not torch.equal(after[key], last[key]) for key in after)
    finite = all(value.isfinite().all() for value in last.values())
    counts = series(read_metrics(output / "metrics.jsonl"), "skipped_steps")[1]
    return Finding(
        PROMISE,
        f"{name}: the loss is {number} in one step",
        f"{len(before)} tensors unchanged: {unchanged}; changed later: {learnt}; skipped steps logged: {counts[-1]}",
        unchanged and learnt > 0 and finite and counts == [0] * LOST + [1] * (TRAINING.steps - LOST),
    )


def ended(output: Path, work: Path) -> Finding:
    """Lost steps without end: the run says which images and timesteps, and leaves a good checkpoint."""
    restore = spoilt(DiffusionTask, set(range(LOST, 100)), float("nan"))
    try:
        train(output, work, "noise prediction")
        message = "the run went on"
    except FloatingPointError as error:
        message = str(error).replace(f"{work}/", "")
    finally:
        restore()
    saved = sorted((output / "checkpoints").iterdir())[-1].name
    step = LOST + TRAINING.max_skipped_steps - 1
    said = all(words in message for words in (f"up to step {step}", "timesteps ", "images "))
    finite = all(value.isfinite().all() for value in state(output, step).values())
    return Finding(
        PROMISE,
        f"the loss is nan from step {LOST} on, and {TRAINING.max_skipped_steps} in a row are borne",
        f"stopped with: {message.split('. ')[0]}; newest checkpoint {saved}, all finite",
        said and finite and saved == f"step-{step:08d}",
    )


def half_precision(work: Path, steps: int) -> Iterator[Finding]:
    """The loss of the last fifth of a run, in each precision that this machine has, against float32."""
    training = replace(TRAINING, steps=steps, checkpoint_every=steps, learning_rate=3e-3)
    precisions = ["bf16", "fp16"] if torch.cuda.is_available() else ["bf16"]

    def loss(precision: str) -> float:
        run = train(
            work / precision,
            work,
            "noise prediction",
            replace(training, mixed_precision=precision),  # type: ignore[arg-type]
        )
        return float(np.mean(series(read_metrics(run / "metrics.jsonl"), "loss")[1][-steps // 5 :]))

    full = loss("no")
    for precision in precisions:
        half = loss(precision)
        off = half / full - 1
        yield Finding(
            PROMISE,
            f"{steps} steps in {precision}, on {'CUDA' if torch.cuda.is_available() else 'the CPU'}",
            f"mean loss of the last fifth {half:.4f}, in float32 {full:.4f}: {off:+.2%} (margin {MARGIN:.0%})",
            abs(off) < MARGIN,
        )
