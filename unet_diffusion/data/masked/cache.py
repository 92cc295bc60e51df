"""Images and their masks, which are decoded once and kept in memory-mapped files."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
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
from unet_diffusion.data.sources import image_reader
from unet_diffusion.images.decoding import Decoded, decode
from unet_diffusion.images.masks import (
    Colour,
    DecodedMask,
    decode_instances,
    decode_mask,
    describe_keys,
    fit_orientation,
)
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.segmentation.instances import separate_instances

FORMAT = 2  # of the files below; after a change, old caches are not read
MOST_KEYS = 256  # different keys in a set, so that masks take one byte per pixel


@dataclass(frozen=True)
class Example:
    """One row, decoded and prepared."""

    image: np.ndarray  # (H, W, C)
    mask: DecodedMask
    instances: np.ndarray | None  # uint16 (H, W)
    digest: bytes = b""  # of the image as decoded
    mask_digest: bytes = b""  # of the mask, and of the instance map if there is one, as decoded


class MaskedCache:
    """The usable images of a source with their masks.

    Args:
        folder: written by `cache_masked`. It holds the files of an `ImageCache`; `codes.bin`, uint8, the position of
            each pixel's key in `keys`; `counts.npy` (N, len(keys)), `rows.npy` (N,), `mask_digests.npy` (N, 16) and
            `masks.json`; and with instances `instances.bin`, uint16, and `touching.bin`, uint8.
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
        self.mask_digests = np.load(folder / "mask_digests.npy")  # uint8 (N, 16): hash of each mask as decoded
        self.has_instances: bool = info["has_instances"]
        self.codes = PixelFile(folder / "codes.bin", "uint8", self.sizes)  # positions in `keys`
        if self.has_instances:
            self.instances = PixelFile(folder / "instances.bin", "uint16", self.sizes)
            self.touching = PixelFile(folder / "touching.bin", "uint8", self.sizes)  # 1 where two instances touch

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> Any:
        return MaskedCache, (self.folder,)


def example_reader(
    dataset: datasets.Dataset, preparation: Preparation, encoding: str
) -> Callable[[dict[str, Any]], Example]:
    """Returns a function from a row of a source to an `Example`, which raises a ValueError for an unusable row.

    The encoding "instances" reads the masks as instance maps, "palette" reads their colours.
    """
    readers = {column: image_reader(dataset, column) for column in dataset.features if column != "group"}

    def read(row: dict[str, Any]) -> Example:
        image = decode(readers["image"](row["image"]))
        instances = None
        if encoding == "instances":
            instances = _fitting(decode_instances(_present(row, "mask", readers)), image, "mask")
            mask = DecodedMask((instances > 0).astype(np.int64))
        else:
            decoded = decode_mask(_present(row, "mask", readers), colours=encoding == "palette")
            mask = DecodedMask(_fitting(decoded.keys, image, "mask"), decoded.palette)
            if "instances" in row:
                instances = _fitting(decode_instances(_present(row, "instances", readers)), image, "instance map")
        return Example(
            preparation(image.pixels),
            DecodedMask(preparation.labels(mask.keys), mask.palette),
            None if instances is None else preparation.labels(instances),
            content_digest(image.pixels),
            content_digest(mask.keys, *([] if instances is None else [instances])),
        )

    return read


def cache_masked(
    dataset: datasets.Dataset,
    preparation: Preparation,
    name: str,
    *,
    encoding: str = "auto",
    max_broken: float = 0.0,
    cache_dir: str | Path | None = None,
) -> MaskedCache:
    """Decodes and prepares all images and masks of a source, or opens what an earlier call wrote.

    The meaning of the masks' values is decided later, so that another encoding needs no new decoding, except for
    "palette" and "instances", which read files in another way.

    Raises:
        ValueError: a share of more than `max_broken` of the rows cannot be used, or none can.
    """
    reading = encoding if encoding in ("instances", "palette") else "values"
    key = ["masked", FORMAT, source_key(dataset), asdict(preparation), reading]
    folder = written_once("masked", key, cache_dir, lambda aside: _write(dataset, preparation, name, reading, aside))
    cache = opened(MaskedCache, folder)
    report_broken(cache.images, name, max_broken)
    return cache


class KeyTable:
    """The keys that occur in a set, in the order of their first occurrence."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}  # of each key in that order
        self.palette: dict[int, Colour] = {}  # colours of keys that palette files state

    def encode(self, mask: DecodedMask) -> tuple[np.ndarray, dict[int, int]]:
        """Returns the positions of the keys of a mask, uint8 (H, W), and the number of pixels of each key.

        Raises:
            ValueError: the set would have too many keys, or indices of two palettes.
        """
        keys, inverse, counts = np.unique(mask.keys, return_inverse=True, return_counts=True)
        new = [key for key in keys.tolist() if key not in self.positions]
        if len(self.positions) + len(new) > MOST_KEYS:
            raise ValueError(
                f"its mask adds the values {describe_keys(new)}, so that the masks have "
                f"{len(self.positions) + len(new)} different ones, but at most {MOST_KEYS - 1} classes are possible; "
                "for instance numbers give mask_encoding='instances'; save masks as PNG, not JPEG."
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


def _present(row: dict[str, Any], column: str, readers: dict[str, Callable[[Any], Any]]) -> Any:
    if is_missing(row[column]):
        raise ValueError(f"it has no {'instance map' if column == 'instances' else 'mask'}.")
    return readers[column](row[column])


def is_missing(value: Any) -> bool:
    """Returns whether a value of a column of images is empty."""
    return value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None)


def _fitting(labels: np.ndarray, image: Decoded, name: str) -> np.ndarray:
    """Returns a mask turned upright as its image; raises a ValueError if it has another size."""
    height, width = image.pixels.shape[:2]
    labels = fit_orientation(labels, (height, width), image.orientation)
    if labels.shape != (height, width):
        raise ValueError(
            f"its {name} has {labels.shape[1]}x{labels.shape[0]} pixels, but the image has {width}x{height}; both must "
            "have one size."
        )
    return labels


def _write(dataset: datasets.Dataset, preparation: Preparation, name: str, reading: str, folder: Path) -> None:
    table = KeyTable()
    rows: list[int] = []
    counted: list[dict[int, int]] = []
    mask_digests: list[bytes] = []
    groups = dataset["group"] if "group" in dataset.features else None
    has_instances = reading == "instances" or "instances" in dataset.features
    with ExitStack() as stack:
        writer = stack.enter_context(ImageWriter(folder))
        names = ["codes", "instances", "touching"] if has_instances else ["codes"]
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
            files["codes"].write(codes.data)
            if example.instances is not None:
                separated = separate_instances(example.instances)
                files["instances"].write(np.ascontiguousarray(example.instances).data)
                files["touching"].write((separated != example.instances).astype(np.uint8).data)
            rows.append(row)
            counted.append(counts)
        writer.finish(name)
    keys = list(table.positions)
    np.save(folder / "rows.npy", np.array(rows, dtype=np.int64))
    np.save(folder / "mask_digests.npy", as_array(mask_digests))
    np.save(folder / "counts.npy", np.array([[counts.get(key, 0) for key in keys] for counts in counted]))
    info = {"keys": keys, "palette": table.palette, "has_instances": has_instances}
    (folder / "masks.json").write_text(json.dumps(info, indent=2) + "\n")
