"""How near the pictures of a finished run are to real ones, written as a file."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unet_diffusion.atomic import write_json
from unet_diffusion.data import DataConfig, ImageDataset, load_images
from unet_diffusion.feature_networks import FeatureNetworkName, feature_network, features_of
from unet_diffusion.generation import GenerationOptions, best_device
from unet_diffusion.generation_metrics import Measurement, frechet_distance, kernel_distance, precision_recall
from unet_diffusion.output_folder import check_output


@dataclass
class EvaluateGeneration(GenerationOptions):
    """Compare generated pictures with real ones through a feature network."""

    data: DataConfig = field(default_factory=DataConfig)
    count: int = 512
    """Number of pictures to generate; as many real ones are used, or all there are."""
    features: FeatureNetworkName = "efficientnet-lite0"
    """Network whose features are compared: "efficientnet-lite0" (offline, extra `metrics`) or "inception" (downloads,
    extra `inception`). Figures of different networks cannot be compared."""
    output: Path | None = None
    """File of the figures; by default `generation.json` in the run's folder."""
    overwrite: bool = False
    """Replace figures that are there already."""


def evaluate_generation(config: EvaluateGeneration) -> str:
    """Writes the distances as JSON and returns them as a Markdown table.

    The real pictures are the training rows of the data, the first `count` of a fixed random order.

    Raises:
        ValueError: an option that does not fit the run, pictures of other channels than the run's, too few pictures, or
            figures that would be overwritten.
        ImportError: without the extra that the feature network needs.
    """
    output = config.output or config.run / "generation.json"
    check_output(output.parent)
    if output.exists() and not config.overwrite:
        raise ValueError(f"{output} exists already; set overwrite, or choose another output.")
    network = feature_network(config.features).to(best_device(config.device))
    pipe = config.pipeline()
    real = real_pictures(config.data, config.count)
    if real.shape[1] != pipe.unet.config.in_channels:
        raise ValueError(
            f"the real pictures have {real.shape[1]} channels, but the run generates {pipe.unet.config.in_channels}; "
            "set channels."
        )
    generated = config.generate(pipe, "pt").cpu() * 2 - 1  # from [0, 1]
    ours, theirs = features_of(network, generated), features_of(network, real)
    precision, recall = precision_recall(theirs, ours)
    figures = {
        "kernel distance": kernel_distance(theirs, ours),
        "Frechet distance": frechet_distance(theirs, ours),
        "precision": precision,
        "recall": recall,
    }
    measured = {name: asdict(figure) for name, figure in figures.items()}
    write_json(output, {"features": network.name, "options": asdict(config), "figures": measured})
    return table(figures, network.name)


def real_pictures(data: DataConfig, count: int) -> Tensor:
    """Pictures of the training rows, float32 (N, C, H, W) in [-1, 1], at most `count` of them."""
    pictures = load_images(data).train
    if not isinstance(pictures, ImageDataset):
        raise ValueError("streaming is set, but real pictures are drawn from the whole set; leave it out.")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return pictures.pixel_range.to_model(torch.stack([pictures[index]["image"] for index in order]))


def table(figures: dict[str, Measurement], network: str) -> str:
    """The figures with their errors and counts, as Markdown."""
    lines = [f"| {network} | value | error | pictures, real and generated |", "| --- | --- | --- | --- |"]
    for name, figure in figures.items():
        counts = f"{figure.real_count} and {figure.generated_count}"
        lines.append(f"| {name} | {figure.value:.4g} | {figure.error:.2g} | {counts} |")
    return "\n".join([*lines, "", *dict.fromkeys(figure.flag for figure in figures.values() if figure.flag)])
