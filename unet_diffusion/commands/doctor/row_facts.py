"""The facts that the doctor gathers about every row of a data set, before it judges them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from unet_diffusion.data.cache import each_row, source_key, written_once
from unet_diffusion.data.masked.cache import is_missing
from unet_diffusion.data.sources import image_reader
from unet_diffusion.images.decoding import Decoded, decode
from unet_diffusion.images.masks import (
    QUARTER_TURNED,
    Colour,
    decode_instances,
    decode_mask,
    fit_orientation,
    instance_numbers,
)

FORMAT = 1  # of the stored facts


@dataclass
class RowFacts:
    """Facts about one row of the source, before resizing."""

    name: str  # for messages: the number of the row and its file
    image_problem: str | None = None  # why the image cannot be used; its other fields are then empty
    mask_problem: str | None = None  # why the mask or the instance map cannot be used
    no_mask: bool = False  # the row should have a mask
    size: tuple[int, int] = (0, 0)  # width and height of the upright image
    channels: int = 0
    dtype: str = ""
    low: float = 0.0  # smallest value of the image
    high: float = 0.0  # largest value of the image
    levels: int = 0  # different values in the image
    digest: str = ""  # hash of the image's pixels and shape
    mask_size: tuple[int, int] = (0, 0)  # width and height; zeros without a mask
    keys: list[tuple[int, int]] = field(default_factory=list)  # each key of the mask and its number of pixels
    palette: list[tuple[int, Colour]] = field(default_factory=list)  # each index of the mask and its colour
    mask_digest: str = ""  # hash of the mask's keys
    may_be_turned: bool = (
        False  # only the image states an orientation, and the sizes do not show which one the mask has
    )

    def __post_init__(self) -> None:
        """Restores the tuples that JSON turned into lists."""
        self.size, self.mask_size = (self.size[0], self.size[1]), (self.mask_size[0], self.mask_size[1])
        self.keys = [(key, count) for key, count in self.keys]
        self.palette = [(key, (red, green, blue)) for key, (red, green, blue) in self.palette]


def gather_facts(dataset: datasets.Dataset, encoding: str | None, cache_dir: str | Path | None) -> list[RowFacts]:
    """Gathers the facts about all rows, or reads those that an earlier call gathered.

    Without an encoding, there are no masks.
    """
    reading = encoding if encoding in ("palette", "instances", None) else "values"

    def write(folder: Path) -> None:
        facts = []
        for row, found in enumerate(each_row(dataset, _examiner(dataset, reading))):
            assert isinstance(found, RowFacts)
            found.name = f"row {row}{f' ({found.name})' if found.name else ''}"
            facts.append(asdict(found))
        (folder / "facts.json").write_text(json.dumps(facts))

    key = ["doctor", FORMAT, source_key(dataset), reading]
    text = (written_once("facts", key, cache_dir, write) / "facts.json").read_text()
    return [RowFacts(**fields) for fields in json.loads(text)]


def _examiner(dataset: datasets.Dataset, reading: str | None) -> Callable[[dict[str, Any]], RowFacts]:
    readers = {column: image_reader(dataset, column) for column in dataset.features if column not in ("label", "group")}

    def examine(row: dict[str, Any]) -> RowFacts:
        path = row["image"].get("path") if isinstance(row["image"], dict) else None
        facts = RowFacts(name=Path(path).name if path else "")
        image = None
        try:
            image = decode(readers["image"](row["image"]))
            _note_image(facts, image.pixels)
        except ValueError as error:
            facts.image_problem = str(error)
        if reading is not None:
            of_masks = {column: read for column, read in readers.items() if column != "image"}
            facts.no_mask = any(is_missing(row[column]) for column in of_masks)
            if not facts.no_mask:
                try:
                    sources = {column: read(row[column]) for column, read in of_masks.items()}
                    _note_mask(facts, sources, image, reading)
                except ValueError as error:
                    facts.mask_problem = str(error)
        return facts

    return examine


def _note_image(facts: RowFacts, image: np.ndarray) -> None:
    facts.size, facts.channels, facts.dtype = (image.shape[1], image.shape[0]), image.shape[2], image.dtype.name
    facts.low, facts.high = float(image.min()), float(image.max())
    facts.levels = len(np.unique(image))
    facts.digest = hash_array(image)


def _note_mask(facts: RowFacts, sources: Mapping[str, Any], image: Decoded | None, reading: str) -> None:
    mask = decode_mask(sources["mask"], colours=reading == "palette")
    keys = (instance_numbers(mask) > 0).astype(np.int64) if reading == "instances" else mask.keys
    if reading != "instances":
        facts.palette = list(mask.palette.items())
    if image is not None:
        height, width = keys.shape
        keys = fit_orientation(keys, image.pixels.shape[:2], image.orientation)
        known = image.orientation in QUARTER_TURNED and height != width  # from the sizes
        facts.may_be_turned = image.orientation != 1 and not known and mask.orientation == 1
    values, counts = np.unique(keys, return_counts=True)
    facts.keys = list(zip(values.tolist(), counts.tolist()))
    facts.mask_size = (keys.shape[1], keys.shape[0])
    facts.mask_digest = hash_array(keys)
    if "instances" in sources:
        instances = decode_instances(sources["instances"])
        if image is not None:
            shape = fit_orientation(instances, image.pixels.shape[:2], image.orientation).shape
            if shape != image.pixels.shape[:2]:
                raise ValueError(
                    f"its instance map has {shape[1]}x{shape[0]} pixels, but the image has "
                    f"{facts.size[0]}x{facts.size[1]}."
                )


def hash_array(values: np.ndarray) -> str:
    """Returns a hash of an array's shape, dtype and values."""
    content = hashlib.blake2b(repr((values.shape, values.dtype.name)).encode(), digest_size=16)
    content.update(np.ascontiguousarray(values).data)
    return content.hexdigest()
