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
        masks: files of folders that are left out, since they look like masks of the others.
    """

    paths: tuple[Path, ...]
    missing: tuple[str, ...]
    masks: tuple[Path, ...] = ()

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
        if self.masks:
            logger.warning(
                "%d files look like masks of the others, such as %s, and are left out; name them by a pattern to take "
                "them",
                len(self.masks),
                readable(str(self.masks[0])),
            )
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
    masks: list[Path] = []
    found = {given: _matches(given, output, masks) for given in inputs}
    paths = tuple(dict.fromkeys(path for matches in found.values() for path in matches))
    if not paths:
        raise ValueError(f"inputs are {', '.join(found)}, but there is no image outside of {output}.")
    missing = [f"{given}: there is no such file, and no image in it" for given, matches in found.items() if not matches]
    left_out = {mask.absolute(): None for mask in masks}.keys() - set(paths)
    return Inputs(paths, tuple(missing), tuple(sorted(left_out)))


def _matches(given: str, output: Path, masks: list[Path]) -> list[Path]:
    """Returns the images behind one input; adds those of folders that look like masks to `masks`."""
    path = Path(given).expanduser()
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = []
    for match in matches:
        if match.is_dir():
            inside = sorted(file for file in match.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            inside = [file for file in inside if file.is_file() and not file.name.startswith(".")]
            of_others = masks_among(match, inside)
            masks += of_others
            left_out = set(of_others)
            files += [file for file in inside if file not in left_out]
        else:
            files.append(match)
    results = output.resolve()
    return [file.absolute() for file in files if file.resolve().parent != results]


def _outputs(name: str) -> set[str]:
    return {name.casefold(), f"{name}-overlay".casefold()}
