"""What the comparison and a worker in another environment pass to each other; needs NumPy alone.

Their folder holds `train.npz` and `validation.npz` (images and instance maps), `test.npz` (images alone) and
`options.json`. The worker writes `found.npz`, the instance maps of the test images, and at last `report.json`.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IMAGES, INSTANCES = "images", "instances"  # names of the lists of arrays in a file
PARTS = ("train", "validation", "test")
OPTIONS, FOUND, REPORT = "options.json", "found.npz", "report.json"


def save_arrays(path: Path, **lists: Sequence[np.ndarray]) -> None:
    """Writes lists of arrays, each of its own shape and type, whole or not at all."""
    named = {f"{name}_{index:06d}": array for name, arrays in lists.items() for index, array in enumerate(arrays)}
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.savez_compressed(file, **named)
    os.replace(aside, path)


def load_arrays(path: Path) -> dict[str, list[np.ndarray]]:
    """Reads the lists that `save_arrays` wrote, in their order; an empty list is not kept."""
    lists: dict[str, list[np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in sorted(file.files):
            lists.setdefault(key.rsplit("_", 1)[0], []).append(file[key])
    return lists


def save_json(path: Path, values: dict[str, Any]) -> None:
    """Writes values as JSON, whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(aside, path)


def timed_per_image(
    find: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], float]:
    """Returns the results of all images, and the mean CPU seconds for one; the first runs once before, to warm up."""
    find(images[0])
    started = time.process_time()
    found = [find(image) for image in images]
    return found, (time.process_time() - started) / len(images)
