"""The data of a finished run, as its `config.json` and `data.json` name them, for commands that measure it."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from unet_diffusion.commands.options.evaluate import LOADING
from unet_diffusion.data.config import IN_MEMORY, SOURCES, DataConfig, SourceOptions
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.encoding import MaskEncoding
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import ImageSets, load_images
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines.base import saved_range
from unet_diffusion.saved_index import GENERATES, INDEX, SEGMENTATION, read_object, saved_kind
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


def loading(given: SourceOptions) -> dict[str, Any]:
    """Returns how images are loaded, which may be stated without data, as changes for `own_options`."""
    stated = {name: getattr(given, name, None) for name in LOADING}
    return {name: value for name, value in stated.items() if value is not None}


def held_out_masks(run: Path, num_classes: int, changes: Mapping[str, Any] | None = None) -> MaskedDataset:
    """Returns the images with masks that a run held out, prepared as in the run, with the classes of its record.

    `changes` are those of `own_options`.

    Raises:
        ValueError: the run held out no images, or they are no longer there.
    """
    record = own_record(run)
    give = "give data, images with masks that it has not learnt from."
    if not record.held_out:
        raise ValueError(f"data is not given, and the run in {run} held out no image; {give}")
    options = own_options(run, MaskedDataConfig, changes)
    options.border_weights = False
    saved = None if record.mask_encoding is None else MaskEncoding.from_dict(record.mask_encoding)
    images = load_masked(options, before=record, saved=saved).validation
    held_out = None if images is None else images.only(np.isin(images.ids(), record.held_out))
    if held_out is None or not len(held_out) or held_out.num_classes != num_classes:
        raise ValueError(f"data is not given, and the images that the run in {run} held out have changed; {give}")
    return held_out


def own_images(run: Path, changes: Mapping[str, Any] | None = None) -> ImageSets:
    """Returns the images of a run that generates images: those that it learnt from, and those that it held out.

    They are mapped by the range of values that the run saved. For a run that also learnt masks, the former are the
    images that it learnt to generate. `changes` are those of `own_options`.

    Raises:
        ValueError: the images were streamed, their folder also holds masks, or all of them have changed; or the run
            learnt masks alone, with the noise head of another run.
    """
    record = own_record(run)
    config = read_object(run / "config.json")
    if saved_kind(run) == SEGMENTATION and GENERATES not in read_object(run / INDEX):
        raise ValueError(
            f"data is not given, and the noise head of {run} did not learn from its images, since it comes from "
            f"{config.get('model')}; give data, the images of that run or others."
        )
    saved = config.get("data", {})
    for name, why in (("streaming", "were streamed"), ("mask_suffix", "lie beside their masks")):
        if saved.get(name) and not saved.get("masks"):
            raise ValueError(f"data is not given, and the images of the run in {run} {why}; give data.")
    images = load_in_range(own_options(run, DataConfig, changes), run, record)
    train, validation = images.train, images.validation
    unlabelled = config.get("joint", {}).get("unlabelled")
    if unlabelled is not None:
        others = own_options(run, DataConfig, {"data": unlabelled, **WHOLE_SOURCE, **(changes or {})})
        train = load_in_range(others, run).train
    assert isinstance(train, ImageDataset)
    train = train.only(np.isin(train.ids(), record.unlabelled or record.trained))
    if validation is not None:
        validation = validation.only(np.isin(validation.ids(), record.held_out))
    if not len(train):
        raise ValueError(
            f"data is not given, and none of the images that the run in {run} learnt from is there; give data."
        )
    return ImageSets(train, validation if validation is not None and len(validation) else None)


def learnt_range(run: Path) -> PixelRange:
    """Returns the range of values of the images that a run learnt from, as its pipeline saved it."""
    return saved_range(read_object(run / INDEX).get("_pixel_range"))


def load_in_range(options: DataConfig, run: Path, before: DataRecord | None = None) -> ImageSets:
    """Loads images in the range of values that a run saved, whatever range the options state; none is measured.

    Raises the errors of `load_images` and `map_as_learnt`.
    """
    learnt = learnt_range(run)
    own = learnt.percentiles is not None
    ends = None if own else (min(learnt.low), max(learnt.high))
    of: Literal["training", "image"] = "image" if own else "training"
    options = replace(options, value_range=ends, percentiles=learnt.percentiles, percentiles_of=of)
    return map_as_learnt(load_images(options, before=before), run)


def map_as_learnt(images: ImageSets, run: Path) -> ImageSets:
    """Sets the range of images to that of a run, and returns them; a ValueError if they have another data type."""
    learnt = learnt_range(run)
    found = images.train.pixel_range.dtype
    if found != learnt.dtype:
        raise ValueError(f"the images hold {found}, but the run generates {learnt.dtype}; convert them.")
    for part in (images.train, images.validation):
        if part is not None:
            part.pixel_range = learnt  # maybe of several channels, which no option can state
    return images


def learnt_from(images: ImageDataset | MaskedDataset, record: DataRecord | None) -> np.ndarray:
    """Returns which images a run learnt from, wherever they lie, bool (N,); none if the run did not record them."""
    return np.isin(images.ids(), () if record is None else record.learnt)
