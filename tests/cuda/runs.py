"""Small runs of every task, and the distance between two of them."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.tiny import squares
from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.train_classifier import train_classifier
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.commands.tune_few_steps import tune_few_steps
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.tasks.classification import ClassificationTask
from unet_diffusion.tasks.config import (
    DiffusionConfig,
    FewStepsConfig,
    FrozenFeaturesConfig,
    JointConfig,
    SegmentationConfig,
    SuperResolutionConfig,
)
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.tasks.few_steps import FewStepsTask
from unet_diffusion.tasks.frozen_features import FrozenFeaturesTask
from unet_diffusion.tasks.joint import JointTask
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.tasks.self_training import SelfTrainingTask
from unet_diffusion.tasks.super_resolution import SuperResolutionTask
from unet_diffusion.training.config import TrainingConfig

STEPS, CUT = 8, 4  # steps of a run, and of its first checkpoint
TASKS = {
    "noise prediction": DiffusionTask,
    "super-resolution": SuperResolutionTask,
    "consistency": FewStepsTask,
    "distillation": FewStepsTask,
    "classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "joint": JointTask,
    "self-training": SelfTrainingTask,
    "pixel classifier": FrozenFeaturesTask,
}
Options = TrainDDPM | TrainClassifier | TrainSegmentation | TuneFewSteps


def run_of(task: str, folder: Path, **training) -> Options:
    """Returns the options of a run; the noise predictor that it starts from, if any, is trained for it."""
    if not (folder / "data").exists():
        squares(folder / "data", 24, kinds=("left", "right"))
        (folder / "network.json").write_text(json.dumps({"channels": [16, 32], "head_channels": 16, "dropout": 0.1}))
    network, cache, images = str(folder / "network.json"), str(folder / "cache"), str(folder / "data" / "images")
    options = TrainingConfig(
        **{
            **{"steps": STEPS, "batch_size": 4, "warmup_steps": 1, "log_every": 2, "validate_every": 4},
            **{"preview_every": 100, "checkpoint_every": CUT, "trackers": (), **training},
        }
    )
    plain = DataConfig(data=images, validation_fraction=0.25, cache_dir=cache)
    few = DiffusionConfig(preview_images=2)
    output = folder / task.replace(" ", "-")
    if task == "classification":
        return TrainClassifier(output, (16, 24), dropout=0.1, data=plain, training=options)
    ddpm = TrainDDPM(output, network, plain, few, options)
    if task == "noise prediction":
        return ddpm
    if task == "super-resolution":
        return replace(ddpm, task="super-resolution", super_resolution=SuperResolutionConfig(scale=2))
    trained = folder / "trained"
    if task in ("consistency", "distillation", "pixel classifier") and not trained.exists():
        train_ddpm(replace(ddpm, output=trained))
    if task in ("consistency", "distillation"):
        return TuneFewSteps(trained, output, plain, FewStepsConfig(method=task), options)
    masked = TrainSegmentation(
        data=MaskedDataConfig(
            data=images, masks=str(folder / "data" / "masks"), validation_fraction=0.25, max_labels=8, cache_dir=cache
        ),
        output=output,
        model=network,
        segmentation=SegmentationConfig(preview_images=2, balance_classes=True),
        joint=JointConfig(self_training_weight=0.0),
        training=options,
    )
    if task == "joint":
        return replace(masked, joint=JointConfig(denoising_weight=0.3, self_training_weight=0.0))
    if task == "self-training":
        return replace(masked, joint=JointConfig(self_training_weight=0.5, confidence=0.6))
    if task == "pixel classifier":
        features = FrozenFeaturesConfig(timesteps=(10, 50), hidden=(16,))
        learn = replace(masked.segmentation, learn="pixel_classifier")
        return replace(masked, model=str(trained), segmentation=learn, frozen_features=features)
    return masked


def train(options: Options) -> Path:
    if isinstance(options, TrainClassifier):
        return train_classifier(options)
    if isinstance(options, TuneFewSteps):
        return tune_few_steps(options)
    return train_ddpm(options) if isinstance(options, TrainDDPM) else train_segmentation(options)


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moving average and optimizer in a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    parts = {part: load_file(folder / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    return {f"{part}.{name}": value.double() for part, each in parts.items() for name, value in each.items()}


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor], part: str) -> float:
    """Returns the Euclidean distance between two states, in one part."""
    names = [name for name in some if name.startswith(part)]
    assert names and some.keys() == others.keys()
    return sum((some[name] - others[name]).square().sum().item() for name in names) ** 0.5
