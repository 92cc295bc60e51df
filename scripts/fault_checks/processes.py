"""Several processes: a run spread over 1, 2 or 4 of them is the same run, and ends when one of them dies."""

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

import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from fault_checks import children
from fault_checks.finding import Finding
from fault_checks.launches import DEATH, Launch
from fault_checks.tiny_runs import TASKS, metrics, squares
from filelock import FileLock
from safetensors.torch import load_file

from unet_diffusion import cli
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.files import PREFIX
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import training_batches
from unet_diffusion.training.config import TrainingConfig

PROMISE = "Several processes"
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
IMAGES = 22  # 3 of them held out, fewer than 4 processes; the 19 others are no multiple of a step's 8
PER_STEP = 8
LEARNING_RATE = 1e-3
LOSS_TOLERANCE = 1e-5  # relative: float32 rounds to 6e-8, sums in another order do so differently, and 60 steps add up
WEIGHT_TOLERANCE = 0.02 * LEARNING_RATE  # a weight moves by up to the rate in each step


@dataclass(frozen=True)
class Place:
    """Where runs find what they learn from: the images, the masks, the same in files of other lengths, a network."""

    work: Path

    def make(self) -> None:
        """Writes all of it."""
        squares(self.work / "data", IMAGES)
        (self.work / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))  # no dropout
        images = sorted((self.work / "data" / "images").glob("*.png"))
        features = Features({"image": ImageFeature()})
        for file, rows in enumerate((range(3), range(3, 8), range(8, 19))):
            columns = {"image": [str(images[row]) for row in rows]}
            Dataset.from_dict(columns, features=features).save_to_disk(self.work / "files" / str(file))

    @property
    def files(self) -> str:
        """A source of 19 images in files of 3, 5 and 11."""
        return str(self.work / "files" / "*" / "*.arrow")

    def command(self, task: str, output: Path, batch_size: int, *more: str) -> list[str]:
        """The command of a run: "ddpm", "segmentation" (with augmentation), "joint", or "stream" (a DDPM run)."""
        masked = task in ("segmentation", "joint")
        source = self.files if task == "stream" else str(self.work / "data" / "images")
        validation = ["--validation-data", str(self.work / "data" / "images")] if task == "stream" else []
        return [
            str(ROOT / "scripts" / ("train_segmentation.py" if masked else "train_ddpm.py")),
            *("--data", source, "--output", str(output), "--model", str(self.work / "network.json")),
            *(["--masks", str(self.work / "data" / "masks")] if masked else []),
            *(["--denoising-weight", "0.3"] if task == "joint" else []),
            *(["--streaming", "--image-size", "16", "--shuffle-buffer", "5"] if task == "stream" else []),
            *(validation or ["--validation-fraction", "0.14"]),
            *("--cache-dir", str(self.work / "cache"), "--preview-images", "2"),
            *("--steps", str(STEPS), "--batch-size", str(batch_size), "--learning-rate", str(LEARNING_RATE)),
            *("--warmup-steps", "5", "--log-every", "3", "--validate-every", "6", "--checkpoint-every", "5"),
            *("--preview-every", "1000", *more, "--trackers"),
        ]


def train(place: Place, task: str, processes: int, *more: str, accumulate: int = 1, name: str = "") -> Path:
    """A run from its start to its end; returns its folder.

    Raises:
        RuntimeError: it failed, or ran in another number of processes.
    """
    output = place.work / (name or f"{task}-{processes}x{accumulate}")
    batch_size = PER_STEP // processes // accumulate
    command = place.command(task, output, batch_size, "--accumulate", str(accumulate), *more)
    if processes == 1:
        problem = children.run(output.with_suffix(".log"), alone, command)
    else:
        status, said = Launch(processes, command).end()
        problem = "" if status == 0 else f"it ended with status {status} (None: it hung): {said[-300:]}"
    if problem:
        raise RuntimeError(f"{task} in {processes} processes: {problem}")
    counted = json.loads((output / "config.json").read_text())["processes"]
    if counted != processes:
        raise RuntimeError(f"{task} ran in {counted} processes instead of {processes}.")
    return output


def alone(command: list[str]) -> None:
    """Runs a command in this process, on the CPU."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    cli.run(Path(command[0]).stem.replace("_", "-"), command[1:])


@dataclass(frozen=True)
class Distance:
    """How far a run is from another: its losses (relative), rates and validation scores, and its last weights."""

    loss: float
    learning_rate: float
    validation: float
    weights: float
    lines: bool  # whether metrics.jsonl has the same lines, each once
    files: bool  # whether the folders hold the same files, none of them left over

    @property
    def held(self) -> bool:
        """Whether the two are the same run."""
        near = max(self.loss, self.validation) <= LOSS_TOLERANCE and self.weights <= WEIGHT_TOLERANCE
        return near and self.learning_rate == 0 and self.lines and self.files

    def __str__(self) -> str:
        wrong = [name for name in ("lines", "files") if not getattr(self, name)]
        rate, weights = f"{self.learning_rate:.0e}", f"{self.weights / LEARNING_RATE:.0e} of the rate"
        return (
            f"losses {self.loss:.0e}, validation {self.validation:.0e}, learning rate {rate}, weights {weights}"
            f"{''.join(f'; other {name}' for name in wrong)}"
        )


def distance(run: Path, other: Path) -> Distance:
    """How far two ended runs are from each other."""
    rows, others = metrics(run), metrics(other)
    values: dict[str, list[float]] = {"loss": [], "learning_rate": [], "validation": []}
    for row, expected in zip(rows, others):
        for name in expected.keys() & row.keys() - {"step"}:
            kind = "validation" if "learning_rate" not in row else name if name == "learning_rate" else "loss"
            values[kind].append(abs(row[name] - expected[name]) / max(abs(expected[name]), 1e-12))
    weights, expected = (load_file(checkpoint(folder, STEPS) / "model.safetensors") for folder in (run, other))
    return Distance(
        **{name: max(each, default=math.inf) for name, each in values.items()},
        weights=max((weights[name] - value).abs().max().item() for name, value in expected.items()),
        lines=[(row["step"], row.keys()) for row in rows] == [(row["step"], row.keys()) for row in others],
        files=files(run) == files(other) and not list(run.rglob(f"{PREFIX}*")),
    )


def compared(check: str, single: Path, place: Place, *arguments: Any, **named: Any) -> Finding:
    """Trains, with arguments as for `train`, and says how far that run is from one in a single process."""
    try:
        found = distance(train(place, *arguments, **named), single)
    except RuntimeError as error:
        return Finding(PROMISE, check, str(error), False)
    return Finding(PROMISE, check, str(found), found.held)


def files(run: Path) -> set[str]:
    """What a run wrote."""
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def checkpoint(run: Path, step: int) -> Path:
    """Folder of a checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def checks(reduced: bool, work: Path) -> Iterator[Finding]:
    """What becomes of runs in several processes; reduced: each image once, and a killed process in joint mode."""
    place = Place(work)
    place.make()
    yield once_an_epoch(place, "stored")
    yield once_an_epoch(place, "stream")
    single = {"joint": train(place, "joint", 1)}
    yield from killed(place, single["joint"])
    if reduced:
        return
    for task in (*TASKS, "stream"):
        single[task] = single.get(task) or train(place, task, 1)
        for processes in (2, 4):
            yield compared(f"{task}, {processes} processes against 1", single[task], place, task, processes)
    for processes in (1, 2):
        check = f"segmentation, {processes} x 2 micro-batches against 1 x 1"
        yield compared(check, single["segmentation"], place, "segmentation", processes, accumulate=2)
    yield from stopped(place, single)
    yield from refused(place, single["ddpm"])


def once_an_epoch(place: Place, kind: str) -> Finding:
    """Whether each image is seen once an epoch, and every step the same ones from wherever it is resumed."""
    source = {"data": place.files, "streaming": True} if kind == "stream" else {"data": str(place.work / "data/images")}
    data = DataConfig(**source, image_size=16, shuffle_buffer=5, validation_fraction=0.0, cache_dir=str(place.work))  # type: ignore[arg-type]
    steps, orders = 12, []
    for processes, accumulate in ((1, 1), (2, 1), (4, 1), (2, 2), (1, 4)):
        config = TrainingConfig(batch_size=PER_STEP // processes // accumulate, accumulate=accumulate)
        for start in (0, 5):
            ranks = [batches(data, config, rank, processes, start) for rank in range(processes)]
            micros = range((steps - start) * accumulate)
            orders.append((start, [image for _ in micros for rank in ranks for image in next(rank)]))
    whole = orders[0][1]
    length = len(set(whole))
    epochs = [whole[i : i + length] for i in range(0, len(whole) - length + 1, length)]
    same = all(order == whole[start * PER_STEP :] for start, order in orders)
    once = length == (19 if kind == "stream" else IMAGES) and all(len(set(epoch)) == length for epoch in epochs)
    figure = f"{len(epochs)} epochs of {length} images in steps of {PER_STEP}, 1 to 4 processes and micro-batches"
    held = same and once
    return Finding(PROMISE, f"each image once an epoch, also after step 5 ({kind})", figure, held)


def batches(data: DataConfig, config: TrainingConfig, rank: int, processes: int, start: int) -> Iterator[list[bytes]]:
    """The images of each micro-batch of a process."""
    process: Any = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    train = load_images(data, 0, rank, processes).train
    for batch in training_batches(train, RunContext(config, process), start):
        yield [image.numpy().tobytes() for image in batch["image"]]


def killed(place: Place, single: Path) -> Iterator[Finding]:
    """One of two processes, each with one that loads images, gets SIGKILL; then the same command."""
    output = place.work / "killed"
    command = place.command("joint", output, PER_STEP // 2, "--num-workers", "1")
    launch = Launch(2, command)
    if launch.wait_for_checkpoint(output):
        launch.rank(1).kill()
    died = time.monotonic()
    status, _ = launch.end(DEATH)
    took, left = time.monotonic() - died, launch.left_after(10.0)
    early = not (output / "model_index.json").exists()
    figure = f"the launch ended after {took:.1f} s with status {status}, {left} processes left after 10 s more"
    yield Finding(PROMISE, "SIGKILL of one of 2 processes", figure, early and bool(status) and not left)
    check = "the same command after it, against 1 process undisturbed"
    yield compared(check, single, place, "joint", 2, "--num-workers", "1", name=output.name)


def stopped(place: Place, single: dict[str, Path]) -> Iterator[Finding]:
    """Two processes get SIGTERM through torchrun; another number of processes goes on with the run."""
    for task, processes in (("segmentation", 1), ("stream", 4)):
        output = place.work / f"{task}-stopped"
        launch = Launch(2, place.command(task, output, PER_STEP // 2))
        launch.wait_for_checkpoint(output)
        launch.process.send_signal(signal.SIGTERM)
        status, _ = launch.end(DEATH)
        saved = max(
            (int(path.name.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*")), default=0
        )
        held = bool(status) and 0 < saved < STEPS and not launch.left_after(10.0)
        yield Finding(PROMISE, f"{task}: SIGTERM to 2 processes", f"status {status}, saved at step {saved}", held)
        check = f"{task}: {processes} processes go on with it, against 1 undisturbed"
        yield compared(check, single[task], place, task, processes, name=output.name)


def refused(place: Place, ended: Path) -> Iterator[Finding]:
    """What two processes refuse has to end both, with a sentence, and soon."""
    copy = place.work / "refused"
    copytree(ended, copy)
    other = Launch(2, place.command("ddpm", copy, PER_STEP))
    yield refusal(other, "2 processes with another number of images per step", "images_per_step is 16")
    with FileLock(copy / ".lock"):
        locked = Launch(2, place.command("ddpm", copy, PER_STEP // 2))
        yield refusal(locked, "2 processes in a folder where another run trains", "another process is training")

    folders = [place.work / f"machine-{rank}" for rank in range(2)]
    copytree(ended, folders[0])
    rmtree(checkpoint(folders[0], STEPS))
    script = place.work / "machine.py"
    code = (
        "import os, sys\nfrom unet_diffusion.cli import run\n"
        "run('train-ddpm', [part.replace('RANK', os.environ['RANK']) for part in sys.argv[1:]])\n"
    )
    script.write_text(code)
    command = [str(script), *place.command("ddpm", place.work / "machine-RANK", PER_STEP // 2)[1:]]
    yield refusal(Launch(2, command), "2 processes that see different checkpoints", "different steps")


def refusal(launch: Launch, check: str, sentence: str) -> Finding:
    """Whether a launch ends with an error that says why."""
    status, said = launch.end(DEATH)
    after, told = time.monotonic() - launch.started, sentence in said
    figure = f"status {status} after {after:.0f} s, {'said' if told else 'did not say'} {sentence!r}"
    return Finding(PROMISE, check, figure, bool(status) and told and not launch.left_after(10.0))
