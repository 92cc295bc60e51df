"""Compares the images of a finished run with real ones, and writes the figures as files."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.run_data import learnt_from, own_images
from unet_diffusion.commands.sample import generate, generation_pipeline
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import (
    Measurement,
    check_enough,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from unet_diffusion.evaluation.memorisation import memorisation
from unet_diffusion.files import write_json
from unet_diffusion.images.figures import save_image
from unet_diffusion.saved_runs import best_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RealImages:
    """The images that generated ones are compared with; several runs on the same data can share them.

    Attributes:
        network: computes the features.
        training: images (N, C, H, W) in [-1, 1] of the training rows, among which copies are looked for.
        features: of the first `count` of them, (count, D).
        held_out: images that were held out of training; None where there are none.
        note: a sentence about images that the run was trained on although the data hold them out, or "".
    """

    network: FeatureNetwork
    training: Tensor
    features: Tensor
    held_out: Tensor | None
    note: str = ""


def load_real(options: EvaluateGeneration, channels: int) -> RealImages:
    """Returns the real images for runs that generate images with these channels.

    Without `data`, they are those of the run of the options, divided as it divided them. Of other data, images that
    this run was trained on are not held out.
    """
    network = feature_network(options.features).to(best_device(options.device))
    network.check_channels(channels)
    images = own_images(options.run) if options.data.data is None else load_images(options.data)
    training = drawn(images.train, max(options.count, options.training_images))
    if training.shape[1] != channels:
        raise ValueError(
            f"the real images have {training.shape[1]} channels, but the run generates {channels}; set channels."
        )
    new, note = untrained(images.validation, options.run)
    held_out = None if new is None else drawn(new, options.count)
    features = features_of(network, training[: options.count])
    return RealImages(network, training, features, held_out, note)


def untrained(validation: ImageDataset | None, run: Path) -> tuple[ImageDataset | None, str]:
    """Returns the held-out images without those that a run was trained on, and a sentence about these.

    No image left is None.
    """
    if validation is None:
        return None, ""
    known = learnt_from(validation, DataRecord.read(run))
    if not known.any():
        return validation, ""
    note = (
        f"the run was trained on {known.sum()} of the {len(known)} images that these data hold out; they are left out "
        "of the comparison with held-out images."
    )
    logger.warning(note)
    return (None if known.all() else validation.only(~known)), note


def evaluate_generation(
    options: EvaluateGeneration, real: RealImages | None = None, generated: Tensor | None = None
) -> str:
    """Writes the figures as JSON and the pairs as PNG, and returns the figures as Markdown.

    Args:
        options: the run, and how it is measured.
        real: as `load_real` gives it for these options; by default it is loaded.
        generated: the images that the run generates with these options, (N, C, H, W) in [0, 1]; by default they are
            generated.

    Raises:
        ValueError: an option that does not fit the run, a feature network that does not take its images, images of
            other channels than the run's, too few images, or figures that would be overwritten.
        ImportError: without the extra that the feature network needs.
    """
    options.check_paths()
    figures_file, pairs_file = options.files
    if real is None or generated is None:
        pipe = generation_pipeline(options)
        real = real or load_real(options, pipe.unet.config.in_channels)
        check_enough(len(real.features), options.count)  # before the images are generated, which takes long
        generated = generate(options, pipe, "pt") if generated is None else generated
    generated = generated.cpu() * 2 - 1
    ours, theirs = features_of(real.network, generated), real.features
    precision, recall = precision_recall(theirs, ours)
    figures = {
        "kernel distance": kernel_distance(theirs, ours),
        "Frechet distance": frechet_distance(theirs, ours),
        "precision": precision,
        "recall": recall,
    }
    copies, pairs = memorisation(generated, real.training[: options.training_images], real.held_out)
    save_image(pairs, pairs_file)
    measured = {name: asdict(figure) for name, figure in figures.items()}
    sampler, steps = options.sampling
    resolved = asdict(options) | {"sampler": sampler, "steps": steps}
    results = {"features": real.network.name, "options": resolved, "figures": measured}
    write_json(figures_file, {**results, "memorisation": asdict(copies), "note": real.note})
    return "\n".join([table(figures, real.network.name), str(copies), *([real.note] if real.note else [])])


def drawn(images: ImageDataset | StreamingImages, count: int) -> Tensor:
    """Returns at most `count` images in a fixed random order, float32 (N, C, H, W) in [-1, 1]."""
    if not isinstance(images, ImageDataset):
        raise ValueError("streaming is set, but real images are drawn from the whole set; leave it out.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return images.pixel_range.to_model(torch.stack([images[index]["image"] for index in order]))


def table(figures: dict[str, Measurement], network: str) -> str:
    """Returns the figures with their errors and counts, as Markdown."""
    lines = [f"| {network} | value | error | images, real and generated |", "| --- | --- | --- | --- |"]
    for name, figure in figures.items():
        counts = f"{figure.real_count} and {figure.generated_count}"
        lines.append(f"| {name} | {figure.value:.4g} | {figure.error:.2g} | {counts} |")
    return "\n".join([*lines, "", *dict.fromkeys(figure.flag for figure in figures.values() if figure.flag)])
