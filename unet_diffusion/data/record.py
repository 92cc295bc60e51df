"""What a run knows about its data, kept in its folder as `data.json`."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_diffusion.files import write_json
from unet_diffusion.saved_index import read_object

if TYPE_CHECKING:
    from unet_diffusion.data.dataset import ImageDataset
    from unet_diffusion.data.masked.dataset import MaskedDataset
    from unet_diffusion.data.masked.sets import MaskedSets
    from unet_diffusion.data.sets import ImageSets
    from unet_diffusion.data.streaming import StreamingImages
    from unet_diffusion.images.resizing import Preparation

    Images = ImageDataset | MaskedDataset | StreamingImages

FILE = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Attributes:
        summary: what was understood, as the lines that are printed before any work.
        fingerprint: hash of the content of all images (and masks) and of how they are prepared; it does not depend on
            where the files lie. For a stream, of its name or place alone.
        trained: content hash of each image that is trained on.
        held_out: content hash of each image that is held out for validation.
        mask_encoding: meaning of the values of masks, as `MaskEncoding.to_dict` gives it; None without masks.
    """

    summary: tuple[str, ...] = ()
    fingerprint: str = ""
    trained: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    mask_encoding: dict[str, Any] | None = None

    def write(self, run: Path) -> None:
        """Writes `data.json` into the folder of a run."""
        write_json(run / FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> "DataRecord | None":
        """Returns the record of a run; None for a run, or a pipeline, that has none."""
        if not (run / FILE).is_file():
            return None
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in read_object(run / FILE).items() if name in known}
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)

    def changes(self, now: "DataRecord") -> str:
        """Describes how the data of another record differ from these."""
        before, after = (set(record.trained) | set(record.held_out) for record in (self, now))
        added, removed = len(after - before), len(before - after)
        if not added and not removed:
            return (
                "the images are the same, but copies of them, masks, labels, unlabelled images or the preparation have "
                "changed"
            )
        return f"{added} image{'s' * (added != 1)} added, {removed} removed"

    def followed_by(self, now: "DataRecord") -> "DataRecord":
        """Returns the record of a run that goes on with other data; images that are gone have been trained on."""
        trained = dict.fromkeys((*self.trained, *now.trained))
        held_out = dict.fromkeys((*self.held_out, *now.held_out))
        return replace(now, trained=tuple(trained), held_out=tuple(held_out))


def make_record(
    data: "ImageSets | MaskedSets",
    preparation: "Preparation",
    unlabelled: "Images | None" = None,
    *,
    summary: Iterable[str] = (),
    mask_encoding: dict[str, Any] | None = None,
) -> DataRecord:
    """Returns the record of opened data.

    Args:
        data: the images of a run, with masks or without.
        preparation: how they were converted.
        unlabelled: images without masks that the run also learns from; they count in the fingerprint alone.
        summary: as in `DataRecord`.
        mask_encoding: as in `DataRecord`.
    """
    parts = (data.train, data.validation, unlabelled)
    contents = [[] if part is None else sorted(part.contents()) for part in parts]
    text = json.dumps([contents, asdict(preparation)])
    return DataRecord(
        tuple(summary),
        hashlib.sha256(text.encode()).hexdigest()[:32],
        tuple(data.train.ids()),
        () if data.validation is None else tuple(data.validation.ids()),
        mask_encoding,
    )


def resolved_place(source: str) -> str:
    """Returns the path that a source or model names, however it is written; a name that is no path stays distinct."""
    return os.path.realpath(os.path.expanduser(source))
