"""Segments image files with a trained run, and writes the masks as files."""

import csv
import io
from pathlib import Path

import numpy as np

from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.files import check_absent, readable, write_text
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.figures import save_image
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline

COLUMNS = ("file", "mask", "class", "pixels", "share")


def segment(options: Segment) -> Path:
    """Writes `NAME.png` (class indices, with the palette), `NAME-overlay.png` and `areas.csv`; returns their folder.

    NAME is the file's name without its suffix, and a number where several files share it.

    Raises:
        ValueError: an option that does not fit the run, no image at all, or an `areas.csv` that would be overwritten.
        RuntimeError: after the last image, if some failed; it names them. An output that would be overwritten counts.
    """
    inputs = options.checked_inputs()
    names = inputs.names()
    pipe = load_pipeline(SegmentationPipeline, options.run).to(best_device(options.device))
    pipe.check_inputs(options.tile_size, options.num_draws, options.timesteps or None)
    rows: list[tuple] = []

    def work(path: Path) -> None:
        rows.extend(_segment_image(pipe, options, path, names[path]))

    failures = inputs.work_through(pipe.progress_bar(inputs.paths), work)
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(options.folder / "areas.csv", table.getvalue())
    inputs.report(failures, options.folder)
    return options.folder


def _segment_image(pipe: SegmentationPipeline, options: Segment, path: Path, name: str) -> list[tuple]:
    """Writes the mask and the overlay of one image; returns its lines of the table."""
    mask_path, overlay_path = options.folder / f"{name}.png", options.folder / f"{name}-overlay.png"
    check_absent(mask_path, overlay_path, overwrite=options.overwrite)
    pixels = decode_image(path, channels=pipe.channels)
    (mask,) = pipe(
        pixels,
        tile_size=options.tile_size,
        augment=options.augment,
        timesteps=options.timesteps or None,
        num_draws=options.num_draws,
        generator=keyed_generator(options.seed, "segment", name),
        return_probabilities=False,
        return_dict=False,
    )[0]
    save_image(mask, mask_path)
    save_image(pipe.overlay(pixels, mask, options.opacity), overlay_path)
    classes = pipe.class_names or [str(label) for label in range(pipe.num_classes)]
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(classes))
    return [
        (readable(str(path)), readable(mask_path.name), label, int(count), f"{count / counts.sum():.6f}")
        for label, count in zip(classes, counts)
    ]
