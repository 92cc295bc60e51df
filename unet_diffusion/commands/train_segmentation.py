"""A segmentation run from options to a folder with a pipeline."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from unet_diffusion.commands.doctor.examination import refuse_errors
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.data.masked.unlabelled import JointConfig, load_unlabelled
from unet_diffusion.files import check_output
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines.base import from_index
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.diffusion import DiffusionConfig, DiffusionTask, saved_objective
from unet_diffusion.tasks.frozen_features import FrozenFeaturesConfig, FrozenFeaturesTask
from unet_diffusion.tasks.joint import JointTask, check_generates
from unet_diffusion.tasks.segmentation import SegmentationConfig, SegmentationTask
from unet_diffusion.tasks.self_training import SelfTrainingTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.task import Task
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unet import UNet

logger = logging.getLogger(__name__)


@dataclass
class TrainSegmentation:
    """Train a U-Net to give masks, from a DDPM run or from nothing. The same command again goes on after a stop."""

    data: MaskedDataConfig
    output: Path = Path("runs/segmentation")
    """Folder of the run; it becomes a SegmentationPipeline."""
    model: str = "small-32"
    """Where to start: the folder of a DDPM or segmentation run, or, for untrained weights, a preset or a JSON file of
    config values."""
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    frozen_features: FrozenFeaturesConfig = field(default_factory=FrozenFeaturesConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    augment: bool = True
    """Vary images and masks in training, as the next options say."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(steps=2000, batch_size=8, warmup_steps=100, validate_every=100)
    )


def train_segmentation(config: TrainSegmentation) -> Path:
    """Trains, or goes on training, and returns the run's folder.

    The folder holds the pipeline, a model card, `masks.png`, `curves.png`, `metrics.jsonl`, `config.json`, previews and
    checkpoints. Channels and classes follow from the data. A network that comes from a DDPM run keeps its noise head,
    frozen, and its scheduler. With a `denoising_weight` the noise head learns too, the folder holds `samples.png`, and
    `ImageGenerationPipeline` loads it as well.

    Raises:
        ValueError: an option, data or a network that cannot be used, before training starts.
        RuntimeError: another process is training in the folder.
    """
    accelerator = make_accelerator(config.training, config.output)
    check_output(config.output)
    config = replace(config, joint=settled_joint(config))
    refuse_errors(config.data)
    data = load_masked(config.data, config.training.seed)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    task = make_task(config, data)
    resolved = asdict(config)
    if isinstance(task, JointTask):
        resolved["diffusion"] = asdict(task.diffusion.config)
    return Trainer(task, config.training, config.output, resolved, accelerator).run()


def make_task(config: TrainSegmentation, data: MaskedSets) -> Task:
    """What the options ask to be learnt.

    Raises:
        ValueError: options, data or a network that do not go together.
    """
    learn = config.segmentation.learn
    if learn != "pixel_classifier" and config.frozen_features != FrozenFeaturesConfig():
        raise ValueError(
            f"frozen_features is {config.frozen_features}, but learn is {learn!r}, which reads no features; set "
            "learn='pixel_classifier', or leave timesteps, stages and hidden out."
        )
    joint, run = settled_joint(config), Path(config.model)
    scheduler = saved_scheduler(run, data)
    rest = (config.augmentation if config.augment else None, scheduler, config.data.num_workers)
    if learn == "pixel_classifier":
        if joint.needs_images:
            raise ValueError(
                f"learn is {learn!r} and joint is {joint}, but its trunk does not learn, so images without masks "
                "teach it nothing; leave their weights out, or set learn='everything'."
            )
        unet = load_unet(config.model, {"in_channels": data.train.channels})
        return FrozenFeaturesTask(unet, data, config.segmentation, config.frozen_features, *rest)
    network = make_unet(config.model, data, generates=joint.denoising_weight > 0)
    if not joint.needs_images:
        return SegmentationTask(network, data, config.segmentation, *rest)
    diffusion, label_names = DiffusionConfig(), None
    if joint.denoising_weight > 0 and run.is_dir():
        diffusion, label_names = saved_conditions(run, network, scheduler)
    images = load_unlabelled(joint, config.data, data, label_names, config.training.seed)
    if joint.self_training_weight:
        segmentation: SegmentationTask = SelfTrainingTask(
            network, data, images.train, joint, config.segmentation, *rest
        )
    else:
        segmentation = SegmentationTask(network, data, config.segmentation, *rest)
    if joint.denoising_weight == 0:
        return segmentation
    check_generates(network, joint.denoising_weight)
    denoising = DiffusionTask(network, images, diffusion, config.data.num_workers, scheduler)
    return JointTask(segmentation, denoising, joint.denoising_weight)


def settled_joint(config: TrainSegmentation) -> JointConfig:
    """What images without masks teach, with the default of the weight that the options leave open."""
    joint = config.joint
    if joint.self_training_weight is not None:
        return joint
    there = joint.unlabelled is not None or config.data.max_labels is not None
    fits = config.augment and config.segmentation.learn != "pixel_classifier"
    settled = there and fits and scheduler_folder(Path(config.model)) is not None
    return replace(joint, self_training_weight=1.0 if settled else 0.0)


def saved_conditions(
    run: Path, network: UNet, scheduler: DDPMScheduler | None
) -> tuple[DiffusionConfig, tuple[str, ...] | None]:
    """The objective that a saved noise predictor had, with which it goes on, and the classes of its images.

    Raises:
        ValueError: nothing says what it predicts.
    """
    if scheduler is None:
        raise ValueError(
            f"denoising_weight is above 0, but {run} has no scheduler, which a noise predictor is saved with; start "
            "from a DDPM run, or leave denoising_weight out."
        )
    names = from_index(ImageGenerationPipeline.load_config(run).get("_label_names"))
    return saved_objective(run, network, scheduler), None if names is None else tuple(names)


def make_unet(model: str, data: MaskedSets, generates: bool = False) -> UNet:
    """The network of a run, with a segmentation head for the classes of the data.

    Args:
        model: as in `TrainSegmentation`.
        data: images with masks.
        generates: whether an untrained network gets a noise head too, and images are generated at the size that the
            network is trained on.

    Raises:
        ValueError: weights for another number of channels, or a segmentation head for other classes.
    """
    channels, height, width = data.train.channels, data.train.height, data.train.width
    wanted: dict[str, Any] = {"in_channels": channels}
    if generates:
        wanted["sample_size"] = height if height == width else (height, width)
    if Path(model).is_dir():
        return load_unet(model, wanted).to_segmentation(data.num_classes)
    heads = {"out_channels": channels if generates else None, "num_classes": data.num_classes}
    return load_unet(model, wanted | heads)


def saved_scheduler(run: Path, data: MaskedSets) -> DDPMScheduler | None:
    """The scheduler of a DDPM run, or None; warns where that run saw images in another range of values."""
    folder = scheduler_folder(run)
    if folder is None:
        return None
    saved = ImageGenerationPipeline.load_config(run).get("_pixel_range")
    pixel_range = PixelRange.full("uint8") if saved is None else PixelRange.from_dict(saved)
    if pixel_range != data.pixel_range:
        logger.warning(
            "the network of %s learnt from %s, but these images are mapped by %s; value_range makes them agree",
            run,
            pixel_range,
            data.pixel_range,
        )
    return DDPMScheduler.from_pretrained(folder)


def scheduler_folder(run: Path) -> Path | None:
    """Where a DDPM run, or a run that started from one, keeps its scheduler; None: it is no such run."""
    saved_in = (folder for folder in (run / "scheduler", run) if (folder / "scheduler_config.json").is_file())
    return next(saved_in, None)
