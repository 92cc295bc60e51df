"""Finds the image files that a command works through, each with its place below the input that the user named."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from unet_diffusion.commands.record import RECORDS
from unet_diffusion.data.folders import IMAGE_SUFFIXES, is_run
from unet_diffusion.data.names import masks_among
from unet_diffusion.files import readable
from unet_diffusion.images.axes import counted

WILDCARD = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Inputs:
    """The image files that a user named.

    Attributes:
        paths: absolute paths, each once, in the order in which they were named.
        places: the place of each path below the named folder, or below the part of a pattern before its first wildcard;
            the file's name if the file itself was named. With slashes, and never with `..`.
        missing: a sentence for each input without an image, and for each folder that cannot be listed.
        masks: files in folders that are left out, since they look like masks of other files.
        results: folders that are left out, since they hold a run or results of a command.
        links: links to folders, which are not followed.
    """

    paths: tuple[Path, ...]
    places: tuple[str, ...]
    missing: tuple[str, ...] = ()
    masks: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()

    def notes(self) -> list[str]:
        """Returns a sentence for each reason why files or folders were left out."""
        reasons = (
            (self.masks, "file", "named like masks of the others", "name such files by a pattern to take them"),
            (self.results, "folder", "with a run or results of a command", "name such a folder itself to take it"),
            (self.links, "folder", "behind links", "name such a folder itself to take it"),
        )
        return [
            f"{counted(len(paths), noun)} {which} left out, such as {readable(str(paths[0]))}; {fix}"
            for paths, noun, which, fix in reasons
            if paths
        ]


def find_inputs(inputs: Iterable[str], output: Path) -> Inputs:
    """Finds the image files behind files, folders (with their subfolders) and globs.

    A named file is taken whatever its suffix. From a folder, files with the suffix of an image format are taken. Files
    in the output folder are left out, unless the named input lies in one of its subfolders. Files of a folder that look
    like masks of its other files are left out too, and so are subfolders that are links, or hold a run or results of a
    command.

    Raises:
        ValueError: there is no image at all.
    """
    search = _Search(os.path.realpath(output))
    found: dict[str, str] = {}
    missing, names = [], list(inputs)
    for given in names:
        before = len(search.unlisted)
        matches = search.matches(given)
        for path, place in matches:
            found.setdefault(path, place)
        if not matches and len(search.unlisted) == before:
            missing.append(f"{given}: {search.reason(given)}")
    taken = {*found, *(str(_absolute(given)) for given in names)}
    masks, results, links = (
        tuple(map(Path, sorted({*paths} - taken))) for paths in (search.masks, search.results, search.links)
    )
    images = Inputs(tuple(map(Path, found)), tuple(found.values()), (*missing, *search.unlisted), masks, results, links)
    if not found:
        notes = "".join(f" {note}." for note in images.notes())
        raise ValueError(f"inputs are {', '.join(names)}, but there is no image outside of {output}.{notes}")
    return images


class _Search:
    """Looks for images; resolves only the paths of named folders and of links."""

    def __init__(self, output: str) -> None:
        self.output = output  # resolved
        self.masks: list[str] = []
        self.results: list[str] = []
        self.links: list[str] = []
        self.unlisted: list[str] = []
        self.real = lru_cache(maxsize=None)(os.path.realpath)
        self.holds_results = lru_cache(maxsize=None)(_holds_results)

    def matches(self, given: str) -> list[tuple[str, str]]:
        """Returns the absolute paths of the images behind one input, with their places."""
        path = str(_absolute(given))
        if ".." in Path(given).parts and os.path.exists(path):
            path = os.path.realpath(path)  # so that a file is recognised if it is also named in another way
        if os.path.isdir(path):
            return [(file, _place(file, path)) for file in self.folder(path)]
        if os.path.exists(path):
            root, matches = os.path.dirname(path), [path]
        else:
            wildcard = WILDCARD.search(path)
            root = os.path.dirname(path[: wildcard.start()] if wildcard else path)
            matches = sorted(glob.glob(path, recursive=True))
        found = []
        for match in matches:
            is_folder = os.path.isdir(match)
            folder = match.rstrip(os.sep) if is_folder else os.path.dirname(match)
            if self.is_result(self.real(folder), self.real(folder if is_folder else root)):
                continue
            if not self.is_in_results(folder, root):
                files = self.folder(folder) if is_folder else [match]
                found += [(file, _place(file, root)) for file in files]
        return found

    def reason(self, given: str) -> str:
        """Returns why there is no image behind one input."""
        path = str(_absolute(given))
        wildcard = None if os.path.exists(path) else WILDCARD.search(path)
        folder = path if os.path.isdir(path) else os.path.dirname(path[: wildcard.start()] if wildcard else path)
        if (wildcard or os.path.exists(path)) and os.path.realpath(folder) == self.output:
            return "it lies in the output folder, whose files are results; choose another output"
        return "there is no such file, and no image in it"

    def is_in_results(self, folder: str, root: str) -> bool:
        """Returns whether a folder, or one between it and `root`, holds results, and records that folder."""
        while len(folder) > len(root):
            if self.holds_results(folder):
                self.results.append(folder)
                return True
            folder = os.path.dirname(folder)
        return False

    def folder(self, folder: str) -> list[str]:
        """Returns the images of a folder and its subfolders, sorted; those that look like masks go to `masks`."""
        real = self.real(folder)
        files = list(self.below(folder, real, real))
        masks = set(masks_among(folder, files))
        self.masks += [file for file in files if file in masks]
        return [file for file in files if file not in masks] if masks else files

    def below(self, folder: str, real: str, root: str) -> Iterator[str]:
        """Yields the images of a folder, whose resolved path is `real`, below the resolved `root` that was named."""
        if self.is_result(real, root):
            return
        if real != root and self.holds_results(folder):
            self.results.append(folder)
            return
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            self.unlisted.append(readable(f"{folder} cannot be listed: {error.strerror}; make it readable"))
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self.below(entry.path, os.path.join(real, entry.name), root)
            elif entry.is_symlink() and entry.is_dir():
                self.links.append(entry.path)
            elif _is_image(entry) and not (
                entry.is_symlink() and self.is_result(os.path.dirname(os.path.realpath(entry.path)), root)
            ):
                yield entry.path

    def is_result(self, folder: str, root: str) -> bool:
        """Returns whether a folder is the output or lies in it, unless the named root lies deeper in it."""
        return folder == self.output or (_lies_in(folder, self.output) and not _lies_in(root, self.output))


def _absolute(given: str) -> Path:
    return Path(given).expanduser().absolute()


def _holds_results(folder: str) -> bool:
    """Returns whether a folder holds the record of a command, or a run."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in RECORDS) or is_run(Path(folder))


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def _lies_in(folder: str, other: str) -> bool:
    return folder.startswith(other.rstrip(os.sep) + os.sep)


def _place(file: str, root: str) -> str:
    """Returns the part of a path below a folder; `..` is removed from the matches of a pattern."""
    parts = file[len(root) :].split(os.sep)
    return "/".join(part for part in parts if part not in ("", ".", ".."))
