"""A run spread over 1, 2 or 4 processes is the same run, and ends when one of them dies."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from filelock import FileLock
from safetensors.torch import load_file

from tests.reliability import children
from tests.reliability.launches import DEATH, Launch
from tests.support.runs import metrics
from tests.support.scripts import SCRIPTS
from tests.support.tiny import squares
from unet_diffusion import cli
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.files import PREFIX
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import training_batches
from unet_diffusion.training.config import TrainingConfig

PROMISE = "Several processes"
STEPS = 60
IMAGES = 22  # 3 of them held out, fewer than 4 processes; the 19 others are not a multiple of a step's 8
PER_STEP = 8
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = 1e-5  # relative: float32 rounds to 6e-8, sums in another order differ by that, and 60 steps add up
WEIGHT_TOLERANCE = 0.02 * LEARNING_RATE  # a weight moves by up to the rate in each step
MUON = 20  # times as far: it learns kernels at 20 times the rate, and enlarges small directions with their rounding


@dataclass(frozen=True)
class Inputs:
    """The inputs of runs, in a folder: images, masks, the same images in files of different lengths, a network."""

    folder: Path

    def write(self) -> None:
        """Writes all of it."""
        squares(self.folder / "data", IMAGES)
        network = {"channels": [8, 16], "head_channels": 8}  # without dropout, which follows the micro-batch
        (self.folder / "network.json").write_text(json.dumps(network))
        images = sorted((self.folder / "data" / "images").glob("*.png"))
        features = Features({"image": ImageFeature()})
        for file, rows in enumerate((range(3), range(3, 8), range(8, 19))):
            columns = {"image": [str(images[row]) for row in rows]}
            Dataset.from_dict(columns, features=features).save_to_disk(self.folder / "files" / str(file))

    @property
    def files(self) -> str:
        """A source of 19 images in files of 3, 5 and 11."""
        return str(self.folder / "files" / "*" / "*.arrow")

    def command(self, task: str, output: Path, batch_size: int, *more: str) -> list[str]:
        """Returns the command of a run: "ddpm", "segmentation" (with augmentation), "joint", or "stream" (of DDPM)."""
        masked = task in ("segmentation", "joint")
        images = str(self.folder / "data" / "images")
        stream = ["--streaming", "--image-size", "16", "--validation-data", images]
        return [
            str(SCRIPTS / ("train_segmentation.py" if masked else "train_ddpm.py")),
            *("--data", self.files if task == "stream" else images),
            *("--output", str(output), "--model", str(self.folder / "network.json")),
            *(["--masks", str(self.folder / "data" / "masks")] if masked else []),
            *(["--denoising-weight", "0.3"] if task == "joint" else []),
            *(stream if task == "stream" else ["--validation-fraction", "0.14"]),
            *("--cache-dir", str(self.folder / "cache"), "--preview-images", "2"),
            *("--steps", str(STEPS), "--batch-size", str(batch_size), "--learning-rate", str(LEARNING_RATE)),
            *("--warmup-steps", "5", "--log-every", "3", "--validate-every", "6", "--checkpoint-every", "5"),
            *("--preview-every", "1000", *more, "--trackers"),
        ]

    def train(self, task: str, output: Path, processes: int, *more: str, accumulate: int = 1) -> Path:
        """Trains from the start, or from where a run stopped, to the end; returns the folder of the run."""
        batch_size = PER_STEP // processes // accumulate
        command = self.command(task, output, batch_size, "--accumulate", str(accumulate), *more)
        if processes == 1:
            assert children.run(output.with_suffix(".log"), _run_alone, command) == ""
        else:
            status, said = Launch(processes, command).end()
            assert status == 0, f"{status} (None: it hung): {said[-300:]}"
        assert json.loads((output / "config.json").read_text())["processes"] == processes
        return output


def _run_alone(command: list[str]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cli.run(Path(command[0]).stem.replace("_", "-"), command[1:])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    inputs = Inputs(tmp_path_factory.mktemp("processes"))
    inputs.write()
    return inputs


@pytest.fixture(scope="module")
def single(inputs):
    """Trains for a task in one process, once; the function returns the folder of the run."""
    runs: dict[str, Path] = {}

    def train(task: str) -> Path:
        if task not in runs:
            runs[task] = inputs.train(task, inputs.folder / f"{task}-single", 1)
        return runs[task]

    return train


def check_same_run(run: Path, other: Path) -> str:
    """Checks that two finished runs are the same except for rounding; returns how far apart they are."""
    rows, others = metrics(run), metrics(other)
    assert [(row["step"], row.keys()) for row in rows] == [(row["step"], row.keys()) for row in others]
    assert files(run) == files(other) and not list(run.rglob(f"{PREFIX}*"))
    values: dict[str, list[float]] = {"loss": [], "learning_rate": [], "validation": []}
    for row, expected in zip(rows, others):
        for name in expected.keys() - {"step"}:
            kind = "validation" if "learning_rate" not in row else name if name == "learning_rate" else "loss"
            values[kind].append(abs(row[name] - expected[name]) / max(abs(expected[name]), 1e-12))
    furthest = {kind: max(each, default=math.inf) for kind, each in values.items()}
    muon = json.loads((run / "config.json").read_text())["optimizer"] == "muon"
    assert furthest["learning_rate"] == 0
    assert max(furthest["loss"], furthest["validation"]) <= LOSS_TOLERANCE * (MUON if muon else 1)
    weights, expected = (load_file(checkpoint(folder, STEPS) / "model.safetensors") for folder in (run, other))
    moved = max((weights[name] - value).abs().max().item() for name, value in expected.items())
    assert moved <= WEIGHT_TOLERANCE * (MUON if muon else 1)
    return (
        f"losses {furthest['loss']:.0e}, validation {furthest['validation']:.0e}, "
        f"weights {moved / LEARNING_RATE:.0e} of the learning rate, learning rates equal"
    )


def files(run: Path) -> set[str]:
    """Returns the names of all files and folders of a run."""
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def checkpoint(run: Path, step: int) -> Path:
    """Returns the folder of a checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_each_image_once_an_epoch_also_after_step_5(kind, inputs, record_property):
    """The order is the same in any number of processes and micro-batches, and from wherever a run is resumed."""
    images = inputs.folder / "data" / "images"
    source = {"data": inputs.files, "streaming": True} if kind == "stream" else {"data": str(images)}
    data = DataConfig(**source, image_size=16, validation_fraction=0.0, cache_dir=str(inputs.folder / "cache"))
    steps, orders = 12, []
    for processes, accumulate in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4)):
        config = TrainingConfig(batch_size=PER_STEP // processes // accumulate, accumulate=accumulate)
        for start in (0, 5):
            ranks = [batches(data, config, rank, processes, start) for rank in range(processes)]
            micros = range((steps - start) * accumulate)
            orders.append((start, [image for _ in micros for rank in ranks for image in next(rank)]))
    whole = orders[0][1]
    length = len(set(whole))
    assert length == (19 if kind == "stream" else IMAGES)
    assert all(order == whole[start * PER_STEP :] for start, order in orders)
    epochs = [whole[i : i + length] for i in range(0, len(whole) - length + 1, length)]
    assert all(len(set(epoch)) == length for epoch in epochs)
    figure = f"{len(epochs)} epochs of {length} images in steps of {PER_STEP}, 1 to 4 processes and micro-batches"
    record_property("figure", figure)


def batches(data: DataConfig, config: TrainingConfig, rank: int, processes: int, start: int) -> Iterator[list[bytes]]:
    """Yields the images of each micro-batch of a process."""
    process: Any = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    train = load_images(data, 0, rank, processes).train
    for batch in training_batches(train, RunContext(config, process), start):
        yield [image.numpy().tobytes() for image in batch["image"]]


def skip_four(processes: int, full: bool) -> None:
    """Skips a test of four processes, for which the usual machine of two cores is small."""
    if processes == 4 and not full:
        pytest.skip("four processes only with --reliability-full")


@pytest.mark.slow
def test_another_seed_is_another_run(inputs, single, tmp_path):
    """The comparison notices it, and finds everything else the same."""
    other = inputs.train("segmentation", tmp_path / "other", 1, "--seed", "1")
    with pytest.raises(AssertionError, match=r"<= \(1e-05 \* 1\)"):
        check_same_run(other, single("segmentation"))


@pytest.mark.slow
def test_two_processes_with_two_micro_batches_against_one_with_one(inputs, single, tmp_path, record_property):
    """Segmentation with augmentation, which leaves a different number of ignored pixels in each image."""
    record_property("fault", "segmentation, 2 processes with 2 micro-batches against 1 with 1")
    run = inputs.train("segmentation", tmp_path / "run", 2, accumulate=2)
    record_property("figure", check_same_run(run, single("segmentation")))


@pytest.mark.slow
def test_two_micro_batches_against_one(inputs, single, tmp_path, record_property):
    record_property("fault", "segmentation, 1 process with 2 micro-batches against 1 with 1")
    run = inputs.train("segmentation", tmp_path / "run", 1, accumulate=2)
    record_property("figure", check_same_run(run, single("segmentation")))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("task", ["ddpm", "segmentation", "joint", "stream"])
def test_several_processes_against_one(task, processes, full, inputs, single, tmp_path, record_property):
    skip_four(processes, full)
    record_property("fault", f"{task}, {processes} processes against 1")
    run = inputs.train(task, tmp_path / "run", processes)
    record_property("figure", check_same_run(run, single(task)))


@pytest.mark.slow
def test_SIGKILL_of_one_of_two_processes(inputs, single, tmp_path, record_property):
    """Each has a data worker; then the same command resumes the run."""
    record_property("fault", "joint: SIGKILL of one of 2 processes, resumed in 2, against 1 undisturbed")
    output = tmp_path / "run"
    launch = Launch(2, inputs.command("joint", output, PER_STEP // 2, "--num-workers", "1"))
    if launch.wait_for_checkpoint(output):
        launch.rank(1).kill()
    died = time.monotonic()
    status, _ = launch.end(DEATH)
    seconds = time.monotonic() - died
    assert not (output / "model_index.json").exists()
    assert status
    assert launch.left_after(10.0) == 0
    inputs.train("joint", output, 2, "--num-workers", "1")
    distance = check_same_run(output, single("joint"))
    record_property(
        "figure", f"the launch ended after {seconds:.1f} s with status {status} and left no process; then {distance}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("task", "processes"), [("segmentation", 1), ("stream", 4)])
def test_SIGTERM_to_two_processes(task, processes, full, inputs, single, tmp_path, record_property):
    """The signal comes through torchrun; another number of processes resumes the run."""
    skip_four(processes, full)
    record_property("fault", f"{task}: SIGTERM to 2 processes, resumed in {processes}, against 1 undisturbed")
    output = tmp_path / "run"
    launch = Launch(2, inputs.command(task, output, PER_STEP // 2))
    launch.wait_for_checkpoint(output)
    launch.process.send_signal(signal.SIGTERM)
    status, _ = launch.end(DEATH)
    saved = max((int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")), default=0)
    assert status
    assert 0 < saved < STEPS
    assert launch.left_after(10.0) == 0
    inputs.train(task, output, processes)
    distance = check_same_run(output, single(task))
    record_property("figure", f"status {status}, saved at step {saved}; then {distance}")


def refusal(launch: Launch, sentence: str) -> str:
    """Checks that a launch ends by itself, with an error that says why, and leaves no process."""
    status, said = launch.end()
    seconds = time.monotonic() - launch.started
    assert status
    assert sentence in said
    assert launch.left_after(10.0) == 0
    return f"status {status} after {seconds:.0f} s, said {sentence!r}"


@pytest.mark.slow
def test_two_processes_with_another_number_of_images_per_step(inputs, single, tmp_path, record_property):
    copytree(single("ddpm"), tmp_path / "run")
    launch = Launch(2, inputs.command("ddpm", tmp_path / "run", PER_STEP))
    record_property("figure", refusal(launch, "images_per_step is 16"))


@pytest.mark.slow
def test_two_processes_in_a_folder_where_another_run_trains(inputs, single, tmp_path, record_property):
    copytree(single("ddpm"), tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"):
        launch = Launch(2, inputs.command("ddpm", tmp_path / "run", PER_STEP // 2))
        record_property("figure", refusal(launch, "another process is training"))


@pytest.mark.slow
def test_two_processes_that_see_different_checkpoints(inputs, single, tmp_path, record_property):
    """As on machines that do not see the same output folder."""
    copytree(single("ddpm"), tmp_path / "machine-0")
    copytree(single("ddpm"), tmp_path / "machine-1")
    rmtree(checkpoint(tmp_path / "machine-0", STEPS))
    script = tmp_path / "machine.py"
    script.write_text(
        "import os, sys\nfrom unet_diffusion.cli import run\n"
        "run('train-ddpm', [part.replace('RANK', os.environ['RANK']) for part in sys.argv[1:]])\n"
    )
    command = inputs.command("ddpm", tmp_path / "machine-RANK", PER_STEP // 2)
    record_property("figure", refusal(Launch(2, [str(script), *command[1:]]), "different steps"))
