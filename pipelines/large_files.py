"""The mask and the objects of an image that may be larger than memory, written part by part."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_diffusion.files import remove_leftovers_of, scratch_folder, written_aside
from unet_diffusion.images.large_images import (
    LargeImage,
    ScratchArrays,
    check_label_format,
    check_mask_name,
    create_mask,
    write_labels,
)
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.stretching import Stretch
from unet_diffusion.network.tiling import Read
from unet_diffusion.segmentation.blocks import blocks
from unet_diffusion.segmentation.measurements import ObjectMeasurements, as_frame, table_as_csv
from unet_diffusion.segmentation.objects import ObjectSearch

FILE_BLOCK = 1024  # pixels a side of the blocks in which large images are read and their objects are found

# rows, columns, the probabilities there (1, K, h, w) and, if there are object maps, two more maps (1, h, w)
Regions = Iterable[tuple[Any, ...]]


@dataclass(frozen=True)
class ObjectOptions:
    """How objects are found and named.

    Attributes:
        diameter: of usual objects, as `find_objects` takes it.
        min_area: as `find_objects` takes it.
        max_hole: as `find_objects` takes it.
        class_names: one for each class, or None.
        num_classes: number of classes, background included.
    """

    diameter: float | None
    min_area: int
    max_hole: int
    class_names: Sequence[str] | None
    num_classes: int


def stretched_reader(image: LargeImage, pixel_range: PixelRange) -> Read:
    """Returns a function that reads windows of an image as stored values (1, C, h, w), in the whole image's range.

    If the range is defined by the image's own percentiles, the image is read once to find them, at the first window.
    """
    stretch = _stretch_of(image, pixel_range)

    def read(rows: slice, columns: slice) -> Tensor:
        return torch.from_numpy(stretch(image.read(rows, columns))).permute(2, 0, 1)[None]

    return read


def _stretch_of(image: LargeImage, pixel_range: PixelRange) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that brings a part of an image, (h, w, C), to the range of the whole image."""
    percentiles = pixel_range.percentiles
    if percentiles is None:
        return lambda part: part
    kept = np.dtype(pixel_range.dtype)

    def parts() -> Iterator[np.ndarray]:
        for rows, columns in blocks(image.shape[:2], FILE_BLOCK):
            yield image.read(rows, columns).astype(kept, copy=False)

    @functools.cache
    def stretch() -> Stretch:
        return Stretch.of_parts(parts, percentiles)

    return lambda part: stretch()(part.astype(kept, copy=False))


def write_segmented(image: LargeImage, regions: Regions, target: Any, options: ObjectOptions | None) -> None:
    """Writes the mask of an image and, if there are object options, the label image and the table beside it.

    Args:
        image: the image; objects are measured in it.
        regions: the output of the network, window by window; nothing is computed if the target is refused.
        target: path of the mask, which appears when it is complete and stays if the objects fail, or an array (H, W).
        options: how objects are found; None writes the mask alone.

    Raises:
        ValueError: a file exists, the target is an array of another size, it is an array and objects are wanted, or
            its suffix is unknown.
    """
    size = image.shape[:2]
    if not isinstance(target, (str, Path)):
        if tuple(target.shape) != size:
            raise ValueError(f"target has shape {tuple(target.shape)}, but the image is {size[0]}x{size[1]}.")
        if options is not None:
            raise ValueError("target is an array, but objects are written beside the mask; give a path for it.")
        _fill(regions, target)
        return
    path = Path(target)
    check_mask_name(path)
    objects = path.with_name(f"{path.stem}-objects")  # without a suffix, it names the scratch folder
    labels, table = (path.with_name(f"{objects.name}{ending}") for ending in (".tif", ".csv"))
    paths = (path,) if options is None else (path, labels, table)
    for each in paths:
        if each.exists():
            raise ValueError(f"{each} exists already; remove it, or choose another name.")
    if options is not None:
        check_label_format()
    remove_leftovers_of(*paths, objects)
    if options is None:
        with written_aside(path) as aside:
            _fill(regions, create_mask(aside, *size))
        return
    with scratch_folder(objects) as folder:
        create = ScratchArrays(folder)

        def create_map(shape: tuple[int, ...]) -> Any:
            return create((*shape, *size), np.float32)

        with written_aside(path) as aside:
            maps = _fill(regions, create_mask(aside, *size), create_map)
        try:
            with written_aside(labels) as labels_aside, written_aside(table) as table_aside:
                _write_objects(image, maps, create, options, labels_aside, table_aside)
        except BaseException as error:
            error.add_note(f"The mask is complete, {path}, but its objects are missing. To try again, remove it first.")
            raise


def _fill(regions: Regions, mask: Any, create: Callable[[tuple[int, ...]], Any] | None = None) -> list[Any]:
    """Writes the mask and, into new arrays (..., H, W) from `create`, the maps in which objects are found."""
    maps: list[Any] = []
    for rows, columns, *parts in regions:
        mask[rows, columns] = parts[0][0].argmax(dim=0).to("cpu", torch.uint8).numpy()
        if create is not None:
            maps = maps or [create(tuple(part.shape[1:-2])) for part in parts]
            for whole, part in zip(maps, parts):
                whole[..., rows, columns] = part[0].cpu().numpy()
    return maps


def _write_objects(
    image: LargeImage, maps: list[Any], create: Callable[..., Any], options: ObjectOptions, labels: Path, table: Path
) -> None:
    """Finds the objects of an image in its maps, block by block, and writes the label image and the table."""
    chances, boundary, distance = maps if len(maps) == 3 else (*maps, None, None)
    search = ObjectSearch(chances, boundary, distance, create, FILE_BLOCK)
    objects, count = search.find(options.diameter, options.min_area, options.max_hole)
    measured = ObjectMeasurements(count, image.shape[2], options.num_classes)
    for rows, columns in blocks(image.shape[:2], FILE_BLOCK):
        stored = np.moveaxis(image.read(rows, columns), 2, 0)
        measured.add(objects[rows, columns], stored, chances[:, rows, columns], rows.start, columns.start)
    write_labels(labels, objects, count)
    table.write_bytes(table_as_csv(as_frame(measured.table(options.class_names, image.pixel_size))))
