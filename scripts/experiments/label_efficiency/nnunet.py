"""nnU-Net v2, trained by `nnunet_worker` in a Python of its own, as a method of the experiment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.experiments.instances.exchange import (
    FOUND,
    IMAGES,
    OPTIONS,
    PARTS,
    REPORT,
    load_arrays,
    save_arrays,
    save_json,
)
from scripts.experiments.instances.peers import WORK, channels_last, is_finished, run_worker
from scripts.experiments.label_efficiency.experiment import LabelEfficiency, Run, set_facts
from scripts.experiments.label_efficiency.nnunet_worker import MASKS
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import load_labelled, load_masked
from unet_diffusion.evaluation.mask_scores import Scores, score_masks
from unet_diffusion.files import remove
from unet_diffusion.training.run_folder import only_run_in

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
    assert sets.validation is not None
    dataset = load_labelled(
        test,
        num_classes=num_classes,
        channels=sets.train.channels,
        pixel_range=sets.pixel_range,
        palette=sets.palette,
        class_names=sets.class_names,
    )
    folder = options.output / run.folder / WORK
    values = worker_options(options, run, num_classes)
    with only_run_in(folder.parent):
        if not is_finished(folder, values):
            remove(folder)
            folder.mkdir()
            save_part(folder / "train.npz", sets.train, run.config["inverted"])
            save_part(folder / "validation.npz", sets.validation)
            save_arrays(folder / "test.npz", **{IMAGES: [channels_last(dataset, each) for each in range(len(dataset))]})
            save_json(folder / OPTIONS, values)
            run_worker(options.nnunet_python, WORKER, folder)
        for part in PARTS:
            (folder / f"{part}.npz").unlink(missing_ok=True)
    found = load_arrays(folder / FOUND)[MASKS]
    if [each.shape for each in found] != [dataset[index]["mask"].shape for index in range(len(dataset))]:
        raise ValueError(
            f"{folder / FOUND} has other masks than one of the size of each test image; remove its folder."
        )
    following = iter(found)

    def predict(image: Tensor) -> Tensor:
        return torch.from_numpy(next(following)).long()

    return json.loads((folder / REPORT).read_text(encoding="utf-8")), score_masks(predict, dataset)


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
