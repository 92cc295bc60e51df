"""nnU-Net v2, trained by `nnunet_worker` in a Python of its own, as a method of the experiment."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.experiments.exchange import IMAGES, save_arrays
from scripts.experiments.label_efficiency.experiment import LabelEfficiency, Run, set_facts
from scripts.experiments.label_efficiency.nnunet_worker import MASKS
from scripts.experiments.workers import WORK, channels_last, work_of
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import load_labelled, load_masked
from unet_diffusion.evaluation.mask_scores import Scores, score_masks

WORKER = "scripts.experiments.label_efficiency.nnunet_worker"


def run_nnunet(options: LabelEfficiency, run: Run, test: MaskedOptions) -> tuple[dict[str, Any], Scores]:
    """Trains nnU-Net and scores its masks of the test images, whose true masks it never sees.

    The masks that a worker has found are used again if the command was stopped before they were scored.

    Returns:
        What the worker reports, and the scores.

    Raises:
        NotRun: the worker failed.
        RuntimeError: another process works on the run.
        ValueError: the masks that it gave do not fit the images.
    """
    assert options.nnunet_python is not None
    num_classes = set_facts(options.masked(run.data)).num_classes
    sets = load_masked(options.masked(run.data, run.labels, num_classes, run.draw), run.seed)
    validation = sets.validation
    assert validation is not None
    dataset = load_labelled(
        test,
        num_classes=num_classes,
        channels=sets.train.channels,
        pixel_range=sets.pixel_range,
        palette=sets.palette,
        class_names=sets.class_names,
    )

    def save_labelled(folder: Path) -> None:
        save_part(folder / "train.npz", sets.train, run.config["inverted"])
        save_part(folder / "validation.npz", validation)

    folder, values = options.output / run.folder / WORK, worker_options(options, run, num_classes)
    reported, found = work_of(options.nnunet_python, WORKER, folder, values, save_labelled, dataset, MASKS)
    following = iter(found)

    def predict(image: Tensor) -> Tensor:
        return torch.from_numpy(next(following)).long()

    return reported, score_masks(predict, dataset)


def worker_options(options: LabelEfficiency, run: Run, num_classes: int) -> dict[str, Any]:
    """The options of the worker: either steps or CPU seconds, the other is None."""
    return {
        **run.config["nnunet"],
        "batch_size": options.nnunet_batch,
        "mixed_precision": options.precision,
        "steps": options.steps if options.minutes is None else None,
        "seconds": None if options.minutes is None else 60 * options.minutes,
        "seed": run.seed,
        "num_classes": num_classes,
    }


def save_part(path: Path, dataset: MaskedDataset, inverted: bool = False) -> None:
    """Writes the whole images of a set and their masks; with `inverted`, each also with dark and bright swapped."""
    images = [channels_last(dataset, index) for index in range(len(dataset))]
    masks = [dataset[index]["mask"].numpy().astype(np.uint8) for index in range(len(dataset))]
    if inverted:
        images, masks = images + [np.invert(image) for image in images], 2 * masks
    save_arrays(path, **{IMAGES: images, MASKS: masks})
