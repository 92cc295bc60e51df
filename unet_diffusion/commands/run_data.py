"""The data of a finished run, as its `config.json` and `data.json` name them, for commands that measure it."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unet_diffusion.data.config import IN_MEMORY, SOURCES, DataConfig, SourceOptions
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import ImageSets, load_images
from unet_diffusion.saved_index import read_object
from unet_diffusion.unused_options import without_unused

T = TypeVar("T", bound=SourceOptions)

# The options with which all images of another source are trained on.
WHOLE_SOURCE = {"split": "train", "validation_fraction": 0} | dict.fromkeys(
    ("image_column", "label_column", "group_column", "validation_data", "validation_split")
)


def own_record(run: Path) -> DataRecord:
    """Returns the data record of a run; if there is none, raises a ValueError that asks for data."""
    record = DataRecord.read(run)
    if record is None or not (run / "config.json").is_file():
        raise ValueError(
            f"data is not given, and {run} has no data.json that says what the run learnt from; give data."
        )
    return record


def own_options(run: Path, kind: type[T], changes: Mapping[str, Any] | None = None) -> T:
    """Returns the options of a run's data, with changes.

    Raises:
        ValueError: the data are not on this machine, were in memory, or were not named by options.
    """
    saved = read_object(run / "config.json").get("data")
    saved = saved if isinstance(saved, Mapping) else {}
    known = {field.name for field in fields(kind)}
    values: dict[str, Any] = {name: _as_tuple(value) for name, value in saved.items() if name in known}
    in_memory = next((name for name in SOURCES if IN_MEMORY in str(values.get(name))), None)
    if in_memory is not None:
        raise ValueError(
            f"data is not given, and {in_memory} of the run in {run} was {values[in_memory]}, which no file keeps; "
            "give data, the same images from Python or others."
        )
    values |= changes or {}
    try:
        options = kind(**without_unused(values))  # of earlier versions, which did not refuse unused options
        check_sources(options)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"data is not given, and that of the run in {run} cannot be opened: {error} Give data."
        ) from error
    return options


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def held_out_masks(run: Path, num_classes: int) -> MaskedDataset:
    """Returns the images with masks that a run held out, prepared as in the run, with the classes of its record.

    Raises:
        ValueError: the run held out no images, or they are no longer there.
    """
    record = own_record(run)
    give = "give data, images with masks that it has not learnt from."
    if not record.held_out:
        raise ValueError(f"data is not given, and the run in {run} held out no image; {give}")
    options = own_options(run, MaskedDataConfig)
    options.border_weights = False
    saved = None if record.mask_encoding is None else MaskEncoding.from_dict(record.mask_encoding)
    images = load_masked(options, before=record, saved=saved).validation
    held_out = None if images is None else images.only(np.isin(images.ids(), record.held_out))
    if held_out is None or not len(held_out) or held_out.num_classes != num_classes:
        raise ValueError(f"data is not given, and the images that the run in {run} held out have changed; {give}")
    return held_out


def own_images(run: Path) -> ImageSets:
    """Returns the images of a run that generates images: those that it learnt from, and those that it held out.

    For a run that also learnt masks, the former are the images that it learnt to generate.

    Raises:
        ValueError: the images were streamed, their folder also holds masks, or all of them have changed.
    """
    record = own_record(run)
    config = read_object(run / "config.json")
    saved = config.get("data", {})
    for name, why in (("streaming", "were streamed"), ("mask_suffix", "lie beside their masks")):
        if saved.get(name) and not saved.get("masks"):
            raise ValueError(f"data is not given, and the images of the run in {run} {why}; give data.")
    images = load_images(own_options(run, DataConfig), before=record)
    train, validation = images.train, images.validation
    unlabelled = config.get("joint", {}).get("unlabelled")
    if unlabelled is not None:
        train = load_images(own_options(run, DataConfig, {"data": unlabelled, **WHOLE_SOURCE})).train
    assert isinstance(train, ImageDataset)
    train = train.only(np.isin(train.ids(), record.unlabelled or record.trained))
    if validation is not None:
        validation = validation.only(np.isin(validation.ids(), record.held_out))
    if not len(train):
        raise ValueError(
            f"data is not given, and none of the images that the run in {run} learnt from is there; give data."
        )
    return ImageSets(train, validation if validation is not None and len(validation) else None)


def learnt_from(images: ImageDataset | MaskedDataset, record: DataRecord | None) -> np.ndarray:
    """Returns which images a run learnt from, wherever they lie, bool (N,); none if the run did not record them."""
    return np.isin(images.ids(), () if record is None else record.learnt)
