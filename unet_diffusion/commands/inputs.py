"""Finds the image files that a command works through, names their outputs, and collects failures."""

import glob
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.data.folders import IMAGE_SUFFIXES, masks_among
from unet_diffusion.files import readable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The image files that a user named.

    Attributes:
        paths: absolute, each once, in the order in which they were named.
        missing: a sentence for each input without an image.
    """

    paths: tuple[Path, ...]
    missing: tuple[str, ...]

    def names(self) -> dict[Path, str]:
        """Returns a name for the outputs of each image: its stem, and a number where several images share it.

        No two of `NAME.png` and `NAME-overlay.png` are equal, in any case of their letters.
        """
        taken: set[str] = set()
        names = {}
        for path in self.paths:
            number, name = 1, path.stem
            while not taken.isdisjoint(_outputs(name)):
                number += 1
                name = f"{path.stem}-{number}"
            taken.update(_outputs(name))
            names[path] = name
        return names

    def work_through(self, paths: Iterable[Path], work: Callable[[Path], None]) -> list[str]:
        """Calls `work` for each path; returns a sentence for each that failed, missing inputs included.

        A failure is logged at once, and the others go on. The paths may be wrapped in a progress bar.
        """
        failures = list(self.missing)
        for path in paths:
            try:
                work(path)
            except (ValueError, OSError, ImportError, MemoryError) as error:
                named = str(path) in str(error)
                failures.append(readable(str(error) if named else f"{path}: {error}"))
                logger.warning("%s", failures[-1])
        return failures

    def report(self, failures: list[str], output: Path) -> None:
        """Raises a RuntimeError that lists the failures, if there are any."""
        if failures:
            listed = "\n".join(failures)
            raise RuntimeError(
                f"{len(failures)} of {len(self.paths)} inputs failed, the others are in {output}:\n{listed}"
            )


def find_inputs(inputs: Iterable[str], output: Path) -> Inputs:
    """Finds the image files behind files, folders (with their subfolders) and globs.

    A named file is taken whatever its suffix; of a folder, the files with the suffix of an image format. Files of the
    output folder are left out, and so are those of a folder that look like masks of its other files.

    Raises:
        ValueError: no image at all.
    """
    found = {given: _matches(given, output) for given in inputs}
    paths = tuple(dict.fromkeys(path for matches in found.values() for path in matches))
    if not paths:
        raise ValueError(f"inputs are {', '.join(found)}, but there is no image outside of {output}.")
    missing = [f"{given}: there is no such file, and no image in it" for given, matches in found.items() if not matches]
    return Inputs(paths, tuple(missing))


def _matches(given: str, output: Path) -> list[Path]:
    path = Path(given).expanduser()
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = []
    for match in matches:
        if match.is_dir():
            inside = sorted(file for file in match.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            files += _without_masks(match, [file for file in inside if file.is_file() and file.name[0] != "."])
        else:
            files.append(match)
    results = output.resolve()
    return [file.absolute() for file in files if file.resolve().parent != results]


def _without_masks(folder: Path, files: list[Path]) -> list[Path]:
    """Leaves out files that look like masks of the others, with a warning."""
    masks = masks_among(folder, files)
    if masks:
        logger.warning(
            "%d files of %s look like masks of the others, such as %s, and are left out; name them by a pattern to "
            "take them",
            len(masks),
            readable(str(folder)),
            readable(masks[0].name),
        )
    left_out = set(masks)
    return [file for file in files if file not in left_out]


def _outputs(name: str) -> set[str]:
    return {name.casefold(), f"{name}-overlay".casefold()}
