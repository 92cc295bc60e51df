"""The state of a run on disk: safetensors and JSON with checksums, written aside, checked, and found again.

Nothing here reads a pickle. A checkpoint is a folder `step-00001000` that holds one safetensors file per part (weights,
moving average, optimizer), `state.json` and `checksums.json`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unet_diffusion.atomic import write_json, written_aside

logger = logging.getLogger(__name__)

FORMAT = 2  # of the folder; a reader refuses a format that it does not know


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps that are done.
        tensors: the parts of the state by name, each a flat mapping of tensors.
        state: everything else, as JSON knows it.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or whose bytes are not those that were written."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint under `folder` and removes the oldest beyond `keep`.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it could not be written, such as on a full disk; earlier checkpoints are as they were.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    if path.exists():
        shutil.rmtree(path)  # left by a run that was stopped here, and found damaged
    try:
        with written_aside(path) as aside:
            aside.mkdir()
            for name, tensors in checkpoint.tensors.items():
                save_file({key: value.contiguous() for key, value in tensors.items()}, aside / f"{name}.safetensors")
            write_json(aside / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
            write_json(aside / "checksums.json", {file.name: sha256(file) for file in sorted(aside.iterdir())})
    except (OSError, SafetensorError) as error:
        raise OSError(f"the checkpoint of step {checkpoint.step} could not be written to {folder}: {error}") from error
    for old in saved_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def saved_checkpoints(folder: Path) -> list[Path]:
    """The folders of all finished checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A damaged one is named in a warning, and the one before is taken.

    Raises:
        DamagedCheckpoint: all of them are damaged.
    """
    paths = saved_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except DamagedCheckpoint as error:
            logger.warning("%s; going back to the one before.", error)
    if paths:
        raise DamagedCheckpoint(f"all {len(paths)} checkpoints in {folder} are damaged; start anew in an empty folder.")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks its bytes.

    Raises:
        DamagedCheckpoint: a file is missing, or has changed since it was written.
        ValueError: the checkpoint was written by a later version.
    """
    try:
        for name, expected in json.loads((path / "checksums.json").read_text(encoding="utf-8")).items():
            if sha256(path / Path(name).name) != expected:
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {name} is not what was written")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(
                f"checkpoint {path} has format {state['format']}, but this version reads format {FORMAT}; "
                "go on with the version that wrote it, or start in an empty folder."
            )
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The state of an optimizer as one flat mapping, `<parameter>/<quantity>`."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, quantities in optimizer.state.items()
        for key, value in quantities.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: dict[str, Tensor]) -> None:
    """Gives an optimizer the state that `optimizer_tensors` returned.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    owners = {key.rsplit("/", 1)[0] for key in saved}
    if owners - set(parameters):
        raise ValueError(f"the saved optimizer knows {sorted(owners - set(parameters))[:3]}, which the network lacks.")
    for key, value in saved.items():
        name, quantity = key.rsplit("/", 1)
        parameter = parameters[name]
        device = parameter.device if value.ndim or optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter][quantity] = torch.empty_like(value, device=device).copy_(value)
