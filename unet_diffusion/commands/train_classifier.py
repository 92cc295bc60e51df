"""Trains a classifier of whole images, from options to the folder of the run."""

from dataclasses import asdict
from pathlib import Path

import torch

from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.training_images import load_examined
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.evaluation.classifier import ImageClassifier
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.classification import ClassificationTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.trainer import Trainer


def train_classifier(options: TrainClassifier) -> Path:
    """Trains a classifier, or resumes its run, and returns the folder of the run.

    The folder holds the weights that did best on held-out images (without such images, the last weights) and their
    config in `classifier/`, a model card, `hardest.png`, `curves.png`, `metrics.jsonl`, `config.json`, `data.json`,
    previews and checkpoints. Channels and classes follow from the data.

    Raises:
        ValueError: an option or images cannot be used, such as images without labels; raised before training starts.
        RuntimeError: another process is training in the folder.
    """
    options.check_paths()
    accelerator = make_accelerator(options.training, options.output)
    data, summary = load_examined(options.data, options.training.seed, options.output, accelerator)
    names = checked_class_names(data)
    torch.manual_seed(keyed_seed(options.training.seed, "initialisation"))
    network = ImageClassifier(
        data.train.channels, len(names), options.widths, options.dropout, class_names=names, data=data.train.name
    )
    task = ClassificationTask(network, data, options.data.num_workers)
    record = make_record(data, options.data.preparation, summary=summary.lines(), class_names=names)
    return Trainer(task, options.training, options.output, asdict(options), accelerator, record).run()


def checked_class_names(data: ImageSets) -> tuple[str, ...]:
    """Returns the names of the classes, after checking that there are labels in both parts, and images to show."""
    names = data.train.class_names
    if names is None:
        raise ValueError(
            f"{data.train.name} has no class labels, but a classifier learns them; name their column by label_column "
            "(of type ClassLabel in a stream), or sort the images into one folder for each class."
        )
    if data.validation is None and not isinstance(data.train, ImageDataset):
        raise ValueError(
            "streaming is set and no validation set is named, but previews of a classifier show images of one; name "
            "validation_data, or leave streaming out."
        )
    for part in (data.train, data.validation):
        if isinstance(part, ImageDataset) and (part.labels == NO_LABEL).all():
            raise ValueError(
                f"none of the {len(part)} images used of {part.name} has a class label, but some must; name the "
                "column of the labels by label_column."
            )
    return names
