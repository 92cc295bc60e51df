"""Generates images with a finished run, and writes them as files."""

import io
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.options.sample import GRID, Sample
from unet_diffusion.commands.overlap import Behind
from unet_diffusion.commands.record import Record, Result
from unet_diffusion.commands.runner import digest, is_out_of_memory, reason_of
from unet_diffusion.diffusion.sampling import check_steps, sampler
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import encoded_array, encoded_image, grid
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import best_device, load_pipeline

logger = logging.getLogger(__name__)

MOST_IN_GRID = 256
OF_BATCH = ", images "  # between the digest and the batch in `made_by` of an image


def sample(options: Sample) -> Path:
    """Writes `00000.png`, ... as batches are finished, and then `grid.png`; returns their folder.

    Images have the training data's channels and depth. With channels that PNG does not support, they are `.npy` arrays
    (C, H, W) of stored values. Images from earlier calls, recorded in `sample.jsonl` in the folder, are not made again
    unless the run or an option has changed.

    Raises:
        ValueError: an option does not fit the run, or images would be overwritten.
        RuntimeError: after the last batch, if some batches did not fit into memory.
    """
    options.check_paths()
    pipe = generation_pipeline(options)
    suffix = ".png" if has_png(pipe.unet.config.in_channels, pipe.pixel_range) else ".npy"
    job = _Job(options, pipe, suffix, Record(options.folder, "sample"))
    with job.record.opened(options.folder / GRID):
        job.run()
    return options.folder


def generation_pipeline(options: GenerationOptions) -> ImageGenerationPipeline:
    """Loads the run's pipeline with the sampler, on the device; a ValueError for more steps than the sampler has."""
    pipe = load_pipeline(ImageGenerationPipeline, options.run).to(best_device(options.device))
    name, steps = options.sampling
    pipe.scheduler = sampler(name, pipe.scheduler)
    check_steps(pipe.scheduler, steps)
    return pipe


def generate(
    options: GenerationOptions, pipe: ImageGenerationPipeline, output_type: str, part: range | None = None
) -> Any:
    """Generates all images, or those of `part`, in the pipeline's `output_type`."""
    labels, part = options.class_labels, range(options.count) if part is None else part
    (images,) = pipe(
        batch_size=len(part),
        num_inference_steps=options.sampling[1],
        class_labels=[labels[i % len(labels)] for i in part] if labels else None,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(keyed_seed(options.seed, "image", i)) for i in part],
        max_batch=options.max_batch,
        output_type=output_type,
        return_dict=False,
        mixed_precision=options.mixed_precision,
    )
    return images


class _Job:
    """One call of the command."""

    def __init__(self, options: Sample, pipe: ImageGenerationPipeline, suffix: str, record: Record) -> None:
        self.options, self.pipe, self.suffix, self.record = options, pipe, suffix, record
        self.names = [f"{i:05d}" for i in range(options.count)]

    def run(self) -> None:
        """Generates the batches that are not there, then the grid.

        The batches are the same as in an undisturbed call, since a batch of another size may round differently.
        """
        options = self.options
        batches = options.batches
        common = self._digest()
        made_by = {batch: f"{common}{OF_BATCH}{_shown(batch)}" for batch in batches}
        todo = {batch: missing for batch in batches if (missing := self._missing(batch, made_by[batch]))}
        self._check_free(todo)
        self._warn(todo, common)
        failures = {}
        with self.pipe.progress_bar(total=len(todo)) as progress, Behind() as behind:
            self.pipe.set_progress_bar_config(leave=False)  # the bar of a batch, below that of all
            for batch, missing in todo.items():
                try:
                    images = generate(options, self.pipe, "pil" if self.suffix == ".png" else "stored", batch)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failures[batch] = f"{reason_of(error)}; set max_batch to less than {len(batch)}."
                    self._note(missing, failures[batch])
                else:
                    for i in missing:
                        behind.do(partial(self._write, self.names[i], made_by[batch], images[i - batch.start]))
                progress.update()
        if failures:
            self.record.end(self.names)
            count = sum(map(len, (todo[batch] for batch in failures)))
            raise RuntimeError(
                f"{count} of {options.count} images failed, the others are in {options.folder}: "
                f"{next(iter(failures.values()))}"
            )
        self._write(GRID.removesuffix(".png"), "", self._grid(), ".png")
        self.record.end([*self.names, GRID.removesuffix(".png")])

    def _digest(self) -> str:
        options = self.options
        return digest(
            options.run,
            sampling=options.sampling,
            seed=options.seed,
            class_labels=options.class_labels,
            guidance_scale=options.guidance_scale,
            mixed_precision=settled_precision(options.mixed_precision, self.pipe.device),
        )

    def _missing(self, batch: range, made_by: str) -> list[int]:
        return [i for i in batch if not self.record.is_whole(self.names[i], [self.suffix], made_by)]

    def _check_free(self, todo: dict[range, list[int]]) -> None:
        """Raises a ValueError for a file that is not our own."""
        for name in (self.names[i] for missing in todo.values() for i in missing):
            self.record.check_free(Result(name), [name + self.suffix], self.options.overwrite)
        self.record.check_free(Result("grid"), [GRID], self.options.overwrite)

    def _warn(self, todo: dict[range, list[int]], common: str) -> None:
        """Reports which images are made again and why, and which images of other options are left."""
        again = {self.names[i]: batch for batch, missing in todo.items() for i in missing}
        others, divided, left = 0, 0, []
        for name, result in self.record.results.items():
            made_by, of_batch, images = result.made_by.partition(OF_BATCH)
            if name in again:
                others += of_batch != "" and made_by != common
                divided += made_by == common and images != _shown(again[name])
            elif name != GRID.removesuffix(".png") and made_by != common and self.record.is_there(result):
                left.append(name)
        if others:
            logger.warning("%d images were made by another run or with other options, and are made again", others)
        if divided:
            logger.warning(
                "%d images were made in other batches, since count or max_batch was another, and are made again, since "
                "they may round differently",
                divided,
            )
        if left:
            logger.warning(
                "%d images of another run or of other options are left in %s, such as %s; remove them if they are not "
                "to lie among these",
                len(left),
                self.options.folder,
                left[0],
            )

    def _write(self, name: str, made_by: str, image: Any, suffix: str | None = None) -> None:
        content = encoded_image(image) if isinstance(image, Image.Image) else encoded_array(image.cpu().numpy())
        result = Result(name, made_by=made_by)
        self.record.add(self.record.write(result, {name + (suffix or self.suffix): content}))

    def _note(self, missing: list[int], error: str) -> None:
        logger.warning("images %d to %d: %s", missing[0], missing[-1], error)
        for name in (self.names[i] for i in missing):
            self.record.note_failure(name, "", error)

    def _grid(self) -> Image.Image:
        """Returns the first images in a grid; they are read from files, since an earlier call may have made them."""
        paths = [self.options.folder / (name + self.suffix) for name in self.names[:MOST_IN_GRID]]
        if self.suffix == ".png":
            return grid([Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) for path in paths])
        return grid([Image.fromarray(np.load(path)[0].astype(np.float32)) for path in paths])


def _shown(batch: range) -> str:
    return f"{batch.start} to {batch.stop - 1}"
