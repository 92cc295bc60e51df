"""Training runs of seconds, and the comparison of two of them, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from unet_diffusion.commands.options import TrainDDPM, TrainSegmentation
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.files import PREFIX
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig
from unet_diffusion.training.checkpoints import load_checkpoint, same_bits, saved_checkpoints
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics

Options = TrainDDPM | TrainSegmentation
TASKS = ("ddpm", "segmentation", "joint")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
EXPORTED = (WEIGHTS, Path("unet/config.json"), Path("model_index.json"))
DIFFERS = ("images_per_second",)  # wall time


def squares(folder: Path, count: int = 24, side: int = 16) -> None:
    """Images of one bright square on dark noise, and masks that say where it is."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        top, left = random.integers(0, side - 6, 2)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[top : top + 6, left : left + 6] = 1
        image = (random.integers(0, 60, (side, side)) + 150 * mask).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i:02d}.png")


def tiny_runs(work: Path, steps: int = 12) -> dict[str, Options]:
    """The options of a run of each task, with dropout, accumulation, and every phase of a run every few steps.

    Args:
        work: an empty folder for the images; the output is to be set with `into`.
        steps: of each run.
    """
    squares(work / "data")
    (work / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    images, masks, cache = (str(work / name) for name in ("data/images", "data/masks", "cache"))
    training = TrainingConfig(
        steps=steps,
        batch_size=4,
        accumulate=2,
        warmup_steps=2,
        log_every=3,  # no divisor of checkpoint_every, so that sums go on over a resumption
        validate_every=4,
        preview_every=5,
        checkpoint_every=2,
        trackers=(),
    )
    network = str(work / "network.json")
    masked = MaskedDataConfig(data=images, masks=masks, validation_fraction=0.25, cache_dir=cache)
    segmentation = TrainSegmentation(
        data=masked,
        model=network,
        segmentation=SegmentationConfig(preview_images=2),
        augmentation=AugmentationConfig(elastic=1.0),
        training=training,
    )
    ddpm = TrainDDPM(
        model=network,
        data=DataConfig(data=images, validation_fraction=0.25, cache_dir=cache),
        diffusion=DiffusionConfig(preview_images=2),
        training=training,
    )
    joint = replace(segmentation, joint=JointConfig(denoising_weight=0.3))
    return dict(zip(TASKS, (ddpm, segmentation, joint)))


def into(options: Options, output: Path, num_workers: int = 0) -> Options:
    """The same run in another folder, with so many processes that load images."""
    return replace(options, output=output, data=replace(options.data, num_workers=num_workers))


def train(options: Options) -> None:
    """Runs it, as its command does."""
    if isinstance(options, TrainDDPM):
        train_ddpm(options)
    else:
        train_segmentation(options)


def metrics(run: Path) -> list[dict]:
    """The logged numbers, but for the time that things took."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in DIFFERS} for row in rows]


def differences(run: Path, whole: Path) -> list[str]:
    """What two ended runs differ in: names of files, of parts of the last checkpoint, or of lines of the metrics."""
    checkpoints = [saved_checkpoints(folder / "checkpoints") for folder in (run, whole)]
    names = [[path.name for path in paths] for paths in checkpoints]
    found = [] if names[0] == names[1] else [f"checkpoints {names[0]} instead of {names[1]}"]
    last, expected = (load_checkpoint(paths[-1]) for paths in checkpoints)
    for part in expected.tensors.keys() | last.tensors.keys():
        if not same_bits({part: last.tensors.get(part, {})}, {part: expected.tensors.get(part, {})}):
            found.append(f"{part} of the last checkpoint")
    if (last.step, last.state) != (expected.step, expected.state):
        found.append("state of the last checkpoint")
    found += [str(file) for file in EXPORTED if (run / file).read_bytes() != (whole / file).read_bytes()]
    if json.dumps(metrics(run)) != json.dumps(metrics(whole)):
        found.append("metrics.jsonl")
    images = [sorted(path.name for path in folder.glob("previews/*")) for folder in (run, whole)]
    if images[0] != images[1]:
        found.append(f"previews {images[0]} instead of {images[1]}")
    found += [f"preview {name}" for name in images[1] if _bytes(run, name) != _bytes(whole, name)]
    return found + [f"leftover {path.relative_to(run)}" for path in run.rglob(f"{PREFIX}*")]


def _bytes(run: Path, preview: str) -> bytes:
    path = run / "previews" / preview
    return path.read_bytes() if path.exists() else b""
