"""Runs a peer in a Python of its own, which gets arrays and gives arrays back (`exchange`)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.instances.exchange import (
    FOUND,
    IMAGES,
    INSTANCES,
    OPTIONS,
    REPORT,
    load_arrays,
    save_arrays,
    save_json,
)
from scripts.experiments.instances.experiment import Case, Instances, labelled
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.files import remove_at_once

ROOT = Path(__file__).parents[3]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
LOG = "log.txt"


class NotRun(Exception):
    """A peer that could not be run, with the reason."""


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

    Returns:
        Facts of the case, the objects (H, W) of all images, and the CPU seconds for one.

    Raises:
        NotRun: there is no such Python, or the worker failed in it.
        ValueError: the maps that it gave do not fit the images.
    """
    python, folder = python_of(options, case.method), options.output / case.folder
    if folder.is_dir():  # a stopped case
        remove_at_once(folder)
    folder.mkdir(parents=True)
    for part in ("train", "validation"):
        save_part(folder / f"{part}.npz", labelled(options, case.data, part), case.labels if part == "train" else None)
    save_arrays(folder / "test.npz", **{IMAGES: [channels_last(test, index) for index in range(len(test))]})
    values = {**case.config, "seconds": 60 * options.minutes, "seed": case.seed}
    save_json(folder / OPTIONS, values)
    command = [str(python), "-m", f"scripts.experiments.instances.{case.method}_worker", str(folder.resolve())]
    # of its own: what belongs to this environment must not be found in the other one
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PYTHONPATH": str(ROOT), **dict.fromkeys(THREADS, "1")}
    with (folder / LOG).open("w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log).returncode
    if code or not (folder / REPORT).is_file():
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        raise NotRun(f"its worker ended with code {code}: {last} ({folder / LOG})")
    facts = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    found = load_arrays(folder / FOUND)[INSTANCES]
    if [each.shape for each in found] != [test[index]["mask"].shape for index in range(len(test))]:
        raise ValueError(f"{folder / FOUND} has other maps than one of the size of each test image.")
    for part in ("train", "validation", "test"):
        (folder / f"{part}.npz").unlink()
    return facts, found, facts.pop("predict_seconds")


def save_part(path: Path, dataset: MaskedDataset, count: int | None) -> None:
    """Writes the first images of a set and their instance maps, or all of them."""
    indices = range(len(dataset) if count is None else count)
    instances = [dataset.cache.instances[dataset.rows[index]].astype(np.int32) for index in indices]
    save_arrays(path, **{IMAGES: [channels_last(dataset, index) for index in indices], INSTANCES: instances})


def channels_last(dataset: MaskedDataset, index: int) -> np.ndarray:
    """Returns an image as (H, W) if it has one channel, else (H, W, C)."""
    image = dataset[index]["image"].permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[2] == 1 else image
