"""Runs a peer in a Python of its own, which gets arrays and gives arrays back (`exchange`)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.exchange import FOUND, IMAGES, OPTIONS, PARTS, REPORT, load_arrays, save_arrays, save_json
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.files import remove
from unet_diffusion.training.run_folder import only_run_in

ROOT = Path(__file__).parents[2]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
LOG = "log.txt"
WORK = "worker"  # in the folder of a run


class NotRun(Exception):
    """A peer that could not be run, with the reason."""


def work_of(
    python: Path,
    module: str,
    folder: Path,
    values: dict[str, Any],
    save_labelled: Callable[[Path], None],
    test: MaskedDataset,
    name: str,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Runs a worker in a folder, or takes what one with the same options has left there.

    Args:
        python: of the environment that the worker needs.
        module: the worker.
        folder: of the worker, in the folder of a run.
        values: its options.
        save_labelled: writes `train.npz` and `validation.npz` to the folder that it is given.
        test: the test images, of which the worker gets no masks.
        name: of the list of arrays that it finds.

    Returns:
        Its report, and an array (H, W) for each test image.

    Raises:
        NotRun: the worker failed.
        RuntimeError: another process works on the run.
        ValueError: the arrays do not fit the test images.
    """
    with only_run_in(folder.parent):
        if not is_finished(folder, values):
            remove(folder)
            folder.mkdir()
            save_labelled(folder)
            save_arrays(folder / "test.npz", **{IMAGES: [channels_last(test, index) for index in range(len(test))]})
            save_json(folder / OPTIONS, values)
            run_worker(python, module, folder)
        for part in PARTS:
            (folder / f"{part}.npz").unlink(missing_ok=True)
    found = load_arrays(folder / FOUND)[name]
    if [each.shape for each in found] != [test[index]["mask"].shape for index in range(len(test))]:
        raise ValueError(
            f"{folder / FOUND} has other {name} than one map of the size of each test image; remove its folder."
        )
    return json.loads((folder / REPORT).read_text(encoding="utf-8")), found


def is_finished(folder: Path, values: dict[str, Any]) -> bool:
    """Returns whether a worker with these options has written its report, which it does last."""
    path = folder / OPTIONS
    return (folder / REPORT).is_file() and json.loads(path.read_text(encoding="utf-8")) == values


def run_worker(python: Path, module: str, folder: Path) -> None:
    """Runs the worker of a peer on a folder; the worker ends if this process is stopped by Ctrl-C or SIGTERM.

    Raises:
        NotRun: it failed.
    """
    command = [str(python.absolute()), "-m", module, str(folder.resolve())]
    # of its own: what belongs to this environment must not be found in the other one
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PYTHONPATH": str(ROOT), **dict.fromkeys(THREADS, "1")}
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with (folder / LOG).open("w", encoding="utf-8") as log:  # any exception kills the worker
            code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log).returncode
    finally:
        signal.signal(signal.SIGTERM, before)
    if code or not (folder / REPORT).is_file():
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        raise NotRun(f"its worker ended with code {code}: {last} ({folder / LOG})")


def channels_last(dataset: MaskedDataset, index: int) -> np.ndarray:
    """Returns an image as (H, W) if it has one channel, else (H, W, C)."""
    image = dataset[index]["image"].permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[2] == 1 else image
