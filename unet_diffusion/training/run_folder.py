"""The folder of a run: one process at a time, one configuration from its start to its end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unet_diffusion.files import remove_leftovers, write_json
from unet_diffusion.training.config import FREE_TO_CHANGE

FORMER = {  # what runs did before there was a choice
    "task": "generation",
    **{"self_training_weight": 0.0, "confidence": 0.9, "invert": 0.0, "colour": 0.0},
}
RENAMED = {"preview_pictures": "preview_images", "validation_pictures": "validation_images"}  # in runs made before
WORKERS_END = 6.0  # seconds: torch's data workers look every 5 whether their process lives


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder for the length of a block.

    The operating system lets go of the lock when the process dies, however it dies. But with filelock before 4.0 the
    data workers of a killed process hold it until they notice; so they are waited for.

    Raises:
        RuntimeError: another process is training there.
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
    """Writes the whole configuration of a run as `config.json`, or checks that it equals the one that is there.

    What a killed run left half written is removed.

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
                    "use the same value to go on with it, or another output folder."
                )
    remove_leftovers(folder)
    write_json(path, resolved)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The options of all sections of a run's configuration by their own names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= value if isinstance(value, dict) else {key: value}
    return current_names(values)


def current_names(options: dict[str, Any]) -> dict[str, Any]:
    """Saved options under the names that they have today."""
    return {RENAMED.get(key, key): value for key, value in options.items()}
