"""How near the images of a finished run are to real ones, written as a file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unet_diffusion.commands.sample import GenerationOptions, best_device
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import (
    Measurement,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from unet_diffusion.evaluation.memorisation import memorisation
from unet_diffusion.files import check_output, write_json
from unet_diffusion.images.figures import save_image


@dataclass
class EvaluateGeneration(GenerationOptions):
    """Compare generated images with real ones through a feature network."""

    data: DataConfig = field(default_factory=DataConfig)
    count: int = 512
    """Number of images to generate; as many real ones are used, or all there are."""
    features: str = "efficientnet-lite0"
    """Network whose features are compared: "efficientnet-lite0" (offline, extra `metrics`), "inception" (downloads,
    extra `inception`), or the folder of a finished run of `train-classifier`, for images like those that it learned
    from. Figures of different networks cannot be compared."""
    training_images: int = 10_000
    """Images of the training set among which the nearest one of every generated image is looked for."""
    output: Path | None = None
    """File of the figures; by default `generation.json` in the run's folder. A PNG of the same name shows the generated
    images that are nearest to a training image, each beside that one."""
    overwrite: bool = False
    """Replace figures that are there already."""

    def __post_init__(self) -> None:
        """Checks the numbers of images."""
        super().__post_init__()
        if self.training_images < 1:
            raise ValueError(f"training_images is {self.training_images}, but must be at least 1.")

    def network(self) -> FeatureNetwork:
        """The network that sees the features, on the device."""
        return feature_network(self.features).to(best_device(self.device))


@dataclass(frozen=True)
class RealImages:
    """What generated images are compared with; several runs on the same data can share it.

    Attributes:
        network: sees the features.
        training: images (N, C, H, W) in [-1, 1] of the training rows, among which copies are looked for.
        features: of the first `count` of them, (count, D).
        held_out: images that were held out of training, or None where there are none.
    """

    network: FeatureNetwork
    training: Tensor
    features: Tensor
    held_out: Tensor | None


def load_real(config: EvaluateGeneration, network: FeatureNetwork, channels: int) -> RealImages:
    """The real side of `evaluate_generation`: the training rows of the data, the first of a fixed random order.

    Args:
        config: data and counts; the run is not read.
        network: sees the features.
        channels: of the images that the run generates.

    Raises:
        ValueError: a feature network that does not take these images, or images of other channels.
    """
    network.check_channels(channels)
    images = load_images(config.data)
    training = drawn(images.train, max(config.count, config.training_images))
    if training.shape[1] != channels:
        raise ValueError(
            f"the real images have {training.shape[1]} channels, but the run generates {channels}; set channels."
        )
    held_out = None if images.validation is None else drawn(images.validation, config.count)
    features = features_of(network, training[: config.count])
    return RealImages(network, training, features, held_out)


def evaluate_generation(config: EvaluateGeneration, real: RealImages | None = None) -> str:
    """Writes the figures as JSON and the pairs as PNG, and returns the figures as Markdown.

    Args:
        config: the run, and how it is measured.
        real: as `load_real` gives it for this config; by default it is loaded.

    Raises:
        ValueError: an option that does not fit the run, a feature network that does not take its images, images of
            other channels than the run's, too few images, or figures that would be overwritten.
        ImportError: without the extra that the feature network needs.
    """
    output = config.output or config.run / "generation.json"
    check_output(output.parent)
    pairs_file = output.with_suffix(".png")
    if pairs_file == output:
        raise ValueError(f"output is {output}, but .png is for the pairs beside the figures; give it another suffix.")
    for path in (output, pairs_file):
        if path.exists() and not config.overwrite:
            raise ValueError(f"{path} exists already; set overwrite, or choose another output.")
    network = real.network if real else config.network()
    pipe = config.pipeline()
    real = real or load_real(config, network, pipe.unet.config.in_channels)
    generated = config.generate(pipe, "pt").cpu() * 2 - 1  # from [0, 1]
    ours, theirs = features_of(network, generated), real.features
    precision, recall = precision_recall(theirs, ours)
    figures = {
        "kernel distance": kernel_distance(theirs, ours),
        "Frechet distance": frechet_distance(theirs, ours),
        "precision": precision,
        "recall": recall,
    }
    copies, pairs = memorisation(generated, real.training[: config.training_images], real.held_out)
    save_image(pairs, pairs_file)
    measured = {name: asdict(figure) for name, figure in figures.items()}
    results = {"features": network.name, "options": asdict(config), "figures": measured}
    write_json(output, {**results, "memorisation": asdict(copies)})
    return f"{table(figures, network.name)}\n{copies}"


def real_images(data: DataConfig, count: int) -> Tensor:
    """Images of the training rows, float32 (N, C, H, W) in [-1, 1], at most `count` of them."""
    return drawn(load_images(data).train, count)


def drawn(images: ImageDataset | StreamingImages, count: int) -> Tensor:
    """The first images in a fixed random order."""
    if not isinstance(images, ImageDataset):
        raise ValueError("streaming is set, but real images are drawn from the whole set; leave it out.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return images.pixel_range.to_model(torch.stack([images[index]["image"] for index in order]))


def table(figures: dict[str, Measurement], network: str) -> str:
    """The figures with their errors and counts, as Markdown."""
    lines = [f"| {network} | value | error | images, real and generated |", "| --- | --- | --- | --- |"]
    for name, figure in figures.items():
        counts = f"{figure.real_count} and {figure.generated_count}"
        lines.append(f"| {name} | {figure.value:.4g} | {figure.error:.2g} | {counts} |")
    return "\n".join([*lines, "", *dict.fromkeys(figure.flag for figure in figures.values() if figure.flag)])
