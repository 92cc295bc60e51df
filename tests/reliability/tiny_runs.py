"""Training runs of a few seconds, and a comparison of two of them, bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

from tests.support.runs import metrics
from tests.support.tiny import squares
from unet_diffusion import UNet
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.commands.tune_few_steps import tune_few_steps
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.files import PREFIX
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig
from unet_diffusion.training.checkpoints import load_checkpoint, same_bits, saved_checkpoints
from unet_diffusion.training.config import TrainingConfig

Options = TrainDDPM | TrainSegmentation | TuneFewSteps
TASKS = ("ddpm", "segmentation", "joint", "few_steps")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
EXPORTED = (WEIGHTS, Path("unet/config.json"), Path("model_index.json"))


def tiny_runs(work: Path, steps: int = 12) -> dict[str, Options]:
    """Returns the options of a run of each task, with dropout, accumulation, and every phase every few steps.

    Args:
        work: an empty folder for the images; `into` sets the output.
        steps: of each run.
    """
    squares(work / "data", 24)
    (work / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8, "dropout": 0.1}))
    images, masks, cache = (str(work / name) for name in ("data/images", "data/masks", "cache"))
    training = TrainingConfig(
        steps=steps,
        batch_size=4,
        accumulate=2,
        warmup_steps=2,
        log_every=3,  # not a divisor of checkpoint_every, so that sums continue after a resumption
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
    base = UNet(sample_size=16, in_channels=1, out_channels=1, channels=(8, 16), head_channels=8, dropout=0.1)
    ImageGenerationPipeline(base, ddpm.diffusion.make_scheduler()).save_pretrained(work / "base")
    few_steps = TuneFewSteps(work / "base", data=ddpm.data, training=training)
    return dict(zip(TASKS, (ddpm, segmentation, joint, few_steps)))


def into(options: Options, output: Path, num_workers: int = 0) -> Options:
    """Returns the options of the same run in another folder, with this number of data workers."""
    return replace(options, output=output, data=replace(options.data, num_workers=num_workers))


def train(options: Options) -> None:
    """Trains as the command does."""
    if isinstance(options, TrainDDPM):
        train_ddpm(options)
    elif isinstance(options, TuneFewSteps):
        tune_few_steps(options)
    else:
        train_segmentation(options)


def ddpm_arguments(options: TrainDDPM) -> list[str]:
    """Returns the options of a DDPM run as the arguments of the command."""
    values = {
        "output": options.output,
        "model": options.model,
        "data": options.data.data,
        **{name: getattr(options.data, name) for name in ("validation_fraction", "cache_dir", "num_workers")},
        "preview_images": options.diffusion.preview_images,
        **{name: value for name, value in vars(options.training).items() if type(value) is int},
    }
    given = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["train-ddpm", *given, "--trackers"]


def differences(run: Path, whole: Path) -> list[str]:
    """Returns what differs between two finished runs: files, parts of the last checkpoint, or the metrics."""
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
