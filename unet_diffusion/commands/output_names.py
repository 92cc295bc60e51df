"""Names of the outputs of many inputs: they follow the folder tree of the inputs, and no two are the same."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

DIGITS = 12  # of a digest


def output_names(paths: Sequence[Path], places: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Returns a name for each input; each of the endings, such as ".png" and "-overlay.png", is added to it.

    The name is the place of the input without its suffix. Inputs that would share an output all keep their suffix
    (`cell.tif.png` beside `cell.png.png`). If they still share an output, they get a digest of their path, so that a
    name never depends on a number or on the order of the inputs. Names that differ only in case count as equal, since
    they are equal on some file systems. This takes linear time.

    Args:
        paths: the inputs, absolute.
        places: the place of each input in the tree, with slashes.
        endings: the endings of all outputs that an input may have.
    """
    levels = [0] * len(places)
    names = [without_suffix(place) for place in places]
    folders = {_folded(folder) for folder in _folders(places)}
    outputs = [[_folded(name + ending) for ending in endings] for name in names]
    while True:
        claims = Counter(output for each in outputs for output in each)
        claims.update(folders)
        contested = [i for i, each in enumerate(outputs) if any(claims[output] > 1 for output in each)]
        if not contested:
            return names
        raised = [i for i in contested if levels[i] < 2]
        if not raised:
            i = contested[0]
            raise ValueError(f"{paths[i]} has no name of its own for its outputs; rename it.")
        for i in raised:
            levels[i] += 1
            names[i] = places[i] if levels[i] == 1 else f"{places[i]}-{_digest(paths[i])}"
            outputs[i] = [_folded(names[i] + ending) for ending in endings]


def without_suffix(place: str) -> str:
    """Returns a place without the suffix of its file, as `Path.stem` leaves it out."""
    folder, slash, name = place.rpartition("/")
    dot = name.rfind(".")
    return folder + slash + (name[:dot] if 0 < dot < len(name) - 1 else name)


def _folders(places: Sequence[str]) -> set[str]:
    """Returns all folders above the places."""
    found: set[str] = set()
    for folder in {place.rpartition("/")[0] for place in places}:
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found


def _folded(name: str) -> str:
    """Returns a name in the form that file systems compare if they ignore case and forms of accents."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name.casefold())


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:DIGITS]
