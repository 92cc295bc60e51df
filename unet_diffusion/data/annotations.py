"""Annotations that are not images: polygons, outlines and boxes. They are recognised so that an error can name them."""

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

HEAD = 1 << 20  # characters of a file that are read
HOW_TO = (
    "Draw them into mask files first, as docs/segmentation.md shows under 'Polygons to masks', and give their folder."
)
IMAGEJ = "outlines of ImageJ"
FROM_IMAGEJ = "Make a mask of them there, by Edit > Selection > Create Mask, and give the folder of the masks."
CELLPOSE = (
    "it is the pickled file of Cellpose's window, which is not opened, since pickles can run code. Save the masks from "
    "that window by File > Save masks as PNG/TIFF, and give those"
)
JSON_KINDS: tuple[tuple[set[str], str], ...] = (  # keys, and what a file with all of them holds
    ({"shapes", "imagePath"}, "polygons of labelme"),
    ({"shapes", "points"}, "polygons of labelme"),
    ({"imageData", "imageHeight"}, "polygons of labelme"),
    ({"image_id", "category_id"}, "polygons or boxes of COCO"),
    ({"images", "file_name"}, "polygons or boxes of COCO"),
    ({"features", "coordinates"}, "polygons of GeoJSON"),
    ({"regions", "shape_attributes"}, "polygons of the VGG annotator"),
    ({"exterior", "classTitle"}, "polygons of Supervisely"),
    ({"polygonlabels"}, "polygons of Label Studio"),
)
YOLO_LINE = re.compile(r"\s*\d+((?:\s+[\d.eE+-]+){4,})\s*")
BOX = 4  # numbers after the class in a line of a YOLO box


def annotation_kind(file: Path) -> str | None:
    """Returns the content of a file of annotations as words, such as "polygons of labelme"; None for other files."""
    ending = file.suffix.lower()
    if ending == ".roi" or (ending == ".zip" and _holds_outlines(file)):
        return IMAGEJ
    if ending not in (".json", ".geojson", ".txt", ".xml"):
        return None
    try:
        with open(file, encoding="utf-8", errors="replace") as opened:
            text = opened.read(HEAD)
    except OSError:
        return None
    if ending == ".txt":
        return _of_text(text)
    return _of_xml(text) if ending == ".xml" else _of_json(text)


def _holds_outlines(file: Path) -> bool:
    """Returns whether an archive was saved by the ROI manager of ImageJ."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            return names != [] and all(name.endswith(".roi") for name in names)
    except (OSError, zipfile.BadZipFile):
        return False


def _of_json(text: str) -> str | None:
    keys = set(re.findall(r'"(\w+)"\s*:', text))
    return next((kind for needed, kind in JSON_KINDS if needed <= keys), None)


def _of_text(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    matches = [YOLO_LINE.fullmatch(line) for line in lines[:100]]
    if not lines or not all(matches):
        return None
    counts = [len(match[1].split()) for match in matches if match]
    return "boxes of YOLO" if max(counts) == BOX else "polygons of YOLO"


def _of_xml(text: str) -> str | None:
    if "<annotation" not in text:
        return None
    return "polygons in XML" if "<polygon" in text else "boxes of Pascal VOC" if "<bndbox" in text else None


def find_annotation(folder: Path) -> tuple[Path, str] | None:
    """Returns the first file of annotations in a folder and its subfolders, and its content as words."""
    for file in _files(folder):
        kind = annotation_kind(file)
        if kind is not None:
            return file, kind
    return None


def _files(folder: Path) -> Iterator[Path]:
    for parent, names, found in os.walk(folder):
        names.sort()
        yield from (Path(parent, name) for name in sorted(found) if not name.startswith("."))


def refuse_annotations(place: Path) -> None:
    """Raises a ValueError if a file, or a file in a folder, holds annotations that are not images."""
    seen = find_annotation(place) if place.is_dir() else (place, annotation_kind(place))
    if seen is not None and seen[1] is not None:
        how_to = FROM_IMAGEJ if seen[1] == IMAGEJ else HOW_TO
        raise ValueError(f"{seen[0]} holds {seen[1]}, but masks must be images. {how_to}")


def is_cellpose_pickle(file: Path) -> bool:
    """Returns whether a file is a `_seg.npy` of Cellpose's window: a pickled object, not an array of numbers."""
    if not file.name.endswith("_seg.npy"):
        return False
    try:
        with open(file, "rb") as opened:
            return b"'|O'" in opened.read(128)
    except OSError:
        return False
