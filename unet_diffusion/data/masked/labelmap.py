"""Files beside masks that name the classes: labelmap.txt of CVAT, class_dict.csv, or _classes.csv of Roboflow."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.files import readable
from unet_diffusion.images.masks import Colour, colour_key

FILE = "labelmap.txt"
COLOUR_TABLE = "class_dict.csv"  # of CamVid and other sets, with the columns name, r, g and b
COLOUR_COLUMNS = (["r", "g", "b"], ["red", "green", "blue"])
CLASS_LIST = "_classes.csv"  # of Roboflow, with the columns Pixel Value and Class
BACKGROUND = "background"
BLACK: Colour = (0, 0, 0)
LINE = re.compile(r"(?P<name>.+?)\s*:\s*(?P<red>\d+)\s*,\s*(?P<green>\d+)\s*,\s*(?P<blue>\d+)\s*(:[^:]*){0,2}")


@dataclass(frozen=True)
class LabelMap:
    """The labels of a file, in its order."""

    path: Path
    labels: tuple[tuple[str, Colour], ...]

    def classes(self, black_occurs: bool, class_names: Sequence[str] | None) -> tuple[tuple[str, Colour], ...]:
        """Returns name and colour of each class, in the order of their indices.

        They are in the order of `class_names`, or else in that of the file with the background first. The background is
        black, or else the class named background. If the file has neither, but black occurs in the masks, black is
        class 0.

        Raises:
            ValueError: `class_names` are not the names of the file.
        """
        labels = self.labels
        grounds = [label for label in labels if label[1] == BLACK] or [
            label for label in labels if label[0].lower() == BACKGROUND
        ]
        if black_occurs and not grounds:
            grounds = [(BACKGROUND, BLACK)]
        labels = (*grounds[:1], *(label for label in labels if label not in grounds[:1]))
        if class_names is None:
            return labels
        names = [name for name, _ in labels]
        if sorted(names) != sorted(class_names):
            raise ValueError(
                f"class_names are {', '.join(class_names)}, but {readable(str(self.path))} names {', '.join(names)}; "
                "give the same names, in the order of the classes that you want, or leave class_names out."
            )
        colours = dict(labels)
        return tuple((name, colours[name]) for name in class_names)

    def fits(self, seen: SeenMasks) -> bool:
        """Returns whether the masks are in colours of the file, or in black and a grey of it."""
        keys = {colour_key(colour) for _, colour in self.labels} | {colour_key(BLACK)}
        return seen.coloured or (set(seen.keys) <= keys and len(seen.keys) > 1)


def find_labelmap(data: str, masks: str | None, split: str = "train") -> LabelMap | None:
    """Reads labelmap.txt or class_dict.csv from the folder of the masks, of the images, or one of their parents.

    A table whose columns are not name, red, green and blue is ignored (`find_other_table`).

    Raises:
        ValueError: the file cannot be read, or has a line without a name and a colour, or two lines with the same.
    """
    for home in _homes(data, masks, split):
        if (home / FILE).is_file():
            return read_labelmap(home / FILE)
        if (home / COLOUR_TABLE).is_file() and _has_colours(home / COLOUR_TABLE):
            return read_labelmap(home / COLOUR_TABLE)
    return None


def find_other_table(data: str, masks: str | None, split: str = "train") -> Path | None:
    """Returns a class_dict.csv that `find_labelmap` ignores because of its columns, or None."""
    tables = [home / COLOUR_TABLE for home in _homes(data, masks, split)]
    return next((table for table in tables if table.is_file() and not _has_colours(table)), None)


def find_class_list(data: str, masks: str | None, split: str = "train") -> tuple[Path, tuple[str, ...]] | None:
    """Reads the names of class indices from a _classes.csv in one of the folders that `find_labelmap` searches.

    Returns:
        The file and the names, in the order of the indices; None if there is no such file, or it does not list classes
        from 0 up.
    """
    for home in _homes(data, masks, split):
        if (home / CLASS_LIST).is_file():
            _, *rows = _table(home / CLASS_LIST)
            numbered = {row[0]: row[1] for row in rows if len(row) == 2}
            names = tuple(numbered.get(str(label), "") for label in range(len(rows)))
            return (home / CLASS_LIST, names) if all(names) and len(set(names)) == len(names) >= 2 else None
    return None


def _homes(data: str, masks: str | None, split: str) -> list[Path]:
    folders = [Path(source).expanduser() for source in (masks, data) if source is not None and "://" not in source]
    folders = [folder for folder in folders if folder.is_dir()]
    return [*folders, *(folder / split for folder in folders), *(folder.resolve().parent for folder in folders)]


def _table(path: Path) -> list[list[str]]:
    """Returns the rows of a file, its header first, without spaces around the cells and without empty rows.

    Columns are separated by commas, semicolons or tabs.
    """
    lines = _lines(path)
    header = next((line for line in lines if line.strip()), "")
    rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=max(",;\t", key=header.count))]
    return [row for row in rows if any(row)] or [[]]


def _has_colours(path: Path) -> bool:
    header = [cell.lower() for cell in _table(path)[0]]
    return len(header) == 4 and header[1:] in COLOUR_COLUMNS


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{readable(str(path))} cannot be read: {error}; repair or remove it.") from error


def read_labelmap(path: Path) -> LabelMap:
    """Reads lines such as "cat:128,0,0::", or a table, without empty lines; in a labelmap.txt, # begins a comment.

    Raises:
        ValueError: the file is not text, is empty, or has a line without a name and a colour, or two lines with the
            same.
    """
    lines, form = _lines(path), "name:red,green,blue:: as in 'cat:128,0,0::'"
    if path.name == COLOUR_TABLE:
        lines = ["", *(f"{row[0]}:{','.join(row[1:])}" for row in _table(path)[1:])]
        form = "name,red,green,blue as in 'cat,128,0,0'"
    labels: dict[str, Colour] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or (path.name == FILE and line.startswith("#")):
            continue
        match = LINE.fullmatch(line)
        place = f"line {number} of {readable(str(path))} is {line!r}, but"
        if match is None:
            raise ValueError(
                f"{place} must be {form}; repair or remove the file, or give mask_encoding or mask_colours."
            )
        name, (red, green, blue) = match["name"], (int(match[channel]) for channel in ("red", "green", "blue"))
        if max(red, green, blue) > 255:
            raise ValueError(f"{place} red, green and blue must be from 0 to 255; repair it.")
        if name in labels or (red, green, blue) in labels.values():
            what = "name" if name in labels else "colour"
            raise ValueError(f"{place} its {what} stands in a line before; give each class a {what} of its own.")
        labels[name] = (red, green, blue)
    if not labels:
        raise ValueError(f"{readable(str(path))} names no class; add lines {form}, or remove it.")
    return LabelMap(path, tuple(labels.items()))
