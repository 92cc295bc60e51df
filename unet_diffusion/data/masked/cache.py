"""Images and their masks, which are decoded once and kept in memory-mapped files."""

import json
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from unet_diffusion.data.cache import (
    ImageCache,
    ImageWriter,
    PixelFile,
    as_array,
    content_digest,
    each_row,
    opened,
    report_broken,
    source_key,
    written_once,
)
from unet_diffusion.data.columns import image_reader
from unet_diffusion.data.masked.config import Reading
from unet_diffusion.data.masked.parts import is_missing
from unet_diffusion.data.masked.reading import read_labels
from unet_diffusion.data.masked.seen import SeenMasks
from unet_diffusion.images.decoding import Decoded, decode
from unet_diffusion.images.masks import Colour, DecodedMask, describe_keys
from unet_diffusion.images.resizing import Preparation

logger = logging.getLogger(__name__)

FORMAT = 8  # of the files below; after a change, old caches are not read
MOST_KEYS = 256  # different keys in a set, so that masks take one byte per pixel
MOST_EXACT_KEYS = 128  # of brightness above 8 bits; further keys are rounded down to a multiple of the step
STEP = 1024  # divides half of the 16-bit range, at which binary masks are split


@dataclass(frozen=True)
class Example:
    """One row, decoded and prepared."""

    image: np.ndarray  # (H, W, C)
    mask: DecodedMask  # its keys in the smallest unsigned type that holds them
    instances: np.ndarray | None  # uint16 (H, W)
    objects: bool  # the values of the mask look like numbers of objects
    numbered: tuple[int, int] = (0, 0)  # objects in the instance map, and those of them in several separate pieces
    digest: bytes = b""  # of the image as decoded
    mask_digest: bytes = b""  # of the mask, and of the instance map if there is one, as decoded


class MaskedCache:
    """The usable images of a source with their masks.

    Args:
        folder: written by `cache_masked`. It holds the files of an `ImageCache`; `codes.bin`, uint8, with the position
            of each pixel's key in `keys`; `counts.npy` (N, len(keys)), `rows.npy` (N,), `mask_digests.npy` (N, 16) and
            `masks.json`; and with instances `instances.bin`, uint16.
    """

    def __init__(self, folder: Path) -> None:
        info = json.loads((folder / "masks.json").read_text())
        self.folder = folder
        self.images = ImageCache(folder)
        self.fingerprint = self.images.fingerprint
        self.keys: list[int] = info["keys"]
        self.palette: dict[int, Colour] = {int(key): tuple(value) for key, value in info["palette"].items()}
        self.sizes = self.images.sizes  # int64 (N, 2): height and width
        self.counts = np.load(folder / "counts.npy")  # int64 (N, len(keys)): pixels of each key
        self.rows = np.load(folder / "rows.npy")  # int64 (N,): rows of the source
        self.lossy: list[str] = info["lossy"]  # of each mask, its file's format if that changes values, or else ""
        self.objects: list[bool] = info["objects"]  # of each mask, whether its values look like numbers of objects
        self.mask_digests = np.load(folder / "mask_digests.npy")  # uint8 (N, 16): hash of each mask as decoded
        self.has_instances: bool = info["has_instances"]
        self.numbered: list[tuple[int, int]] = info["numbered"]  # as in `Example`
        self.codes = PixelFile(folder / "codes.bin", "uint8", self.sizes)  # positions in `keys`
        if self.has_instances:
            self.instances = PixelFile(folder / "instances.bin", "uint16", self.sizes)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> Any:
        return MaskedCache, (self.folder,)

    @property
    def seen(self) -> SeenMasks:
        """Returns the values of all masks."""
        counts = [{self.keys[place]: int(row[place]) for place in np.flatnonzero(row)} for row in self.counts]
        return SeenMasks(counts, self.palette, self.lossy, self.objects)


def example_reader(
    dataset: datasets.Dataset, preparation: Preparation, reading: Reading
) -> Callable[[dict[str, Any]], Example]:
    """Returns a function from a row of a source to an `Example`, which raises a ValueError for an unusable row."""
    axes = preparation.axes
    readers = {column: image_reader(dataset, column) for column in dataset.features if column != "group"}
    of_masks = [column for column in readers if column in ("mask", "instances")]

    def read(row: dict[str, Any]) -> Example:
        image = decode(readers["image"](row["image"]), axes=axes)
        labels = read_labels({column: _present(row, column, readers) for column in of_masks}, image, reading, axes)
        for values, name in ((labels.mask.keys, "mask"), (labels.instances, "instance map")):
            _check_size(values, image, name)
        return Example(
            preparation(image),
            replace(labels.mask, keys=_narrow(preparation.labels(labels.mask.keys))),
            None if labels.instances is None else preparation.labels(labels.instances),
            labels.objects,
            (labels.numbered, labels.split),
            content_digest(image.pixels),
            content_digest(labels.mask.keys, *([] if labels.instances is None else [labels.instances])),
        )

    return read


def cache_masked(
    dataset: datasets.Dataset,
    preparation: Preparation,
    name: str,
    *,
    reading: Reading = "values",
    threshold: float | None = None,
    max_broken: float = 0.0,
    cache_dir: str | Path | None = None,
) -> MaskedCache:
    """Decodes and prepares all images and masks of a source, or opens the cache that an earlier call wrote.

    The meaning of the masks' values is decided later, so another encoding needs no new decoding, unless it reads files
    in another way. Brightness of 16 bits may be rounded down, but not below `threshold`.

    Raises:
        ValueError: more than a share `max_broken` of the rows cannot be used, or no row can.
    """
    key = ["masked", FORMAT, source_key(dataset), preparation.to_dict(), reading, threshold]

    def write(folder: Path) -> None:
        _write(dataset, preparation, name, max_broken, reading, threshold, folder)

    cache = opened(MaskedCache, written_once("masked", key, cache_dir, write))
    report_broken(cache.images, name, max_broken)
    return cache


class KeyTable:
    """The keys that occur in a set, in the order of their first occurrence.

    Args:
        rounds: whether keys above 8 bits are rounded down if there are many, as for the brightness of binary masks.
        threshold: keys from this value on are not rounded to values below it.
    """

    def __init__(self, rounds: bool = False, threshold: float | None = None) -> None:
        self.rounds, self.threshold = rounds, threshold
        self.positions: dict[int, int] = {}  # the position of each key in that order
        self.palette: dict[int, Colour] = {}  # colours of keys that palette files state

    def encode(self, mask: DecodedMask) -> tuple[np.ndarray, dict[int, int]]:
        """Returns the positions of the keys of a mask, uint8 (H, W), and the number of pixels of each key.

        Raises:
            ValueError: the set would have too many keys, or indices of two palettes.
        """
        keys, inverse, counts = np.unique(self._rounded(mask.keys), return_inverse=True, return_counts=True)
        new = [key for key in keys.tolist() if key not in self.positions]
        if len(self.positions) + len(new) > MOST_KEYS:
            raise ValueError(
                f"its mask adds the values {describe_keys(new)}, so that the masks have "
                f"{len(self.positions) + len(new)} different ones, but at most {MOST_KEYS - 1} classes are possible; "
                "give mask_encoding='instances' if each value is one object, or 'binary' to split two classes at half, "
                "with values in between as soft edges or JPEG leave them."
            )
        for key, value in mask.palette.items():
            if self.palette.get(key, value) != value:
                raise ValueError(
                    f"index {key} of its mask has the colour {value} in its palette and {self.palette[key]} in those "
                    "before, so that indices mean different classes; give mask_encoding='palette' to read colours."
                )
        self.palette.update(mask.palette)
        for key in new:
            self.positions[key] = len(self.positions)
        positions = np.array([self.positions[key] for key in keys.tolist()], dtype=np.uint8)
        return positions[inverse].reshape(mask.keys.shape), dict(zip(keys.tolist(), counts.tolist()))

    def _rounded(self, keys: np.ndarray) -> np.ndarray:
        """Returns the keys; if there would be too many, those above 8 bits are rounded down."""
        if not self.rounds or keys.max() < MOST_KEYS:
            return keys
        known = set(self.positions)
        if len(known.union(np.unique(keys).tolist())) <= MOST_EXACT_KEYS:
            return keys
        keys = keys.astype(np.int64)
        rounded = keys // STEP * STEP
        if self.threshold is not None:
            rounded = np.where(keys >= self.threshold, np.maximum(rounded, math.ceil(self.threshold)), rounded)
        return np.where(np.isin(keys, [*known]), keys, rounded)


def _narrow(keys: np.ndarray) -> np.ndarray:
    """Returns keys in the smallest unsigned type that holds them, since several masks wait in memory to be written."""
    return keys.astype(np.min_scalar_type(keys.max()))


def _present(row: dict[str, Any], column: str, readers: dict[str, Callable[[Any], Any]]) -> Any:
    if is_missing(row[column]):
        raise ValueError(f"it has no {'instance map' if column == 'instances' else 'mask'}.")
    return readers[column](row[column])


def _check_size(labels: np.ndarray | None, image: Decoded, name: str) -> None:
    """Raises a ValueError if a mask has another size than its image."""
    height, width = image.pixels.shape[:2]
    if labels is not None and labels.shape != (height, width):
        raise ValueError(
            f"its {name} has {labels.shape[1]}x{labels.shape[0]} pixels, but the image has {width}x{height}; both must "
            "have one size."
        )


def _write(
    dataset: datasets.Dataset,
    preparation: Preparation,
    name: str,
    max_broken: float,
    reading: Reading,
    threshold: float | None,
    folder: Path,
) -> None:
    table = KeyTable(reading == "brightness", threshold)
    rows: list[int] = []
    counted: list[dict[int, int]] = []
    lossy: list[str] = []
    objects: list[bool] = []
    numbered: list[tuple[int, int]] = []
    overlapping = 0
    mask_digests: list[bytes] = []
    groups = dataset["group"] if "group" in dataset.features else None
    has_instances = reading == "instances" or "instances" in dataset.features
    with ExitStack() as stack:
        writer = stack.enter_context(ImageWriter(folder))
        names = ["codes", "instances"] if has_instances else ["codes"]
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        for row, example in enumerate(each_row(dataset, example_reader(dataset, preparation, reading))):
            try:
                if isinstance(example, ValueError):
                    raise example
                writer.check(example.image)
                codes, counts = table.encode(example.mask)
            except ValueError as problem:
                writer.leave_out(row, problem)
                continue
            writer.append(example.image, example.digest, group=None if groups is None else groups[row])
            mask_digests.append(example.mask_digest)
            overlapping += example.mask.overlap > 0
            files["codes"].write(codes.data)
            if example.instances is not None:
                files["instances"].write(np.ascontiguousarray(example.instances).data)
            rows.append(row)
            counted.append(counts)
            lossy.append(example.mask.format if example.mask.lossy else "")
            objects.append(example.objects)
            numbered.append(example.numbered)
        writer.finish(name, max_broken)
    if overlapping:
        logger.warning(
            "objects overlap in %d masks of %s; of two objects, the later one keeps the pixels", overlapping, name
        )
    keys = list(table.positions)
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "mask_digests.npy", as_array(mask_digests))
    np.save(folder / "counts.npy", np.array([[counts.get(key, 0) for key in keys] for counts in counted]))
    info = {
        "keys": keys,
        "palette": table.palette,
        "lossy": lossy,
        "objects": objects,
        "has_instances": has_instances,
        "numbered": numbered,
    }
    (folder / "masks.json").write_text(json.dumps(info, indent=2) + "\n")
