"""Trains the peers that find objects, each in a Python of its own."""

from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.exchange import IMAGES, INSTANCES, save_arrays
from scripts.experiments.instances.experiment import Case, Instances, labelled
from scripts.experiments.workers import WORK, NotRun, channels_last, work_of
from unet_diffusion.data.masked.dataset import MaskedDataset


def python_of(options: Instances, method: str) -> Path:
    """Returns the Python of a peer; raises `NotRun` if none is given, or there is none."""
    python: Path | None = getattr(options, f"{method}_python")
    if python is None:
        raise NotRun(f"no --{method}-python")
    if not python.is_file():
        raise NotRun(f"there is no {python}")
    return python


def run_peer(options: Instances, case: Case, test: MaskedDataset) -> tuple[dict[str, Any], list[np.ndarray], float]:
    """Trains a peer and lets it find the objects of the test images, whose instance maps it never sees.

    What a worker has found is used again if the command was stopped before the case was scored.

    Returns:
        Facts of the case, the objects (H, W) of all images, and the CPU seconds for one.

    Raises:
        NotRun: there is no such Python, or the worker failed in it.
        RuntimeError: another process works on the case.
        ValueError: the maps that it gave do not fit the images.
    """

    def save_labelled(folder: Path) -> None:
        for part in ("train", "validation"):
            count = case.labels if part == "train" else None
            save_part(folder / f"{part}.npz", labelled(options, case.data, part), count)

    python, module = python_of(options, case.method), f"scripts.experiments.instances.{case.method}_worker"
    values = {**case.config, "seconds": 60 * options.minutes, "seed": case.seed}
    facts, found = work_of(python, module, options.output / case.folder / WORK, values, save_labelled, test, INSTANCES)
    return facts, found, facts.pop("predict_seconds")


def save_part(path: Path, dataset: MaskedDataset, count: int | None) -> None:
    """Writes the first images of a set and their instance maps, or all of them."""
    indices = range(len(dataset) if count is None else count)
    instances = [dataset.cache.instances[dataset.rows[index]].astype(np.int32) for index in indices]
    save_arrays(path, **{IMAGES: [channels_last(dataset, index) for index in indices], INSTANCES: instances})
