"""The folder of a run, which belongs to one process at a time and to one configuration."""

import json
import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from unet_diffusion.data.record import FILE as RECORD
from unet_diffusion.data.record import DataRecord, is_foreign_record, resolved_place
from unet_diffusion.files import INDEX, remove_leftovers, write_json
from unet_diffusion.saved_index import read_object
from unet_diffusion.training.checkpoints import saved_checkpoints
from unet_diffusion.training.config import FREE_TO_CHANGE
from unet_diffusion.unused_options import unused_among

logger = logging.getLogger(__name__)

# The values of options for runs from before these options existed.
FORMER = {
    "task": "generation",
    "self_training_weight": 0.0,
    "confidence": 0.9,
    "invert": 0.0,
    "colour": 0.0,
    "masks_per_image": "one",
    "optimizer": "adamw",
    "instances": False,
    "method": "consistency",
}
RENAMED = {"preview_pictures": "preview_images", "validation_pictures": "validation_images"}  # former names of options
PLACES = {"data", "masks", "validation_data", "validation_masks", "unlabelled"}  # of data, compared by a record
FINDING = {  # options on how images and masks are found; they do not matter where a record compares the content
    *("split", "validation_split", "image_column", "mask_column", "label_column"),
    *("image_suffix", "mask_suffix", "mask_prefix", "max_broken"),
}
PATHS = {*PLACES, "model"}
UNCHANGED = "unchanged_weights"  # in `config.json`: a hash of the network that `Task.unchanged` describes
REPLACED = (  # by a run, like its record
    *(INDEX, "README.md", "metrics.jsonl", "curves.png", "masks.png", "samples.png", "hardest.png"),
    *("unet", "scheduler", "classifier"),
)
WORKERS_END = 6.0  # seconds; every 5 seconds, PyTorch's data workers check that their process lives


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs for the length of a block.

    The operating system releases the lock when the process dies, however it dies. But with filelock before 4.0, the
    data workers of a killed process keep the lock until they notice, so this waits that long for the lock.

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


def claim(folder: Path, resolved: dict[str, Any], record: DataRecord | None = None, **facts: Any) -> None:
    """Writes the whole configuration of a run as `config.json`, after checking that it equals an existing one.

    Options that name files are equal if they name the same files, however the paths are written. If the content of the
    data is the same, it does not matter where the data lie and how images and masks are found there. Former values of
    options that decide nothing do not matter either. Files that a killed run left half written are removed.

    Args:
        folder: the folder of the run.
        resolved: the configuration.
        record: what is known about the data, written as `data.json`.
        facts: arguments for `unused_among`.

    Raises:
        ValueError: the folder holds a run of another configuration or, unless `allow_changed_data` is set, of other
            data, or one that is finished and has no checkpoints; or no run, but files that a run would replace.
    """
    path = folder / "config.json"
    if path.exists():
        before, now = (FORMER | flat(each) for each in (json.loads(path.read_text(encoding="utf-8")), resolved))
        if "threads" in before:
            resolved = resolved | {"threads": before["threads"]}  # those of the first start
        _check_unchanged(folder, before, now)
        _check_goes_on(folder)
        earlier = None if record is None else DataRecord.read(folder)
        if record is not None and earlier is None:
            logger.warning("the run in %s has no data.json, so whether its data have changed is not checked", folder)
        if record is not None:
            facts["held_out"] = bool(record.held_out)
        free = FREE_TO_CHANGE if earlier is None else FREE_TO_CHANGE | PLACES
        if earlier is not None and (earlier.trained or now.get("allow_changed_data")):
            free |= FINDING  # but not for a stream, where only the files are compared
        _check_options(folder, before, now, free, facts | flat(resolved))  # without those of other commands in FORMER
        if record is not None and earlier is not None:
            if record.fingerprint != earlier.fingerprint and not now.get("allow_changed_data"):
                moved = [
                    f"{key} is {now[key]!r} instead of {before.get(key)!r}"
                    for key in PLACES
                    if _differs(key, before, now)
                ]
                raise ValueError(
                    f"the data have changed since the run in {folder} was started: "
                    f"{', '.join([*sorted(moved), earlier.changes(record)])}; set allow_changed_data to resume it with "
                    "them, or choose another output folder."
                )
            record = earlier.followed_by(record)
    else:
        _check_no_run(folder)
    for place in (folder, folder / "checkpoints", folder / "previews"):
        remove_leftovers(place)
    if record is not None:
        record.write(folder)
    write_json(path, resolved)


def _check_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ValueError if the weights that a run needs, but does not keep, are others than at its start."""
    former, value = before.pop(UNCHANGED, None), now.pop(UNCHANGED, None)
    if former is not None and former != value:
        raise ValueError(
            f"the weights of {now.get('model')} have changed since the run in {folder} was started, which needs them "
            "as they were; give a folder that has them, under the same path, or choose another output folder."
        )


def _check_goes_on(folder: Path) -> None:
    """Raises a ValueError for a finished run without checkpoints, which would start again."""
    if (folder / INDEX).exists() and not saved_checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"the run in {folder} is finished and has no checkpoints, so it cannot go on, and another start would "
            "replace its results; choose another output folder."
        )


def _check_no_run(folder: Path) -> None:
    """Raises a ValueError if a folder without a run has files that a run would replace, or go on from."""
    found = [name for name in REPLACED if (folder / name).exists()]
    if is_foreign_record(folder):
        found.append(RECORD)
    if saved_checkpoints(folder / "checkpoints"):
        found.append("checkpoints")
    if found:
        raise ValueError(
            f"output is {folder}, which holds no run (no config.json), but {', '.join(found)}, which a run would "
            "replace or go on from; choose another folder, or move these files."
        )


def started_with(folder: Path) -> dict[str, Any]:
    """Returns the options that a run was started with, by their own names; none if there is no run."""
    path = folder / "config.json"
    return flat(read_object(path)) if path.exists() else {}


def _check_options(
    folder: Path, before: dict[str, Any], now: dict[str, Any], free: Set[str], facts: dict[str, Any]
) -> None:
    for key, value in now.items():
        differs = key not in free and _differs(key, before, now)
        if differs and key not in unused_among({**facts, key: before.get(key)}):
            raise ValueError(
                f"{key} is {value!r}, but the run in {folder} was started with {before.get(key)!r}; "
                "use the same value to resume it, or another output folder."
            )


def _differs(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns whether an option has another value; paths are equal if they name the same file."""
    former, value = before.get(key), now.get(key)
    if key in PATHS and isinstance(former, str) and isinstance(value, str):
        return resolved_place(former) != resolved_place(value)
    return former != value


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of all sections of a configuration by their own names."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= value if isinstance(value, dict) else {key: value}
    return current_names(values)


def current_names(options: dict[str, Any]) -> dict[str, Any]:
    """Returns saved options under their current names."""
    return {RENAMED.get(key, key): value for key, value in options.items()}
