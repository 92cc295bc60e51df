"""The folder of a run, which belongs to one process at a time and to one configuration."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unet_diffusion.files import remove_leftovers, write_json
from unet_diffusion.training.config import FREE_TO_CHANGE

# The values of options in runs from before these options existed.
FORMER = {
    "task": "generation",
    "self_training_weight": 0.0,
    "confidence": 0.9,
    "invert": 0.0,
    "colour": 0.0,
    "masks_per_image": "one",
}
RENAMED = {"preview_pictures": "preview_images", "validation_pictures": "validation_images"}  # former names of options
WORKERS_END = 6.0  # seconds; every 5 the data workers of PyTorch check that their process lives


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs for the length of a block.

    The operating system releases the lock when the process dies, however it dies. But with filelock before 4.0 the data
    workers of a killed process hold it until they notice, so the lock is waited for that long.

    Raises:
        RuntimeError: another process is training in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=WORKERS_END)
    except Timeout:
        raise RuntimeError(f"another process is training in {folder}; choose another output folder.") from None
    try:
        yield
    finally:
        lock.release()


def claim(folder: Path, resolved: dict[str, Any]) -> None:
    """Writes the whole configuration of a run as `config.json`, after checking that it equals an existing one.

    Files that a killed run left half written are removed.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """
    path = folder / "config.json"
    if path.exists():
        before, now = (FORMER | flat(each) for each in (json.loads(path.read_text(encoding="utf-8")), resolved))
        for key, value in now.items():
            if key not in FREE_TO_CHANGE and before.get(key) != value:
                raise ValueError(
                    f"{key} is {value!r}, but the run in {folder} was started with {before.get(key)!r}; "
                    "use the same value to resume it, or another output folder."
                )
    remove_leftovers(folder)
    write_json(path, resolved)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of all sections of a configuration by their own names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= value if isinstance(value, dict) else {key: value}
    return current_names(values)


def current_names(options: dict[str, Any]) -> dict[str, Any]:
    """Returns saved options under their current names."""
    return {RENAMED.get(key, key): value for key, value in options.items()}
