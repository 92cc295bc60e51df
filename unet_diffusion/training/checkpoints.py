"""Checkpoints of a run: safetensors and JSON with checksums, written aside and read back.

Nothing here reads a pickle. A checkpoint is a folder `step-00001000` that holds one safetensors file per part (weights,
moving average, optimizer), `state.json` and `checksums.json`.
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unet_diffusion.files import remove_at_once, write_json, written_aside

logger = logging.getLogger(__name__)

NAME = re.compile(r"step-\d{8,}")  # of a checkpoint folder; a copy under another name is left alone
FORMAT = 2  # of the checkpoint folder; other formats are not read
UNREADABLE = (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError)


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        step: optimizer steps done.
        tensors: the parts of the state by name, each a flat mapping of tensors.
        state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete, or whose files have changed since they were written."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint under `folder`, reads it back, and removes the checkpoints that it replaces.

    These are the oldest ones beyond `keep`, and those of the same or a later step. A run resumes from the newest whole
    checkpoint, so it reaches an earlier step only if the later checkpoints are damaged.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: the checkpoint could not be written, for example because the disk is full; earlier checkpoints are
            unchanged.
    """
    path = folder / f"step-{checkpoint.step:08d}"
    try:
        with written_aside(path) as aside:
            aside.mkdir()
            for name, tensors in checkpoint.tensors.items():
                save_file({key: value.contiguous() for key, value in tensors.items()}, aside / f"{name}.safetensors")
            facts = {"format": FORMAT, "step": checkpoint.step, "parts": sorted(checkpoint.tensors)}
            write_json(aside / "state.json", {**facts, **checkpoint.state})
            write_json(aside / "checksums.json", {file.name: sha256(file) for file in sorted(aside.iterdir())})
            if not same_bits(load_checkpoint(aside).tensors, checkpoint.tensors):
                raise OSError(f"{path} reads back differently from what was written")
            for replaced in (each for each in saved_checkpoints(folder) if each.name >= path.name):
                remove_at_once(replaced)
    except (OSError, DamagedCheckpoint) as error:
        raise OSError(
            f"the checkpoint of step {checkpoint.step} could not be saved: {error}; earlier ones are unchanged, and "
            "the same command resumes from the newest of them."
        ) from error
    for old in saved_checkpoints(folder)[:-keep]:
        remove_at_once(old)
    return path


def weights_digest(network: nn.Module) -> str:
    """Returns a hash of all parameters and buffers of a network, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def same_bits(some: dict[str, dict[str, Tensor]], others: dict[str, dict[str, Tensor]]) -> bool:
    """Returns whether two checkpoints have the same tensors, bit for bit."""
    if {part: set(tensors) for part, tensors in some.items()} != {part: set(each) for part, each in others.items()}:
        return False
    pairs = [(tensor, others[part][name]) for part, tensors in some.items() for name, tensor in tensors.items()]
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def saved_checkpoints(folder: Path) -> list[Path]:
    """Returns the folders of all finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir())


def load_latest(folder: Path) -> Checkpoint | None:
    """Reads the newest whole checkpoint; None if there are no checkpoints.

    If it is damaged, a warning names it and the one before it is read.

    Raises:
        DamagedCheckpoint: all are damaged.
    """
    paths = saved_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except DamagedCheckpoint as error:
            logger.warning("%s; going back to the one before.", error)
    if paths:
        raise DamagedCheckpoint(f"all {len(paths)} checkpoints in {folder} are damaged; start in an empty folder.")
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks its checksums.

    Raises:
        DamagedCheckpoint: a file is missing, or has changed since it was written.
        ValueError: the checkpoint has the format of another version.
    """
    try:
        checksums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        state = json.loads(_checked(path / "state.json", checksums).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(
                f"checkpoint {path} has format {state['format']}, but this version reads format {FORMAT}; "
                "resume with the version that wrote it, or start in an empty folder."
            )
        files = {part: _checked(path / f"{Path(part).name}.safetensors", checksums) for part in state.pop("parts")}
        tensors = {part: load_file(file) for part, file in files.items()}
        step = state.pop("step")
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    return Checkpoint(step=step, tensors=tensors, state=state)


def _checked(file: Path, checksums: dict[str, str]) -> Path:
    """Returns the file, after checking that it has not changed since it was written."""
    if sha256(file) != checksums.get(file.name):
        raise DamagedCheckpoint(f"checkpoint {file.parent} is damaged: {file.name} has changed since it was written")
    return file


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Returns the state of an optimizer as one flat mapping, `<parameter>/<quantity>`."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, quantities in optimizer.state.items()
        for key, value in quantities.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], saved: dict[str, Tensor]) -> None:
    """Loads the state that `optimizer_tensors` returned, into the memory layout of each parameter.

    A fused kernel steps through a parameter and its averages in memory order, so their layouts must agree.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    unknown = {key.rsplit("/", 1)[0] for key in saved} - set(parameters)
    if unknown:
        raise ValueError(f"the saved optimizer state has {sorted(unknown)[:3]}, but the network does not.")
    for key, value in saved.items():
        name, quantity = key.rsplit("/", 1)
        parameter = parameters[name]
        device = parameter.device if value.ndim or optimizer.defaults.get("fused") else torch.device("cpu")
        like = parameter.detach() if value.shape == parameter.shape else value
        optimizer.state[parameter][quantity] = torch.empty_like(like, dtype=value.dtype, device=device).copy_(value)
