"""Our ways: training as `train-segmentation` does, for a given processor time, and objects as `segment` finds them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.experiments.exchange import timed_per_image
from scripts.experiments.instances.experiment import Case, Instances, labelled, source
from scripts.experiments.pace import PACED
from scripts.experiments.timed_trainer import TimedTrainer, kept_steps
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_segmentation import make_task
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_pipeline
from unet_diffusion.segmentation.instance_maps import ObjectSizes, object_areas
from unet_diffusion.segmentation.instances import connected_components
from unet_diffusion.tasks.config import SegmentationConfig
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig

MAPS, TURNED = "ours, maps of objects", "ours, maps of objects, --augment"
COMPONENTS, WATERSHED = "ours, components of masks", "ours, watershed of masks"
Way = Callable[[np.ndarray], np.ndarray]  # image (C, H, W) to objects (H, W)
Found = dict[str, tuple[list[np.ndarray], float]]  # objects of all images by way, and CPU seconds for one image


def run_ours(options: Instances, case: Case, test: MaskedDataset) -> tuple[dict[str, Any], Found]:
    """Trains or resumes a case, and finds the objects of the test images with the weights of its best validation.

    Returns:
        Facts of the case; and by way, objects (H, W) of all images and the CPU seconds for one.
    """
    folder = options.output / case.folder

    def short(aside: Path) -> TimedTrainer:
        return make_trainer(training_run(options, case, PACED, aside))

    steps = kept_steps(folder, 60 * options.minutes, short)
    config = training_run(options, case, steps, folder / "run")
    trainer = make_trainer(config)
    trainer.run()
    pipe = load_pipeline(SegmentationPipeline, config.output)
    images = [test[index]["image"].numpy() for index in range(len(test))]
    least = least_area(labelled(options, case.data, "train"), case.labels)
    mask, ways = ways_of(pipe, case.method, least)
    found = {way: timed_per_image(find, images) for way, find in ways.items()}
    facts = {
        "parameters": pipe.unet.num_parameters(),
        "steps": steps,
        "batch_size": options.batch_size,
        "seconds": trainer.cpu_seconds,
        "masks_seconds": timed_per_image(mask, images)[1],
        "precision": trainer.resolved["mixed_precision"],
        "chosen": {"step": trainer.best.step, "validation_mean_iou": trainer.best.score, "min_area": least},
    }
    return facts, found


def training_run(options: Instances, case: Case, steps: int, output: Path) -> TrainSegmentation:
    """The options of `train-segmentation` for a case."""
    every = max(1, steps // options.validations)
    training = TrainingConfig(
        steps=steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        optimizer=options.optimizer,
        warmup_steps=steps // 20,
        ema_decay=0.99,
        validate_every=every,
        preview_every=steps,
        checkpoint_every=every,
        keep_checkpoints=1,
        trackers=(),
        seed=case.seed,
    )
    data = MaskedDataConfig(
        data=str(source(options, case.data, "train")),
        validation_data=str(source(options, case.data, "validation")),
        image_column="image",
        mask_column="mask",
        instances_column="instances",
        channels=1 if case.data in options.grey else 3,
        crop_size=options.crop_size,
        max_labels=case.labels,
        percentiles=options.percentiles,
        percentiles_of="training" if options.percentiles is None else "image",
        num_classes=2,
    )
    segmentation = SegmentationConfig(instances=case.method == "ours", preview_images=4)
    return TrainSegmentation(
        data, output, str(options.network), segmentation, augmentation=options.augmentation, training=training
    )


def make_trainer(config: TrainSegmentation) -> TimedTrainer:
    """Opens the data, and builds the untrained network and the trainer of a run."""
    accelerator = make_accelerator(config.training, config.output)
    data = load_masked(config.data, config.training.seed, instances=config.segmentation.instances)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    config = replace(config, joint=replace(config.joint, self_training_weight=0.0))  # no other image is learnt from
    return TimedTrainer(make_task(config, data), config.training, config.output, asdict(config), accelerator)


def least_area(train: MaskedDataset, count: int) -> int:
    """Returns the least area of the objects in the first images of a set, as a network with maps keeps it."""
    maps = (np.asarray(train.cache.instances[row]).astype(np.int64) for row in train.rows[:count])
    return ObjectSizes.of(np.concatenate([object_areas(each) for each in maps])).min_area


def ways_of(pipe: SegmentationPipeline, method: str, least: int) -> tuple[Callable[[np.ndarray], np.ndarray], dict]:
    """Returns how masks and, in the ways of a method, objects are found in an image (C, H, W), as `segment` does.

    Objects of fewer than `least` pixels are left out in all ways, as the network with maps does by itself.
    """
    pipe.set_progress_bar_config(disable=True)
    precision = settled_precision("auto", pipe.device)

    def segmented(image: np.ndarray, **objects: Any) -> tuple[Any, ...]:
        chosen: Any = {"return_probabilities": False, "return_dict": False, "mixed_precision": precision}
        return pipe(torch.from_numpy(image), output_type="np", **objects, **chosen)

    def mask(image: np.ndarray) -> np.ndarray:
        return segmented(image)[0][0]

    def found(image: np.ndarray, augment: bool = False) -> np.ndarray:
        learnt = None if method == "ours" else least
        return segmented(image, instances=True, min_area=learnt, augment=augment)[3][0]

    def components(image: np.ndarray) -> np.ndarray:
        parts = connected_components(mask(image) > 0)
        return np.where(np.bincount(parts.ravel())[parts] >= least, parts, 0)

    with_maps = {MAPS: found, TURNED: partial(found, augment=True)}
    return mask, with_maps if method == "ours" else {COMPONENTS: components, WATERSHED: found}
