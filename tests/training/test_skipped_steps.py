"""Steps whose loss or gradient is not finite change nothing, are counted, and end a run if there are too many."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny import squares
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import make_task
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.sets import load_images
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.joint import JointTask
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.accelerator import RunContext, make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics

STEPS = 6


@pytest.fixture
def options(tmp_path) -> TrainDDPM:
    """A run with BatchNorm, whose running means a lost step could spoil, and with a checkpoint after every step."""
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "norm": "batch"}))
    training = TrainingConfig(
        steps=STEPS,
        batch_size=4,
        warmup_steps=1,
        log_every=2,
        checkpoint_every=1,
        keep_checkpoints=STEPS,
        max_skipped_steps=2,
        trackers=(),
    )
    data = DataConfig(max_images=40, validation_fraction=0.1, image_size=8)
    return TrainDDPM(tmp_path / "run", str(network), data, DiffusionConfig(preview_images=4), training)


def spoil(monkeypatch, steps: set[int], how: str = "loss", accumulate: int = 1) -> list[torch.Tensor]:
    """Spoils the given steps; returns a list that collects the images of every forward pass."""
    compute, seen = DiffusionTask.loss, []

    def spoilt(self, unet, batch, generators):
        step, seen_before = divmod(len(seen), accumulate)
        seen.append(batch["image"])
        if step not in steps or seen_before:  # only the first of several forward passes is spoilt
            return compute(self, unet, batch, generators)
        if how == "image":  # which reaches the running means
            return compute(self, unet, batch | {"image": batch["image"].float().fill_(torch.nan)}, generators)
        loss = compute(self, unet, batch, generators)
        if how == "gradient":  # the gradient of a square root at 0 is infinite, times 0
            return loss + (0 * self.network.noise_head.bias.sum()).sqrt()
        return loss * float("nan")

    monkeypatch.setattr(DiffusionTask, "loss", spoilt)
    return seen


def checkpoint(options: TrainDDPM, step: int) -> dict[str, torch.Tensor]:
    folder = options.output / "checkpoints" / f"step-{step:08d}"
    tensors = {part: load_file(folder / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    return {f"{part}.{name}": value for part in tensors for name, value in tensors[part].items()}


def logged(options: TrainDDPM) -> list[dict]:
    return [row for row in read_metrics(options.output / "metrics.jsonl") if "skipped_steps" in row]


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("how", "accumulate"), [("loss", 1), ("gradient", 1), ("image", 1), ("image", 2)])
def test_a_lost_step_changes_nothing_and_later_ones_do(options, monkeypatch, how, accumulate):
    options.training = replace(options.training, accumulate=accumulate)
    spoil(monkeypatch, {2}, how, accumulate)
    train_ddpm(options)
    states = [checkpoint(options, step) for step in range(1, STEPS + 1)]
    assert changed(states[1], states[2]) == set()  # before and after step 2
    for before, after in zip(states[2:], states[3:]):
        assert {"model.stem.weight", "ema.stem.weight", "optimizer.stem.weight/step"} <= changed(before, after)
    assert all(value.isfinite().all() for value in states[-1].values())
    assert states[-1]["optimizer.stem.weight/step"] == STEPS - 1

    rows = logged(options)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows)


def test_the_logged_loss_is_that_of_the_steps_that_count(options, monkeypatch):
    """Steps 2 and 3 share a line: if step 2 is lost, it holds the loss of step 3, which continues from step 1."""
    single, spoilt = (replace(options, output=options.output.with_name(name)) for name in ("single", "spoilt"))
    single.training = replace(options.training, log_every=1)
    spoil(monkeypatch, {2})
    train_ddpm(single)
    monkeypatch.undo()
    spoil(monkeypatch, {2})
    train_ddpm(spoilt)
    singles, pairs = ({row["step"]: row.get("loss") for row in logged(each)} for each in (single, spoilt))
    assert singles[3] is None  # steps are counted from 0, lines from 1: the lost step has no loss
    assert pairs[4] == singles[4]
    assert pairs[2] == pytest.approx((singles[1] + singles[2]) / 2)


def test_too_many_in_a_row_end_the_run_and_say_which_images_and_timesteps(options, monkeypatch, caplog):
    seen = spoil(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 4: ") as error:
        train_ddpm(options)
    last = sorted(path.name for path in (options.output / "checkpoints").iterdir())[-1]
    assert last == "step-00000004"  # of the steps 0 to 3

    timesteps = [int(torch.randint(1000, (), generator=keyed_generator(0, "sample", 4, i))) for i in range(4)]
    assert f"timesteps {', '.join(map(str, timesteps))}; images " in str(error.value)
    rows = [int(row) for row in re.search(r"images ([\d, ]+) of mnist-5000", str(error.value))[1].split(", ")]
    cache = load_images(options.data, options.training.seed).train.cache
    assert torch.equal(torch.stack([torch.from_numpy(cache.image(row).copy()) for row in rows]), seen[4])
    assert [record.getMessage()[:14] for record in caplog.records if "skipped" in record.getMessage()] == [
        "step 1 skipped",
        "step 3 skipped",
    ]


@pytest.mark.parametrize("how", ["loss", "gradient", "image"])
def test_steps_that_are_judged_on_the_device_are_lost_as_those_judged_at_once(options, monkeypatch, how, caplog):
    """An accelerator runs ahead, and lost steps are read later: the weights do not show it."""
    late = {"log_every": STEPS, "checkpoint_every": STEPS, "max_skipped_steps": 4, "keep_checkpoints": 1}
    runs = [replace(options, output=options.output.with_name(f"ahead-{ahead}")) for ahead in (1, 4)]
    for run, ahead in zip(runs, (1, 4)):
        run.training = replace(options.training, **late)
        monkeypatch.setattr("unet_diffusion.training.trainer.steps_ahead", lambda device, limit, ahead=ahead: ahead)
        spoil(monkeypatch, {1, 2, 4}, how)
        train_ddpm(run)
        monkeypatch.undo()
        assert [each[:14] for each in caplog.messages if "skipped" in each] == [f"step {i} skipped" for i in (1, 2, 4)]
        caplog.clear()
    assert logged(runs[0])[-1]["loss"] == logged(runs[1])[-1]["loss"]
    assert [logged(run)[-1]["skipped_steps"] for run in runs] == [3, 3]
    at_once, ahead = (checkpoint(run, STEPS) for run in runs)
    assert not changed(at_once, ahead)


def test_too_many_lost_steps_end_the_run_also_if_they_are_read_late(options, monkeypatch):
    options.training = replace(options.training, log_every=100, checkpoint_every=100)
    monkeypatch.setattr("unet_diffusion.training.trainer.steps_ahead", lambda device, limit: limit)
    seen = spoil(monkeypatch, {1, 2, 3})
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 2: timesteps "):
        train_ddpm(options)
    assert len(seen) == 4  # read after steps 1 and 3


def test_a_resumed_run_remembers_what_it_skipped(options, monkeypatch):
    """Step 3 is skipped before the stop and step 4 after it: two in a row."""
    stopped = replace(options, training=replace(options.training, steps=4))
    spoil(monkeypatch, {3})
    train_ddpm(stopped)
    monkeypatch.undo()
    spoil(monkeypatch, {0})  # of the second process's steps
    with pytest.raises(FloatingPointError, match="2 steps in a row, up to step 4"):
        train_ddpm(options)


def test_a_joint_step_names_both_kinds_of_images_and_the_timesteps(tmp_path, monkeypatch):
    squares(tmp_path / "data")
    (tmp_path / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    run = TrainSegmentation(
        data=MaskedDataConfig(
            data=str(tmp_path / "data" / "images"), masks=str(tmp_path / "data" / "masks"), validation_fraction=0.25
        ),
        output=tmp_path / "run",
        model=str(tmp_path / "network.json"),
        joint=JointConfig(denoising_weight=0.3),
        augmentation=AugmentationConfig(elastic=1.0),
        training=TrainingConfig(steps=4, batch_size=3, accumulate=2, trackers=()),
    )
    task = make_task(run, load_masked(run.data, 0))
    assert isinstance(task, JointTask) and isinstance(task.segmentation, SegmentationTask)
    context = RunContext(run.training, make_accelerator(run.training, run.output))
    drawn, compute = [], DiffusionTask._timesteps
    monkeypatch.setattr(DiffusionTask, "_timesteps", lambda self, g: drawn.append(compute(self, g)) or drawn[-1])

    step, batches = 2, task.batches(context, 2)
    both = [next(batches), next(batches)]
    for micro, batch in enumerate(both):
        generators = [keyed_generator(0, "sample", step, 3 * micro + i) for i in range(3)]
        task.loss(task.network, batch, generators)
    timesteps = torch.cat(drawn).tolist()
    text = task.describe(context, step, [keyed_generator(0, "sample", step, i) for i in range(6)])
    assert f"timesteps {', '.join(map(str, timesteps))};" in text

    named = [[int(row) for row in each.split(", ")] for each in re.findall(r"images ([\d, ]+) of", text)]
    sets = (task.segmentation.train, task.diffusion.data.train)
    for rows, dataset, key in zip(named, sets, ("image", "unlabelled_image")):
        images = {row: dataset[index]["image"] for index, row in enumerate(dataset.rows)}
        assert torch.equal(torch.stack([images[row] for row in rows]), torch.cat([batch[key] for batch in both]))
