"""The file labelmap.txt that CVAT writes beside colour masks: the name and the colour of each class."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.files import readable
from unet_diffusion.images.masks import Colour, colour_key

FILE = "labelmap.txt"
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

        They are in the order of `class_names`, or else in that of the file, with the background first: black, or else
        what is called background. If the file has neither, but black occurs in the masks, it is class 0.

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
        """Returns whether masks are in colours, or in black and a grey, of the file."""
        keys = {colour_key(colour) for _, colour in self.labels} | {colour_key(BLACK)}
        return seen.coloured or (set(seen.keys) <= keys and len(seen.keys) > 1)


def find_labelmap(data: str, masks: str | None) -> LabelMap | None:
    """Reads labelmap.txt from the folder of the masks, that of the images, or one of their parents, in this order.

    Raises:
        ValueError: it cannot be read, or has a line without a name and a colour, or two lines with the same.
    """
    folders = [Path(source).expanduser() for source in (masks, data) if source is not None and "://" not in source]
    homes = [folder for folder in folders if folder.is_dir()]
    for home in [*homes, *(home.resolve().parent for home in homes)]:
        if (home / FILE).is_file():
            return read_labelmap(home / FILE)
    return None


def read_labelmap(path: Path) -> LabelMap:
    """Reads a file with lines such as "cat:128,0,0::"; empty lines and those that begin with # are left out.

    Raises:
        ValueError: it is not text, is empty, or has a line without a name and a colour, or two lines with the same.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{readable(str(path))} cannot be read: {error}; repair or remove it.") from error
    labels: dict[str, Colour] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        place = f"line {number} of {readable(str(path))} is {line!r}, but"
        if match is None:
            raise ValueError(
                f"{place} must be name:red,green,blue:: as in 'cat:128,0,0::'; repair or remove "
                "the file, or give mask_encoding or mask_colours."
            )
        name, (red, green, blue) = match["name"], (int(match[channel]) for channel in ("red", "green", "blue"))
        if max(red, green, blue) > 255:
            raise ValueError(f"{place} red, green and blue must be from 0 to 255; repair it.")
        if name in labels or (red, green, blue) in labels.values():
            what = "name" if name in labels else "colour"
            raise ValueError(f"{place} its {what} stands in a line before; give each class a {what} of its own.")
        labels[name] = (red, green, blue)
    if not labels:
        raise ValueError(f"{readable(str(path))} names no class; add lines such as 'cat:128,0,0::', or remove it.")
    return LabelMap(path, tuple(labels.items()))
