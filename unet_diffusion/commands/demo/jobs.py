"""The jobs behind a run's page: generate, segment, enlarge.

Each job works on a copy of a pipeline that shares the networks, so that visitors do not share samplers or progress. It
reads an upload as the library reads a file.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from unet_diffusion.checks import is_count, require
from unet_diffusion.commands.demo.images import Reader, as_rgb, fitted, heat, read_upload, viewed
from unet_diffusion.commands.object_tables import LABELS, OBJECTS, encoded_objects
from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.sample import generate
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.low_resolution import enlarged
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import array_images, encoded_labels, save_image, save_stored
from unet_diffusion.images.palette import colour, overlay
from unet_diffusion.images.pixel_size import known_pixel_size
from unet_diffusion.network.config import needs_class
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_index import INDEX, SUPER_RESOLUTION, check_run, read_object, saved_kind
from unet_diffusion.saved_runs import best_device, load_pipeline

T = TypeVar("T")
ReportSteps = Callable[[int, int], Any]  # takes the number of finished steps and of all steps

MAX_COUNT = 64  # images per request
MAX_STEPS = 1000
MAX_BATCH = 16  # images in the network at once
MAX_ENLARGED = 4096 * 4096  # pixels of a large image
MAX_PROBABILITIES = 2**28  # of an image, 1 GiB; above this, there is no uncertainty map and there are no objects
NO_CLASS, EVERY_CLASS = "none", "each"


@dataclass(frozen=True)
class Abilities:
    """The pipelines as which a run can be loaded; None for those as which it cannot."""

    generation: ImageGenerationPipeline | None = None
    segmentation: SegmentationPipeline | None = None
    super_resolution: SuperResolutionPipeline | None = None

    @property
    def reader(self) -> Reader | None:
        """The pipeline that takes images."""
        return self.segmentation or self.super_resolution


@dataclass(frozen=True)
class Segmented:
    """An image with its mask."""

    image: Image.Image  # RGB, at the size on the page
    mask: np.ndarray  # class of each pixel, (H, W)
    palette: list[list[int]] | None
    uncertainty: Image.Image | None  # entropy from 0 (black) to 1; None if the image is too large
    legend: list[tuple[str, tuple[int, int, int], float]]  # of each class: name, colour, share of the whole image
    file: Path  # the mask of the whole image, a PNG of class indices
    objects: "FoundObjects | None" = None  # None if they were not asked for, or the image is too large

    def overlay(self, opacity: float) -> Image.Image:
        """Draws the classes in colour over the image, and the outlines of objects, without running the network."""
        require(0 <= opacity <= 1, "opacity", opacity, "must be from 0 to 1")
        labels = None if self.objects is None else self.objects.labels
        return overlay(self.image, self.mask, opacity, self.palette, labels)


@dataclass(frozen=True)
class FoundObjects:
    """The objects of an image."""

    labels: np.ndarray  # numbers of the objects at the size on the page, (H, W), 0 for the background
    counts: list[int]  # number of objects of each class; 0 for the background
    label_file: Path  # numbers of the objects in the whole image, as `unet-diffusion segment --instances` writes them
    table_file: Path  # CSV, as the same command writes it


@dataclass(frozen=True)
class Enlarged:
    """An image enlarged by the network and without it, RGB at the size on the page."""

    large: Image.Image
    bicubic: Image.Image
    file: Path  # the large image as `unet-diffusion upscale` writes it


@dataclass
class Steps:
    """Replaces a pipeline's progress bar and reports the progress to a page."""

    total: int
    report: ReportSteps
    done: int = 0

    def update(self, count: int = 1) -> None:
        """Counts finished steps."""
        self.done += count
        self.report(self.done, self.total)


def load_abilities(run: Path, device: str) -> Abilities:
    """Loads a run once for each task that it was trained for; a segmentation run may also generate images."""
    check_run(run)
    place, kind = best_device(device), saved_kind(run)
    if kind == SUPER_RESOLUTION:
        return Abilities(super_resolution=load_pipeline(SuperResolutionPipeline, run).to(place))
    if kind != SegmentationPipeline.__name__:
        return Abilities(generation=load_pipeline(ImageGenerationPipeline, run).to(place))
    joint = "_label_names" in read_object(run / INDEX)  # trained to predict noise too
    return Abilities(
        generation=load_pipeline(ImageGenerationPipeline, run).to(place) if joint else None,
        segmentation=load_pipeline(SegmentationPipeline, run).to(place),
    )


def class_choices(pipe: ImageGenerationPipeline) -> list[tuple[str, str]]:
    """The choices of a class, each as words and as the value for `generate_images`; empty without classes."""
    classes = pipe.unet.config.num_class_embeds
    if classes is None:
        return []
    names = pipe.label_names or [f"class {label}" for label in range(classes)]
    free = [("without a class", NO_CLASS)] if may_omit_class(pipe) else []
    return [("each in turn", EVERY_CLASS), *free, *((name, str(label)) for label, name in enumerate(names))]


def can_guide(pipe: ImageGenerationPipeline) -> bool:
    """Returns whether a class can guide the images; a network tuned for a few steps does not support this."""
    return may_omit_class(pipe) and pipe.few_steps is None


def may_omit_class(pipe: ImageGenerationPipeline) -> bool:
    """Returns whether the network was also trained without classes."""
    return pipe.unet.config.num_class_embeds is not None and not needs_class(pipe.unet.config)


def generate_images(
    pipe: ImageGenerationPipeline,
    count: int,
    steps: int,
    sampler_name: SamplerName,
    seed: int,
    choice: str,
    guidance_scale: float,
    report: ReportSteps,
) -> list[Image.Image]:
    """Generates the images that `unet-diffusion sample` makes with the same options.

    `choice` is the index of a class, `EVERY_CLASS` for all classes in turn, or `NO_CLASS`.
    """
    _check_bound("count", count, MAX_COUNT)
    _check_sampling(steps, seed)
    names = tuple(pipe.label_names or map(str, range(pipe.unet.config.num_class_embeds or 0)))
    labels = {str(index): name for index, name in enumerate(names)}
    options = GenerationOptions(
        count=count,
        sampler=sampler_name,
        steps=steps,
        seed=seed,
        class_labels=() if choice == NO_CLASS else names if choice == EVERY_CLASS else (labels.get(choice, choice),),
        guidance_scale=guidance_scale,
        max_batch=MAX_BATCH,
    )
    own = _own_copy(pipe, report)
    own.scheduler = sampler(sampler_name, pipe.scheduler)
    return array_images(generate(options, own, "np"))


def learnt_objects(pipe: SegmentationPipeline) -> bool:
    """Returns whether the network of a run has learnt to tell objects apart."""
    return pipe.classifier is None and bool(pipe.unet.config.get("instances"))


def segment_image(
    pipe: SegmentationPipeline, source: Path, folder: Path, report: ReportSteps, instances: bool = False
) -> Segmented:
    """Segments one image file, and writes the mask and the files of its objects below `folder`."""
    stored = read_upload(source, pipe)
    image = viewed(pipe, stored)
    height, width = stored.shape[1:]
    fits = height * width * pipe.num_classes <= MAX_PROBABILITIES
    own = _own_copy(pipe, report)
    (mask,), _, uncertainty, *found = own(
        stored,
        return_probabilities=fits,
        return_dict=False,
        mixed_precision="auto",
        instances=instances and fits,
        pixel_size=known_pixel_size(source.read_bytes()) if instances and fits else None,
    )
    counts = np.bincount(np.asarray(mask).ravel(), minlength=pipe.num_classes)
    names = pipe.class_names or [f"class {label}" for label in range(pipe.num_classes)]
    colours = [(red, green, blue) for red, green, blue in pipe.palette or map(colour, range(pipe.num_classes))]
    file = Path(mkdtemp(dir=folder)) / f"{source.stem}-mask.png"
    save_image(mask, file)
    objects = None
    if found:
        ((numbers,), rows) = found
        label_file, table_file = (file.with_name(f"{source.stem}{ending}") for ending in (LABELS, OBJECTS))
        label_file.write_bytes(encoded_labels(numbers))
        table_file.write_bytes(encoded_objects(rows))
        shown = np.asarray(fitted(Image.fromarray(numbers)))
        of_class = np.bincount(rows["class"], minlength=pipe.num_classes)
        objects = FoundObjects(shown, of_class.tolist(), label_file, table_file)
    return Segmented(
        image=fitted(image),
        mask=np.asarray(fitted(mask)),
        palette=pipe.palette,
        uncertainty=fitted(heat(uncertainty[0])) if fits else None,
        legend=[(name, shade, count / counts.sum()) for name, shade, count in zip(names, colours, counts)],
        file=file,
        objects=objects,
    )


def enlarge_image(
    pipe: SuperResolutionPipeline,
    source: Path,
    steps: int,
    sampler_name: SamplerName,
    seed: int,
    folder: Path,
    report: ReportSteps,
) -> Enlarged:
    """Enlarges one image file, as `unet-diffusion upscale` does, and writes the large image below `folder`."""
    _check_sampling(steps, seed)
    small = read_upload(source, pipe)
    height, width = (side * pipe.scale for side in small.shape[1:])
    if height * width > MAX_ENLARGED:
        raise ValueError(
            f"the large image would have {width}x{height} pixels, but the page makes at most {MAX_ENLARGED}; enlarge "
            "it with `unet-diffusion upscale`."
        )
    own = _own_copy(pipe, report)
    own.scheduler = sampler(sampler_name, pipe.scheduler)
    generator = keyed_generator(seed, "upscale", source.stem)
    ((stored,),) = own(small, steps, generator, output_type="stored", return_dict=False, mixed_precision="auto")
    suffix = ".png" if has_png(pipe.channels, pipe.pixel_range) else ".npy"
    file = Path(mkdtemp(dir=folder)) / f"{source.stem}-large{suffix}"
    save_stored(stored, file)
    bicubic = enlarged(small[None], pipe.scale, pipe.pixel_range)[0]
    return Enlarged(
        large=fitted(as_rgb(pipe.pixel_range.to_model(stored), pipe.pixel_range)),
        bicubic=fitted(as_rgb(bicubic, pipe.pixel_range)),
        file=file,
    )


def _own_copy(pipe: T, report: ReportSteps) -> T:
    """Copies a pipeline with the same networks; the copy's scheduler can be replaced, and it reports progress."""
    own: Any = copy(pipe)
    own.progress_bar = lambda total: nullcontext(Steps(total, report))
    return own


def _check_sampling(steps: Any, seed: Any) -> None:
    _check_bound("steps", steps, MAX_STEPS)
    require(isinstance(seed, int), "seed", seed, "must be an integer; 0 is usual")


def _check_bound(name: str, value: Any, largest: int) -> None:
    valid = is_count(value) and value <= largest
    require(valid, name, value, f"must be an integer from 1 to {largest} on this page")
