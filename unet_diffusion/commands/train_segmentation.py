"""Trains a network that segments images, from options to a folder with a pipeline."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler

from unet_diffusion.commands.doctor.examination import present, show
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.run_data import learnt_range
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.data.masked.unlabelled import load_unlabelled
from unet_diffusion.data.record import DataRecord, make_record
from unet_diffusion.network.config import load_preset
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_index import (
    INDEX,
    kept_noise_head,
    read_object,
    saved_class_names,
    saved_label_names,
    scheduler_folder,
    unet_folder,
)
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig
from unet_diffusion.tasks.diffusion import DiffusionTask, saved_objective
from unet_diffusion.tasks.frozen_features import FrozenFeaturesTask
from unet_diffusion.tasks.joint import JointTask, check_generates
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.tasks.self_training import SelfTrainingTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.batches import TrainingImages
from unet_diffusion.training.task import Task
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unet import UNet
from unet_diffusion.unused_options import check_used

logger = logging.getLogger(__name__)

FEW_MASKS = 10  # up to which the loss on the network's own masks weighs as much as that on the given ones
SELF_TRAINS = (
    "self-training: the network also learns from its own masks of the images without masks, with a weight of {:.2g}; "
    "self_training_weight=0 switches this off."
)


def train_segmentation(options: TrainSegmentation) -> Path:
    """Trains, or resumes a stopped run, and returns the run's folder.

    The folder holds the pipeline, a model card, `masks.png`, `curves.png`, `metrics.jsonl`, `config.json`, `data.json`,
    previews and checkpoints. Channels and classes follow from the data. A network that comes from a DDPM run keeps its
    noise head, frozen, and its scheduler, but it still generates only if its head alone learns. With a
    `denoising_weight` the noise head learns too, the folder holds `samples.png`, and the run generates.

    Raises:
        ValueError: an option, data or a network cannot be used, or a question has to be answered; raised before
            training starts.
        RuntimeError: another process is training in the folder.
    """
    options.check_paths()
    accelerator = make_accelerator(options.training, options.output)
    summary = present(options.data, options.joint.unlabelled, quiet=not accelerator.is_main_process)
    before = DataRecord.before(options.output)
    data = load_masked(options.data, options.training.seed, before, options.segmentation.instances)
    joint = settled_joint(options, data)
    if options.joint.self_training_weight is None and joint.self_training_weight and accelerator.is_main_process:
        show(SELF_TRAINS.format(joint.self_training_weight))
    options = replace(options, joint=joint)
    check_used(options, image_channels=data.train.channels)
    torch.manual_seed(keyed_seed(options.training.seed, "initialisation"))
    task = make_task(options, data)
    resolved = asdict(options)
    if isinstance(task, JointTask):
        resolved["diffusion"] = asdict(task.diffusion.config)
    record = make_record(
        data,
        options.data.preparation,
        unlabelled_images(task),
        summary=summary.lines(),
        mask_encoding=data.encoding.to_dict(),
    )
    return Trainer(task, options.training, options.output, resolved, accelerator, record).run()


def unlabelled_images(task: Task) -> TrainingImages | None:
    """Returns the images without masks that a task learns from, if there are any."""
    if isinstance(task, JointTask):
        return task.diffusion.train
    return task.images if isinstance(task, SelfTrainingTask) else None


def make_task(options: TrainSegmentation, data: MaskedSets) -> Task:
    """Returns the task of the options; a ValueError names options, data or a network that do not go together."""
    joint, run = settled_joint(options, data), Path(options.model)
    compare_with(run, data)
    scheduler = saved_scheduler(run)
    kept = scheduler is not None and joint.denoising_weight == 0
    noise_head = kept_noise_head(run, options.segmentation.learn) if kept else None
    rest = (options.augmentation if options.augment else None, scheduler, options.data.num_workers, noise_head)
    if options.segmentation.learn == "pixel_classifier":
        unet = load_unet(options.model, {"in_channels": data.train.channels})
        return FrozenFeaturesTask(unet, data, options.segmentation, options.frozen_features, *rest)
    network = make_unet(options.model, data, joint.denoising_weight > 0, options.segmentation.instances)
    if not joint.needs_images:
        return SegmentationTask(network, data, options.segmentation, *rest)
    diffusion, label_names = DiffusionConfig(), None
    if joint.denoising_weight > 0 and run.is_dir():
        diffusion, label_names = saved_conditions(run, network, scheduler)
    images = load_unlabelled(joint.unlabelled, options.data, data, label_names, options.training.seed)
    segmentation = (
        SelfTrainingTask(network, data, images.train, joint, options.segmentation, *rest)
        if joint.self_training_weight
        else SegmentationTask(network, data, options.segmentation, *rest)
    )
    if joint.denoising_weight == 0:
        return segmentation
    check_generates(network, joint.denoising_weight)
    denoising = DiffusionTask(network, images, diffusion, options.data.num_workers, scheduler)
    return JointTask(segmentation, denoising, joint.denoising_weight)


def settled_joint(options: TrainSegmentation, data: MaskedSets) -> JointConfig:
    """Returns the options for images without masks, with a self-training weight if the options leave it open.

    The weight falls with the number of masks, since the network's own masks add less and less to them.
    """
    joint = options.joint
    if joint.self_training_weight is not None:
        return joint
    has_images = joint.unlabelled is not None or data.without_masks > 0
    fits = options.augment and options.segmentation.learn != "pixel_classifier" and is_padded(options.model)
    weight = min(1.0, FEW_MASKS / len(data.train)) if has_images and fits else 0.0
    return replace(joint, self_training_weight=weight)


def is_padded(model: str) -> bool:
    """Returns whether the masks of a network are as large as its images; `model` is that of the options."""
    path = Path(model)
    if path.is_dir():
        values = read_object(unet_folder(path) / "config.json")
    else:
        values = read_object(path) if path.suffix == ".json" else load_preset(model)
    return values.get("padding", "same") == "same"


def saved_conditions(
    run: Path, network: UNet, scheduler: DDPMScheduler | None
) -> tuple[DiffusionConfig, tuple[str, ...] | None]:
    """Returns the objective of a saved noise predictor and the classes of its images; it keeps both in training."""
    if scheduler is None:
        raise ValueError(
            f"denoising_weight is above 0, but {run} has no scheduler, which a noise predictor is saved with; start "
            "from a DDPM run, or leave denoising_weight out."
        )
    names = saved_label_names(run)
    return saved_objective(run, network, scheduler), None if names is None else tuple(names)


def make_unet(model: str, data: MaskedSets, generates: bool = False, instances: bool = False) -> UNet:
    """Returns the network of a run, with a segmentation head for the classes of the data and, if asked for, instances.

    If it also generates, an untrained network gets a noise head too, and generates images of the size of the data. A
    warning tells if a trained network has a head for another number of classes, which is replaced, or channels for
    instances, which are left out.
    """
    channels, height, width = data.train.channels, data.train.height, data.train.width
    wanted: dict[str, Any] = {"in_channels": channels}
    if generates:
        wanted["sample_size"] = height if height == width else (height, width)
    if Path(model).is_dir():
        unet = load_unet(model, wanted)
        if unet.config.instances and not instances:
            logger.warning(
                "the network of %s also learnt instances, and this run leaves that part out; set instances to keep it",
                model,
            )
        before = unet.config.num_classes
        if before not in (None, data.num_classes):
            logger.warning(
                "the network of %s tells %d classes apart, and these masks have %d, so its segmentation head starts "
                "untrained",
                model,
                before,
                data.num_classes,
            )
        return unet.to_segmentation(data.num_classes, replace=True, instances=instances)
    heads = {"out_channels": channels if generates else None, "num_classes": data.num_classes, "instances": instances}
    return load_unet(model, wanted | heads)


def saved_scheduler(run: Path) -> DDPMScheduler | None:
    """Returns the scheduler of a DDPM run, or None."""
    folder = scheduler_folder(run)
    return None if folder is None else DDPMScheduler.from_pretrained(folder)


def compare_with(run: Path, data: MaskedSets) -> None:
    """Warns if a run saw images in another range of values, or learnt as many classes under other names."""
    if not (run / INDEX).is_file():
        return
    pixel_range = learnt_range(run)
    if pixel_range != data.pixel_range:
        logger.warning(
            "the network of %s learnt from images mapped by %s, but these are mapped by %s; they agree if you give %s",
            run,
            pixel_range,
            data.pixel_range,
            pixel_range.options,
        )
    names, own = saved_class_names(run), list(data.class_names or ())
    if names and own and len(names) == len(own) and names != own:
        logger.warning(
            "the network of %s learnt the classes %s, but these are %s; its segmentation head starts from the class of "
            "the same index",
            run,
            ", ".join(names),
            ", ".join(own),
        )
