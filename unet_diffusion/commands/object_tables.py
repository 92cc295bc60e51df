"""Tables of objects: one for each image, and those of all images, which are made from these."""

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from unet_diffusion.commands.record import Result
from unet_diffusion.files import readable
from unet_diffusion.segmentation.measurements import table_as_csv

LABELS, OBJECTS = "-objects.tif", "-objects.csv"  # the endings of the label image and the table of an image
TEXT = ("file", "class_name")
WHOLE = ("object", "class", "area", "top", "left", "bottom", "right")


def encoded_objects(table: Any) -> bytes:
    """Returns the content of the CSV file of the objects of one image, given as a DataFrame."""
    return table_as_csv(table.drop(columns="image"))


def joined_objects(folder: Path, results: Sequence[Result]) -> dict[str, bytes]:
    """Returns the contents of `objects.csv`, `objects.parquet` and `counts.csv` by name; empty if there is no result.

    Args:
        folder: the folder of the outputs.
        results: the results of images with a table of objects.
    """
    if not results:
        return {}
    frames = []
    for result in results:
        path = folder / (result.image + OBJECTS)
        frame = pandas.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False)
        frame.insert(0, "file", readable(result.source))
        frames.append(frame.astype({name: float for name in frame if name not in (*TEXT, *WHOLE)}))
    objects = pandas.concat(frames, ignore_index=True)
    objects = objects.astype(dict.fromkeys(TEXT, str) | dict.fromkeys(WHOLE, "int64"))
    parquet = io.BytesIO()
    objects.to_parquet(parquet, index=False)
    counts = _counts(results, frames)
    return {"objects.csv": table_as_csv(objects), "objects.parquet": parquet.getvalue(), "counts.csv": counts}


def _counts(results: Sequence[Result], frames: Sequence[Any]) -> bytes:
    """Returns the numbers of objects and their pixels, by image and class; rows of areas name the classes."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(("file", "class", "class_name", "objects", "area"))
    for result, frame in zip(results, frames):
        for label, (name, *_) in itertools.islice(enumerate(result.rows), 1, None):
            areas = frame["area"][frame["class"] == label]
            lines.writerow((readable(result.source), label, name, len(areas), int(areas.sum())))
    return text.getvalue().encode()
