"""Q1: the quality of snapshots, and the ratios of training times to equal quality.

Every snapshot is judged in the same way: by the Frechet distance between real images and images that the same sampler
makes from the same noise.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from safetensors import safe_open
from torch import Tensor

from scripts.benchmarks.result_row import Row
from scripts.experiments.time_to_quality.training import snapshot_path
from scripts.reports import label_ticks, markdown_table, save_figure
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, features_of
from unet_diffusion.evaluation.generation_metrics import frechet_distance
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

SAMPLER_STEPS = 20
ATTENTION_SIDE = 16  # pixels; the example's network has attention on maps of at most this side
OURS = "unet-diffusion"
PUBLISHED = "diffusers, as published"
TUNED = "diffusers, learning rate tuned"
TARGETS = {PUBLISHED: 30.0, TUNED: 10.0}  # times sooner


@dataclass(frozen=True)
class Point:
    """The quality of a snapshot.

    Attributes:
        step: optimizer steps before it.
        seconds: CPU seconds of training before it.
        distance: Frechet distance of its images.
        error: standard error of the distance.
    """

    step: int
    seconds: float
    distance: float
    error: float


def peer_network(side: int, channels: int, widths: tuple[int, ...]) -> UNet2DModel:
    """A `UNet2DModel` with attention on small maps, as in Ho et al. 2020.

    It normalises in as many groups as the widths allow, at most 32, since with as few parameters as ours its layers are
    narrow.

    Args:
        side: of the images in pixels; must be divisible by 2 for each resolution after the first.
        channels: of the images.
        widths: channels at each resolution, finest first; multiples of 8.
    """
    attends = [side >> level <= ATTENTION_SIDE for level in range(len(widths))]
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        norm_num_groups=math.gcd(32, *widths),
    )


def judge(
    folder: Path,
    step: int,
    network: UNet2DModel,
    scheduler: SchedulerMixin,
    features: FeatureNetwork,
    real: Tensor,
) -> Point:
    """The quality of a snapshot.

    Args:
        folder: folder of the run.
        step: step of the snapshot.
        network: a network of the run's architecture; the weights are loaded into it.
        scheduler: the sampler, with the noise schedule of the training.
        features: the feature network.
        real: features (N, D) of real images; as many are generated.
    """
    with safe_open(snapshot_path(folder, step), "pt") as file:
        network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118, not a mapping
        seconds = float(file.metadata()["seconds"])
    measured = frechet_distance(real, features_of(features, generate(network.eval(), scheduler, len(real))))
    return Point(step, seconds, measured.value, measured.error)


def generate(network: UNet2DModel, scheduler: SchedulerMixin, count: int) -> Tensor:
    """Images float32 (N, C, H, W) in [-1, 1]; image i always has the same noise."""
    unet = network if isinstance(network, UNet) else UNet2DAdapter.from_stock(network)
    pipe = ImageGenerationPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(keyed_seed(0, "image", i)) for i in range(count)]
    (images,) = pipe(
        batch_size=count,
        num_inference_steps=SAMPLER_STEPS,
        generator=generators,
        output_type="pt",
        return_dict=False,
    )
    return images * 2 - 1


def reached(points: list[Point], distance: float) -> Point | None:
    """The first point whose distance is at most `distance`, or None; nothing is interpolated."""
    return next(
        (point for point in sorted(points, key=lambda point: point.seconds) if point.distance <= distance), None
    )


def rows(curves: dict[str, list[Point]]) -> list[Row]:
    """How many times sooner ours reaches the quality that each peer has at the end of its training."""
    ours = [point for name, points in curves.items() if name.startswith(OURS) for point in points]
    found = []
    for peer, target in TARGETS.items():
        if not ours or not curves.get(peer):
            continue
        end = max(curves[peer], key=lambda point: point.seconds)
        work = f"training until the Frechet distance is that of the peer after {end.seconds:.0f} s"
        details = {name: [asdict(point) for point in points] for name, points in curves.items()}
        point = reached(ours, end.distance)
        if point is None:
            figure = f"not reached: {end.distance:.1f} +- {end.error:.1f}"
            found.append(Row("Q1", work, peer, figure, None, f"{target:g}x", False, details))
            continue
        sooner = end.seconds / point.seconds
        figure = (
            f"{sooner:.1f} times sooner, after {point.seconds:.0f} s: distance {point.distance:.1f} +- "
            f"{point.error:.1f} against {end.distance:.1f} +- {end.error:.1f}"
        )
        found.append(Row("Q1", work, peer, figure, sooner, f"{target:g}x", sooner >= target, details))
    return found


def points_table(curves: dict[str, list[Point]]) -> str:
    """All points as Markdown."""
    lines = [
        (name, str(point.step), f"{point.seconds:.1f}", f"{point.distance:.2f}", f"{point.error:.2f}")
        for name, points in curves.items()
        for point in points
    ]
    return markdown_table(("training", "steps", "seconds", "Frechet distance", "error"), lines)


def save_plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Draws distance against seconds, both on logarithmic axes, with standard errors as bars."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds of training", ylabel="Frechet distance")
    for axis in (axes.xaxis, axes.yaxis):
        label_ticks(axis, LogLocator(subs=(1, 2, 5)))
    for name, points in curves.items():
        columns = ([getattr(point, key) for point in points] for key in ("seconds", "distance", "error"))
        seconds, distances, errors = columns
        line = axes.errorbar(seconds, distances, errors, label=name, marker=".", capsize=2)
        if name in TARGETS:
            axes.axhline(distances[-1], color=line[0].get_color(), linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
