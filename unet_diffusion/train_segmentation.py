"""A segmentation run from options to a folder with a pipeline."""

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import DDPMScheduler

from unet_diffusion.accelerator import make_accelerator
from unet_diffusion.augmentation import AugmentationConfig
from unet_diffusion.data import ImageDataset, ImageSets, labels_among, rows_without
from unet_diffusion.diffusion_task import DiffusionConfig, saved_objective
from unet_diffusion.doctor import refuse_errors
from unet_diffusion.frozen_features_task import FrozenFeaturesConfig, FrozenFeaturesTask
from unet_diffusion.image_cache import cache_images
from unet_diffusion.joint_task import JointConfig, JointTask
from unet_diffusion.masked_data import MaskedDataConfig, MaskedSets, load_masked, open_part
from unet_diffusion.networks import load_unet
from unet_diffusion.output_folder import check_output
from unet_diffusion.pipeline_config import from_index
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.pixels import PixelRange
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.segmentation_task import SegmentationConfig, SegmentationTask
from unet_diffusion.sources import open_source
from unet_diffusion.task import Task
from unet_diffusion.training import Trainer
from unet_diffusion.training_config import TrainingConfig
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
    """Vary pictures and masks in training, as the next options say."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


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
    if config.joint.denoising_weight > 0:
        return make_joint_task(config, data)
    augmentation = config.augmentation if config.augment else None
    scheduler, workers = saved_scheduler(Path(config.model), data), config.data.num_workers
    if learn == "pixel_classifier":
        unet, features = load_unet(config.model, {"in_channels": data.train.channels}), config.frozen_features
        return FrozenFeaturesTask(unet, data, config.segmentation, features, augmentation, scheduler, workers)
    return SegmentationTask(make_unet(config.model, data), data, config.segmentation, augmentation, scheduler, workers)


def make_joint_task(config: TrainSegmentation, data: MaskedSets) -> JointTask:
    """Masks and noise prediction at once; a noise predictor that is there goes on with the objective that it had.

    Raises:
        ValueError: a saved network of which nothing says what it predicts; what `JointTask` and `load_unlabelled`
            refuse.
    """
    run = Path(config.model)
    network, scheduler = make_unet(config.model, data, generates=True), saved_scheduler(run, data)
    diffusion, label_names = DiffusionConfig(), None
    if run.is_dir():
        if scheduler is None:
            raise ValueError(
                f"denoising_weight is {config.joint.denoising_weight}, but {run} has no scheduler, which a noise "
                "predictor is saved with; start from a DDPM run, or leave denoising_weight out."
            )
        diffusion = saved_objective(run, network, scheduler)
        label_names = from_index(ImageGenerationPipeline.load_config(run).get("_label_names"))
    return JointTask(
        network,
        data,
        load_unlabelled(config, data, None if label_names is None else tuple(label_names)),
        config.joint.denoising_weight,
        config.segmentation,
        diffusion,
        config.augmentation if config.augment else None,
        scheduler,
        config.data.num_workers,
    )


def load_unlabelled(config: TrainSegmentation, data: MaskedSets, label_names: tuple[str, ...] | None) -> ImageSets:
    """The pictures that noise is predicted on, read as those with masks are.

    Args:
        config: which pictures.
        data: those with masks. The ones that masks are validated on are what noise prediction is validated on; equal
            pictures are not trained on, wherever they come from.
        label_names: classes that the network can be conditioned on; others are taken for none.

    Raises:
        ValueError: a source that cannot be read; pictures of other channels, dtype or size; none that is not held out.
    """
    options, name = config.data, config.joint.unlabelled
    if name is None:
        rows, _, name = open_part(replace(options, max_labels=None), "train")
        rows = rows.select_columns("image")
    else:
        rows = open_source(name, cache_dir=options.cache_dir)
    assert isinstance(rows, Dataset)
    cache = cache_images(rows, options.preparation, name, options.max_broken, options.cache_dir)
    found, expected = (cache.channels, cache.dtype), (data.train.channels, data.pixel_range.dtype)
    if found != expected:
        raise ValueError(
            f"unlabelled pictures of {name} have {found[0]} channels of {found[1]}, those with masks {expected[0]} of "
            f"{expected[1]}; they must agree. channels=1 or 3 converts both."
        )
    (height, width), size = cache.sizes[0], (data.train.height, data.train.width)
    if options.crop_size is None and (height, width) != size:
        raise ValueError(
            f"unlabelled pictures of {name} have {width}x{height} pixels, those with masks {size[1]}x{size[0]}; give "
            "crop_size to cut both, or image_size to resize them."
        )
    held_out = data.validation
    usable = rows_without(cache, held_out.cache.pictures, held_out.rows)
    if not len(usable):
        raise ValueError(f"all {len(cache)} unlabelled pictures of {name} are held out for validation; give others.")
    train = ImageDataset(
        cache,
        usable,
        size,
        data.pixel_range,
        name=name,
        class_names=label_names,
        labels=labels_among(label_names, cache)[usable],
        random=options.crop_size is not None,
        seed=config.training.seed,
    )
    return ImageSets(
        train, ImageDataset(held_out.cache.pictures, held_out.rows, size, data.pixel_range, name=held_out.name)
    )


def make_unet(model: str, data: MaskedSets, generates: bool = False) -> UNet:
    """The network of a run, with a segmentation head for the classes of the data.

    Args:
        model: as in `TrainSegmentation`.
        data: pictures with masks.
        generates: whether an untrained network gets a noise head too, and pictures are generated at the size that the
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
    """The scheduler of a DDPM run, or None; warns where that run saw pictures in another range of values."""
    saved_in = [folder for folder in (run / "scheduler", run) if (folder / "scheduler_config.json").is_file()]
    if not saved_in:
        return None
    saved = ImageGenerationPipeline.load_config(run).get("_pixel_range")
    pixel_range = PixelRange.full("uint8") if saved is None else PixelRange.from_dict(saved)
    if pixel_range != data.pixel_range:
        logger.warning(
            "the network of %s learnt from %s, but these pictures are mapped by %s; value_range makes them agree",
            run,
            pixel_range,
            data.pixel_range,
        )
    return DDPMScheduler.from_pretrained(saved_in[0])
