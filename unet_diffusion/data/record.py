"""The record of a run's data, kept in its folder as `data.json`."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
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
        summary: the summary of the data, as the lines that are printed before any work.
        fingerprint: hash of the content of all images (and masks) and of how they are prepared; it does not depend on
            where the files lie. For a stream, the hash is of the names and sizes of its files, or of its name if the
            files are not here.
        trained: content hash of each image that is trained on.
        held_out: content hash of each image that is held out for validation.
        unlabelled: content hash of each image that is learnt from without its mask, if the run learns masks too.
        mask_encoding: meaning of the values of masks, as `MaskEncoding.to_dict` gives it; None without masks.
        class_names: names of the classes of whole images that are learnt, in the order of their indices; empty if there
            are none.
    """

    summary: tuple[str, ...] = ()
    fingerprint: str = ""
    trained: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    mask_encoding: dict[str, Any] | None = None
    class_names: tuple[str, ...] = ()

    def write(self, run: Path) -> None:
        """Writes `data.json` into the folder of a run."""
        write_json(run / FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> "DataRecord | None":
        """Returns the record of a run; None for a run or a pipeline without a record.

        Raises:
            ValueError: the file cannot be read, or holds anything else.
        """
        if not (run / FILE).is_file():
            return None
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {name: value for name, value in read_object(run / FILE).items() if name in known}
        for name, value in values.items():
            if not _fits(name, value):
                raise ValueError(f"{run / FILE} has {name} {value!r}, which no run writes; get the file again.")
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values)

    @classmethod
    def before(cls, run: Path) -> "DataRecord | None":
        """Returns the record of a run that is resumed; None for a run that is new or has lost its record.

        For a run from before `data.json`, the record is `UNRECORDED`. The options of such a run lack
        `allow_changed_data`, which came with `data.json`.
        """
        record = cls.read(run)
        if record is None and (run / "config.json").is_file():
            training = read_object(run / "config.json").get("training")
            return None if isinstance(training, dict) and "allow_changed_data" in training else UNRECORDED
        return record

    @property
    def learnt(self) -> tuple[str, ...]:
        """Returns the content hashes of all images that are learnt from, with masks or without."""
        return (*self.trained, *self.unlabelled)

    @property
    def streamed(self) -> bool:
        """Returns whether the training images were streamed, so that it is not known which they were."""
        return self.fingerprint != "" and not self.trained

    def changes(self, now: "DataRecord") -> str:
        """Describes how the data of another record differ from those of this one."""
        if self.streamed and now.streamed:
            validation = ", or the images for validation," if self.held_out or now.held_out else ""
            return f"the files of the stream{validation} have changed, or an earlier version started the run"
        before, after = ({*record.learnt, *record.held_out} for record in (self, now))
        added, removed = len(after - before), len(before - after)
        if not added and not removed:
            return (
                "the images are the same, but copies of them, masks, labels, their use or the preparation have changed"
            )
        return f"{added} image{'s' * (added != 1)} added, {removed} removed"

    def followed_by(self, now: "DataRecord") -> "DataRecord":
        """Returns the record of a run that goes on with other data; it keeps images that are gone, since they count."""
        return replace(
            now,
            trained=_joined(self.trained, now.trained),
            held_out=_joined(self.held_out, now.held_out),
            unlabelled=_joined(self.unlabelled, now.unlabelled),
        )


UNRECORDED = DataRecord()  # of a run from before `data.json`, which divided its images by position alone


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def _fits(name: str, value: Any) -> bool:
    """Returns whether a value in `data.json` has the type of this attribute of `DataRecord`."""
    if name == "fingerprint":
        return isinstance(value, str)
    if name == "mask_encoding":
        return value is None or isinstance(value, dict)
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def make_record(
    data: "ImageSets | MaskedSets",
    preparation: "Preparation",
    unlabelled: "Images | None" = None,
    *,
    summary: Iterable[str] = (),
    mask_encoding: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> DataRecord:
    """Returns the record of opened data.

    Args:
        data: the images of a run, with masks or without.
        preparation: how they were converted.
        unlabelled: images without masks that the run also learns from; they are neither trained on with
            masks nor held out.
        summary: as in `DataRecord`.
        mask_encoding: as in `DataRecord`.
        class_names: as in `DataRecord`; a run that resumes this one must have the same.
    """
    parts = (data.train, data.validation, unlabelled)
    contents = [[] if part is None else sorted(part.contents()) for part in parts]
    text = json.dumps([contents, preparation.to_dict()])
    return DataRecord(
        tuple(summary),
        hashlib.sha256(text.encode()).hexdigest()[:32],
        tuple(data.train.ids()),
        () if data.validation is None else tuple(data.validation.ids()),
        () if unlabelled is None else tuple(unlabelled.ids()),
        mask_encoding,
        tuple(class_names or ()),
    )


def is_foreign_record(folder: Path) -> bool:
    """Returns whether a folder has a `data.json` that no run wrote."""
    if not (folder / FILE).exists():
        return False
    try:
        return not read_object(folder / FILE).keys() & {field.name for field in fields(DataRecord)}
    except ValueError:
        return True


def resolved_place(source: str) -> str:
    """Returns the path that a source or model names, however it is written; other names stay distinct."""
    return os.path.realpath(os.path.expanduser(source))
