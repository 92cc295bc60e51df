"""Segments image files with a trained run, and writes the masks as files."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.commands.object_tables import LABELS, OBJECTS, encoded_objects, joined_objects
from unet_diffusion.commands.options.segment import OBJECT_TABLES, TABLE, Segment, Unit
from unet_diffusion.commands.runner import Rows, Summary, Work, digest, work_through
from unet_diffusion.images.figures import encoded_image, encoded_labels
from unet_diffusion.images.pixel_size import PixelSize, known_pixel_size, read_pixel_size
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline

COLUMNS = ("file", "mask", "class", "pixels", "share", "error")
MASK, OVERLAY = ".png", "-overlay.png"
ROUNDING = 1e-9  # relative, of an area in pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaled:
    """An image (C, H, W) of stored values, and its pixels' height and width in micrometres if these are needed."""

    image: Tensor
    pixel_size: PixelSize | None

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes that the image takes in memory."""
        return self.image.nbytes

    def pixels(self, area: float, unit: Unit) -> float:
        """Returns an area, given in a unit, in pixels."""
        if unit == "pixel":
            return area
        assert self.pixel_size is not None
        return area / math.prod(self.pixel_size)


def segment(options: Segment) -> Path:
    """Writes `NAME.png` (class indices, with the palette), `NAME-overlay.png` and `areas.csv`; returns their folder.

    With `instances`, it also writes `NAME-objects.tif`, the numbers of the objects, and `NAME-objects.csv`, their
    table. At the end it writes `objects.csv` and `objects.parquet`, the tables of all images in the folder, and
    `counts.csv`.

    NAME is the place of the image below the named folder, without its suffix. Images that would share a name keep their
    suffix. Outputs from earlier calls, recorded in `segment.jsonl` in the folder, are not made again unless the image,
    the run or an option has changed.

    Raises:
        ValueError: an option does not fit the run, there is no image at all, or a table would be overwritten.
        RuntimeError: after the last image, if some failed; it names them. An output that would be overwritten is a
            failure.
    """
    inputs = options.take_inputs()
    pipe = load_pipeline(SegmentationPipeline, options.run).to(best_device(options.device))
    precision = settled_precision(options.mixed_precision, pipe.device)
    pipe.check_inputs(options.tile_size, options.num_draws, options.timesteps or None)
    least = options.min_area
    if options.instances and least is None and pipe.object_min_area > 1:
        logger.warning(
            "objects of fewer than %d pixels are left out, since hardly any object of the training was so small; set "
            "min_area to 0 to keep them",
            pipe.object_min_area,
        )
    labels = pipe.class_names or [str(label) for label in range(pipe.num_classes)]

    def read(file: dict[str, Any]) -> Iterator[Scaled]:
        size = _pixel_size(file, options) if options.instances else None
        yield from (Scaled(image, size) for image in pipe.read_images(file))

    def compute(scaled: Scaled, key: str) -> tuple[Image.Image, np.ndarray | None, Any]:
        masks, _, _, *objects = pipe(
            scaled.image,
            tile_size=options.tile_size,
            augment=options.augment,
            timesteps=options.timesteps or None,
            num_draws=options.num_draws,
            generator=keyed_generator(options.seed, "segment", key),
            return_probabilities=False,
            return_dict=False,
            mixed_precision=precision,
            instances=options.instances,
            min_area=None if least is None else math.ceil(scaled.pixels(least, options.unit) * (1 - ROUNDING)),
            max_hole=math.floor(scaled.pixels(options.max_hole, options.unit) * (1 + ROUNDING)),
            pixel_size=scaled.pixel_size,
        )
        return (masks[0], objects[0][0], objects[1]) if objects else (masks[0], None, None)

    def encode(scaled: Scaled, found: tuple[Image.Image, np.ndarray | None, Any]) -> tuple[list[bytes], Rows]:
        mask, objects, table = found
        contents = [encoded_image(mask)]
        if options.overlays:
            contents.append(encoded_image(pipe.overlay(scaled.image, mask, options.opacity, objects)))
        if objects is not None:
            contents += [encoded_labels(objects), encoded_objects(table)]
        return contents, _areas(mask, labels)

    work = Work(
        command="segment",
        made_by=digest(
            options.run,
            tile_size=options.tile_size,
            mixed_precision=precision,
            augment=options.augment,
            timesteps=options.timesteps,
            num_draws=options.num_draws,
            opacity=options.opacity,
            seed=options.seed if options.timesteps else None,
            **{name: value for name in ("instances", "max_hole") if (value := getattr(options, name))},
            **({} if least is None else {"min_area": least}),
            **({} if options.unit == "pixel" else {"unit": options.unit}),
        ),
        endings=(MASK, OVERLAY, LABELS, OBJECTS),
        wanted=(MASK, *[OVERLAY] * options.overlays, *[LABELS, OBJECTS] * options.instances),
        read=read,
        compute=compute,
        encode=encode,
        table=(TABLE, COLUMNS),
        summary=Summary(OBJECT_TABLES, OBJECTS, lambda results: joined_objects(options.folder, results)),
    )
    work_through(inputs, options.folder, work, options.overwrite, pipe.progress_bar)
    return options.folder


def _pixel_size(file: dict[str, Any], options: Segment) -> PixelSize | None:
    """Returns the pixel size of a file; a ValueError if the file states none but areas are in micrometres."""
    if options.unit == "pixel":
        return known_pixel_size(file["bytes"])
    size = read_pixel_size(file["bytes"])
    if size is None:
        raise ValueError(
            f"unit is {options.unit!r}, but {file['path']} says no pixel size that is one of a microscope; store it in "
            "the file, as OME-TIFF or by Fiji, or give the areas in pixels."
        )
    return size


def _areas(mask: Image.Image, labels: list[str]) -> Rows:
    """Returns the name, the pixels and their share, for each class."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(labels))
    return tuple((label, str(count), f"{count / counts.sum():.6f}") for label, count in zip(labels, counts.tolist()))
