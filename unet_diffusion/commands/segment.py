"""Segments image files with a trained run, and writes the masks as files."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from unet_diffusion.commands.options.segment import TABLE, Segment
from unet_diffusion.commands.runner import Rows, Work, digest, work_through
from unet_diffusion.images.figures import encoded_image
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline

COLUMNS = ("file", "mask", "class", "pixels", "share", "error")
MASK, OVERLAY = ".png", "-overlay.png"


def segment(options: Segment) -> Path:
    """Writes `NAME.png` (class indices, with the palette), `NAME-overlay.png` and `areas.csv`; returns their folder.

    NAME is the place of the image below the folder that was named, without its suffix. Images that would share a name
    keep their suffix. What was made before, as `segment.jsonl` in the folder says, is not made again unless the image,
    the run or an option has changed.

    Raises:
        ValueError: an option that does not fit the run, no image at all, or an `areas.csv` that would be overwritten.
        RuntimeError: after the last image, if some failed; it names them. An output that would be overwritten counts.
    """
    inputs = options.take_inputs()
    pipe = load_pipeline(SegmentationPipeline, options.run).to(best_device(options.device))
    precision = settled_precision(options.mixed_precision, pipe.device)
    pipe.check_inputs(options.tile_size, options.num_draws, options.timesteps or None)
    labels = pipe.class_names or [str(label) for label in range(pipe.num_classes)]

    def compute(image: Tensor, key: str) -> Image.Image:
        return pipe(
            image,
            tile_size=options.tile_size,
            augment=options.augment,
            timesteps=options.timesteps or None,
            num_draws=options.num_draws,
            generator=keyed_generator(options.seed, "segment", key),
            return_probabilities=False,
            return_dict=False,
            mixed_precision=precision,
        )[0][0]

    def encode(image: Tensor, mask: Image.Image) -> tuple[list[bytes], Rows]:
        images = [mask, pipe.overlay(image, mask, options.opacity)] if options.overlays else [mask]
        return [encoded_image(image) for image in images], _areas(mask, labels)

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
        ),
        endings=(MASK, OVERLAY),
        wanted=(MASK, OVERLAY) if options.overlays else (MASK,),
        read=pipe.read_images,
        compute=compute,
        encode=encode,
        table=(TABLE, COLUMNS),
    )
    work_through(inputs, options.folder, work, options.overwrite, pipe.progress_bar)
    return options.folder


def _areas(mask: Image.Image, labels: list[str]) -> Rows:
    """Returns the class, the pixels and their share, for each class."""
    counts = np.bincount(np.asarray(mask).ravel(), minlength=len(labels))
    return tuple((label, str(count), f"{count / counts.sum():.6f}") for label, count in zip(labels, counts.tolist()))
