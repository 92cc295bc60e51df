"""Compares the images of a finished run with real ones, and writes the figures as files."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unet_diffusion.checks import require
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.run_data import learnt_from, load_in_range, loading, own_images, own_record
from unet_diffusion.commands.sample import generate, generation_pipeline
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.drawn_images import DrawnImages, drawn
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import ImageSets, load_images
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import (
    SMALLEST_SAMPLE,
    Measurement,
    check_enough,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from unet_diffusion.evaluation.memorisation import CopySearch
from unet_diffusion.files import write_json
from unet_diffusion.images.axes import counted
from unet_diffusion.images.figures import save_image
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.saved_index import noise_head_run, saved_section
from unet_diffusion.saved_runs import best_device, stated_preparation
from unet_diffusion.unet import UNet

logger = logging.getLogger(__name__)

CROPS = (
    "the run learnt from crops at all places of its images, but only one crop of each is searched, so copies of other "
    "crops can be missed, and the share of near images can be too low."
)


@dataclass(frozen=True)
class RealImages:
    """The images that generated images are compared with; several runs on the same data can share them.

    Attributes:
        network: computes the features.
        training: images of the training rows, searched for copies.
        features: features of the first `count` training images, (count, D).
        held_out: images that were held out of training; None if there are none.
        note: sentences about images that the run was, or may have been, trained on although the data hold them out,
            about crops that are not searched, and about classes that are not generated; "" if there are none.
        mirrored: whether the run also learnt from mirrored images, so that copies of these are searched too.
    """

    network: FeatureNetwork
    training: DrawnImages
    features: Tensor
    held_out: DrawnImages | None
    note: str = ""
    mirrored: bool = False


def load_real(options: EvaluateGeneration, unet: UNet) -> RealImages:
    """Returns the real images for runs whose networks generate the same kind of images as this one.

    Without `data`, they are the images of the run in the options, divided as that run divided them. In other data,
    images that this run was trained on do not count as held out. All are cut and mirrored as the run learnt from them.

    Raises:
        ValueError: there are too few images, they have another size or other channels than the network generates, or
            none of the images that the run held out is there.
    """
    network = feature_network(options.features).to(best_device(options.device))
    network.check_channels(unet.config.in_channels)
    own = options.data.data is None
    data, run = options.data, options.run
    images = own_images(run, loading(data)) if own else load_as_learnt(data, run)
    if own and images.validation is None and own_record(options.run).held_out:
        raise ValueError(
            f"data is not given, and none of the images that the run in {options.run} held out is there; give data."
        )
    run = noise_head_run(run)  # whose record and options tell what was learnt from
    mirrored = learnt_mirrored(run)
    random = mirrored or (isinstance(images.train, ImageDataset) and images.train.random)
    as_learnt = {"random": random, "flip": mirrored}
    training = drawn(images.train, max(options.count, options.training_images), **as_learnt)
    check_same_images(training, unet)
    first = training.first(options.count)
    check_enough(len(first), options.count)
    new, note = untrained(images.validation, run)
    held_out = None if new is None else drawn(new, options.count, **as_learnt)
    crops = CROPS if training.random and training.are_cut else ""
    note = " ".join(filter(None, [note, crops, of_some_classes(options.class_labels, unet)]))
    return RealImages(network, training, features_of(network, first), held_out, note, mirrored)


def of_some_classes(labels: Sequence[str | int], unet: UNet) -> str:
    """Returns a sentence on images that are generated of some classes only; "" if they are of all, or of none."""
    if not labels or len(set(labels)) == unet.config.num_class_embeds:
        return ""
    named = ", ".join(map(str, dict.fromkeys(labels)))
    return (
        f"images of only some classes were generated ({named}), but the real images are of all classes of the data, so "
        "the figures also measure this difference; give data that hold the same classes alone."
    )


def learnt_mirrored(run: Path) -> bool:
    """Returns whether a run also learnt from mirrored images; False for a pipeline alone, which does not say."""
    return bool((saved_section(run, "data") or {}).get("flip", False))


def load_as_learnt(data: DataConfig, run: Path) -> ImageSets:
    """Loads images as a run converts them, in the range of values that it generates.

    The options may state other channels or axes, but only the same range.

    Raises:
        ValueError: the options state another range, or the images have another data type; also the errors of
            `load_images`.
    """
    data = data.converted_like(stated_preparation(run))
    images = load_in_range(data, run)
    if data.value_range is not None or data.percentiles is not None:
        stated, learnt = load_images(data).train.pixel_range, images.train.pixel_range
        if stated != learnt:
            raise ValueError(
                f"the real images are mapped by {stated}, but those of the run by {learnt}; leave value_range and "
                "percentiles out, and they are mapped as those of the run."
            )
    return images


def check_same_images(real: DrawnImages, unet: UNet) -> None:
    """Raises a ValueError unless real images have the channels and size of the images that a network generates."""
    channels, size = unet.config.in_channels, unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if real.shape[1] != channels:
        raise ValueError(
            f"the real images have {counted(real.shape[1], 'channel')}, but the run generates {channels}; set channels."
        )
    if real.shape[2:] != (height, width):
        raise ValueError(
            f"the real images have {real.shape[3]}x{real.shape[2]} pixels, but the run generates {width}x{height}; set "
            "image_size, and crop_size if the run was trained on crops."
        )


def untrained(validation: ImageDataset | None, run: Path) -> tuple[ImageDataset | None, str]:
    """Returns the held-out images without those that a run was trained on, and a sentence about the latter.

    If no image is left, they are None. If the run streamed its images, all images stay, and the sentence says so.
    """
    if validation is None:
        return None, ""
    record = DataRecord.read(run)
    if record is not None and record.streamed and not np.isin(validation.ids(), record.held_out).all():
        note = (
            "the run streamed its images and kept no list of them, so it is not known whether it was trained on those "
            f"that these data hold out ({counted(len(validation), 'image')}); if so, the comparison with held-out "
            "images hides copies."
        )
        logger.warning(note)
        return validation, note
    known = learnt_from(validation, record)
    if not known.any():
        return validation, ""
    note = (
        f"the run was trained on {known.sum()} of the {len(known)} images that these data hold out; they are left out "
        "of the comparison with held-out images."
    )
    logger.warning(note)
    return (None if known.all() else validation.only(~known)), note


def evaluate_generation(
    options: EvaluateGeneration, real: RealImages | None = None, generated: Iterable[Tensor] | None = None
) -> str:
    """Writes the figures as JSON and the pairs as PNG, and returns the figures as Markdown.

    The images are generated, turned into features and compared with the training images batch by batch.

    Args:
        options: the run, and how it is measured.
        real: as `load_real` returns it for these options; loaded by default.
        generated: the images that the run generates with these options, in batches (B, C, H, W) in [0, 1]; generated by
            default.

    Raises:
        ValueError: an option does not fit the run, the feature network does not take its images, the images have
            another size or other channels than the run's, there are too few images, or figures would be overwritten.
        ImportError: the extra that the feature network needs is not installed.
    """
    options.check_paths()
    enough = f"must be at least {SMALLEST_SAMPLE}, since fewer say nothing about a distribution"
    require(options.count >= SMALLEST_SAMPLE, "count", options.count, enough)
    figures_file, pairs_file = options.files
    if real is None or generated is None:
        pipe = generation_pipeline(options)
        real = real or load_real(options, pipe.unet)
        generated = generated_batches(options, pipe) if generated is None else generated
    features = []
    copies = CopySearch(real.training.first(options.training_images), mirrored=real.mirrored)
    for batch in generated:
        images = batch.cpu() * 2 - 1
        features.append(features_of(real.network, images))
        copies.add(images)
    ours, theirs = torch.cat(features), real.features
    precision, recall = precision_recall(theirs, ours)
    figures = {
        "kernel distance": kernel_distance(theirs, ours),
        "Frechet distance": frechet_distance(theirs, ours),
        "precision": precision,
        "recall": recall,
    }
    scores, pairs = copies.scores(real.held_out)
    save_image(pairs, pairs_file)
    measured = {name: asdict(figure) for name, figure in figures.items()}
    sampler, steps = options.sampling
    resolved = asdict(options) | {"sampler": sampler, "steps": steps}
    results = {"features": real.network.name, "options": resolved, "figures": measured}
    write_json(figures_file, {**results, "memorisation": asdict(scores), "note": real.note})
    return "\n".join([table(figures, real.network.name), str(scores), *([real.note] if real.note else [])])


def generated_batches(options: EvaluateGeneration, pipe: ImageGenerationPipeline) -> Iterator[Tensor]:
    """Generates the images that `generate` does, `max_batch` at a time, (B, C, H, W) in [0, 1]."""
    with pipe.progress_bar(total=len(options.batches)) as progress:
        pipe.set_progress_bar_config(leave=False)  # the bar of a batch, below that of all
        for batch in options.batches:
            yield generate(options, pipe, "pt", batch)
            progress.update()


def table(figures: dict[str, Measurement], network: str) -> str:
    """Returns the figures with their errors and counts, as Markdown."""
    lines = [f"| {network} | value | error | images, real and generated |", "| --- | --- | --- | --- |"]
    for name, figure in figures.items():
        counts = f"{figure.real_count} and {figure.generated_count}"
        lines.append(f"| {name} | {figure.value:.4g} | {figure.error:.2g} | {counts} |")
    return "\n".join([*lines, "", *dict.fromkeys(figure.flag for figure in figures.values() if figure.flag)])
