"""The facts that the doctor gathers about every row of a data set, before it judges them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm.auto import tqdm

from unet_diffusion.checks import Question
from unet_diffusion.data.cache import content_digest, each_row, source_key, written_once
from unet_diffusion.data.columns import image_reader
from unet_diffusion.data.masked.config import Reading
from unet_diffusion.data.masked.parts import is_missing
from unet_diffusion.data.masked.questions import MANY_CLASSES
from unet_diffusion.data.masked.reading import read_labels
from unet_diffusion.data.shuffled_rows import rows_of
from unet_diffusion.files import remove_at_once
from unet_diffusion.images.axes import AxisOrder
from unet_diffusion.images.decoding import Decoded, decode
from unet_diffusion.images.fetching import NotFetched
from unet_diffusion.images.masks import COLOURED, QUARTER_TURNED, Colour

FORMAT = 13  # of the stored facts; raised when a field changes its meaning, so that old facts are not read
SKETCHED = 16  # rows and columns of the sketch of a mask
FEWEST_SOFT = 4  # values of a mask whose edges may be soft; with three, one may be a thin border
SLOW = 1000  # rows; a longer examination shows its progress
STREAMED = 100  # rows of a stream that are examined


@dataclass
class RowFacts:
    """Facts about one row of the source, before resizing."""

    name: str  # for messages: the number of the row and its file
    image_problem: str | None = None  # why the image cannot be used; its other fields are then empty
    mask_problem: str | None = None  # why the mask or the instance map cannot be used
    image_question: str | None = None  # a question that the image raises and an option answers; the problem shows why
    mask_question: str | None = None  # the same for the mask
    unfetched: bool = False  # a remote file could not be read, perhaps only for the moment
    no_mask: bool = False  # the row should have a mask
    size: tuple[int, int] = (0, 0)  # width and height of the upright image
    channels: int = 0
    dtype: str = ""
    low: float = 0.0  # smallest value of the image
    high: float = 0.0  # largest value of the image
    levels: int = 0  # different values in an image of 16 bits
    unread_pages: int = 0  # frames or pages of the image's file that are left out
    digest: str = ""  # hash of the image's pixels and shape
    mask_size: tuple[int, int] = (0, 0)  # width and height; zeros without a mask
    keys: list[tuple[int, int]] = field(default_factory=list)  # each key of the mask and its number of pixels
    palette: list[tuple[int, Colour]] = field(default_factory=list)  # each index of the mask and its colour
    mask_digest: str = ""  # hash of the mask's keys
    mask_sketch: str = ""  # the mask in 16 x 16 pixels: 1 where it is above its lowest key; hexadecimal
    mask_is_image: bool = False  # the mask equals the image
    lossy: str = ""  # format of the mask's file, if it changes values
    unread_mask_pages: int = 0  # frames or pages of the mask's file that are left out
    objects: bool = False  # the values of the mask look like numbers of objects
    numbered_keys: list[tuple[int, int]] = field(default_factory=list)  # each key, and its pixels that have a number
    numbered: int = 0  # objects in the instance map
    split: int = 0  # of these, the ones in several separate pieces
    changes: int = 0  # neighbouring pixels of the mask whose values differ; only where edges may be soft
    ramps: list[tuple[int, int]] = field(default_factory=list)  # each value, and how often it lies in a slope of three
    white_is_zero: bool = False  # the file of the mask is a TIFF that shows 0 as white
    overlap: int = 0  # pixels that several files of the mask mark
    may_be_turned: bool = (
        False  # only the image states an orientation, and the sizes do not show which one the mask has
    )

    def __post_init__(self) -> None:
        """Restores the tuples that JSON turned into lists."""
        self.size, self.mask_size = (self.size[0], self.size[1]), (self.mask_size[0], self.mask_size[1])
        self.keys = [(key, count) for key, count in self.keys]
        self.numbered_keys = [(key, count) for key, count in self.numbered_keys]
        self.ramps = [(key, count) for key, count in self.ramps]
        self.palette = [(key, (red, green, blue)) for key, (red, green, blue) in self.palette]

    @property
    def usable(self) -> bool:
        """Returns whether the row can be used, judging from its files alone."""
        return self.image_problem is None and self.mask_problem is None and not self.no_mask

    def told(self, problem: str | None) -> str:
        """Returns the row and its problem as text, with the file between them unless the problem names it."""
        row, _, file = self.name.partition(" (")
        if not problem:
            return self.name
        return f"{row if file and file[:-1] in problem else self.name}: {problem}"


def gather_facts(
    dataset: datasets.Dataset, reading: Reading | None, cache_dir: str | Path | None, axes: AxisOrder | None = None
) -> list[RowFacts]:
    """Gathers the facts about all rows, or reads the facts that an earlier call gathered if it could fetch all files.

    Without a reading, there are no masks. `axes` is as in `decode_image`.
    """

    def write(folder: Path) -> None:
        rows = each_row(dataset, _examiner(dataset, reading, axes))
        shown = tqdm(rows, "examining", len(dataset), unit="row", disable=len(dataset) <= SLOW, dynamic_ncols=True)
        (folder / "facts.json").write_text(json.dumps([asdict(facts) for facts in _numbered(shown)]))

    key = ["doctor", FORMAT, [fact.name for fact in fields(RowFacts)], source_key(dataset), reading, axes]
    folder = written_once("facts", key, cache_dir, write)
    facts = [RowFacts(**values) for values in json.loads((folder / "facts.json").read_text())]
    if any(each.unfetched for each in facts):
        remove_at_once(folder)
    return facts


def facts_of_stream(
    stream: datasets.Dataset | datasets.IterableDataset, name: str, axes: AxisOrder | None
) -> list[RowFacts]:
    """Gathers the facts about the first rows of a stream of images; they are not stored."""
    return _numbered(map(_examiner(stream, None, axes), islice(rows_of(stream, name), STREAMED)))


def _numbered(rows: Iterable[RowFacts | ValueError]) -> list[RowFacts]:
    """Returns the facts with names that begin with the number of the row."""
    numbered = []
    for row, facts in enumerate(rows):
        assert isinstance(facts, RowFacts)
        facts.name = f"row {row}{f' ({facts.name})' if facts.name else ''}"
        numbered.append(facts)
    return numbered


def _examiner(
    dataset: datasets.Dataset | datasets.IterableDataset, reading: Reading | None, axes: AxisOrder | None
) -> Callable[[dict[str, Any]], RowFacts]:
    readers = {column: image_reader(dataset, column) for column in dataset.features if column not in ("label", "group")}

    def examine(row: dict[str, Any]) -> RowFacts:
        path = row["image"].get("path") if isinstance(row["image"], dict) else None
        facts = RowFacts(name=Path(path).name if path else "")
        image = None
        try:
            image = decode(readers["image"](row["image"]), axes=axes)
            _note_image(facts, image.pixels)
            facts.unread_pages = image.unread_pages
        except ValueError as error:
            facts.image_problem, facts.image_question = _parts(error)
            facts.unfetched = isinstance(error, NotFetched)
        if reading is not None:
            of_masks = {column: read for column, read in readers.items() if column != "image"}
            facts.no_mask = any(is_missing(row[column]) for column in of_masks)
            if not facts.no_mask:
                try:
                    sources = {column: read(row[column]) for column, read in of_masks.items()}
                    _note_mask(facts, sources, image, reading, axes)
                except ValueError as error:
                    facts.mask_problem, facts.mask_question = _parts(error)
                    facts.unfetched |= isinstance(error, NotFetched)
        return facts

    return examine


def _parts(error: ValueError) -> tuple[str, str | None]:
    """Returns the problem with a file, and the question that it raises."""
    return (error.found, error.question) if isinstance(error, Question) else (str(error), None)


def _note_image(facts: RowFacts, image: np.ndarray) -> None:
    facts.size, facts.channels, facts.dtype = (image.shape[1], image.shape[0]), image.shape[2], image.dtype.name
    facts.low, facts.high = float(image.min()), float(image.max())
    if image.dtype == np.uint16:
        facts.levels = int((np.bincount(image.ravel()) > 0).sum())  # sorting a large image would take seconds
    facts.digest = content_digest(image).hex()


def _note_mask(
    facts: RowFacts, sources: Mapping[str, Any], image: Decoded | None, reading: Reading, axes: AxisOrder | None
) -> None:
    labels = read_labels(sources, image, reading, axes)
    mask, keys = labels.mask, labels.mask.keys
    facts.palette, facts.objects, facts.overlap = list(mask.palette.items()), labels.objects, mask.overlap
    facts.numbered, facts.split = labels.numbered, labels.split
    facts.lossy, facts.white_is_zero = mask.format if mask.lossy else "", mask.white_is_zero
    facts.unread_mask_pages = mask.unread_pages
    if image is not None:
        known = image.orientation in QUARTER_TURNED and keys.shape[0] != keys.shape[1]  # from the sizes
        facts.may_be_turned = image.orientation != 1 and not known and mask.orientation == 1
        facts.mask_is_image = _are_equal(mask.keys, image.pixels)
    values, counts = np.unique(keys, return_counts=True)
    facts.keys = list(zip(values.tolist(), counts.tolist()))
    if (
        reading == "values"
        and not mask.palette
        and FEWEST_SOFT <= len(values) <= MANY_CLASSES
        and values[-1] < COLOURED
    ):
        _note_slopes(facts, keys)
    facts.mask_size = (keys.shape[1], keys.shape[0])
    facts.mask_digest, facts.mask_sketch = content_digest(keys).hex(), _sketch(keys)
    if image is not None and labels.instances is not None and "instances" in sources:
        height, width = labels.instances.shape
        if (height, width) != image.pixels.shape[:2]:
            raise ValueError(
                f"its instance map has {width}x{height} pixels, but the image has {facts.size[0]}x{facts.size[1]}."
            )
    if labels.instances is not None and labels.instances.shape == keys.shape:
        found = np.unique(keys[labels.instances > 0], return_counts=True)
        facts.numbered_keys = list(zip(*(each.tolist() for each in found)))


def _note_slopes(facts: RowFacts, keys: np.ndarray) -> None:
    """Counts slopes of three pixels in rows and columns, whose values rise or fall as they do at soft edges."""
    ramps: Counter[int] = Counter()
    for lines in (keys, keys.T):
        steps = np.sign(np.diff(lines, axis=1))
        facts.changes += int(np.count_nonzero(steps))
        slopes = (steps[:, 1:] == steps[:, :-1]) & (steps[:, 1:] != 0)
        ramps.update(lines[:, 1:-1][slopes].tolist())
    facts.ramps = sorted(ramps.items())


def _are_equal(keys: np.ndarray, pixels: np.ndarray) -> bool:
    """Returns whether an image (H, W, C) of grey or colours has the keys (H, W) of a mask."""
    shifts = {1: (0,), 3: (16, 8, 0)}.get(pixels.shape[2], ())  # of each channel in the key of a colour
    if not shifts or keys.shape != pixels.shape[:2]:
        return False
    values = (np.where(keys < COLOURED, keys, keys >> shift & 255) for shift in shifts)
    return all(np.array_equal(each, pixels[:, :, channel]) for channel, each in enumerate(values))


def _sketch(keys: np.ndarray) -> str:
    rows, columns = ((2 * np.arange(SKETCHED) + 1) * side // (2 * SKETCHED) for side in keys.shape)
    return np.packbits(keys[np.ix_(rows, columns)] > keys.min()).tobytes().hex()
