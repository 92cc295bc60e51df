"""Q1: the quality of trained networks, and the ratios of training times to equal quality.

Every network is judged in the same way: by the Frechet distance between real images and images that the same sampler
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
from torch import Tensor

from scripts.benchmarks.result_row import Row
from scripts.reports import label_ticks, markdown_table, save_figure
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, features_of
from unet_diffusion.evaluation.generation_metrics import Measurement, frechet_distance
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

ATTENTION_SIDE = 16  # pixels; the example's network has attention at the resolution nearest to it, as in Ho et al. 2020
OF_A_GROUP = 4  # channels at least, as in the published network: 128 in 32 groups
OURS = "unet-diffusion"
PUBLISHED = "diffusers, as published"
TUNED = "diffusers, learning rate tuned"
TARGETS = {PUBLISHED: 30.0, TUNED: 10.0}  # times sooner


@dataclass(frozen=True)
class Point:
    """The quality of a run.

    Attributes:
        run: its label.
        steps: its optimizer steps.
        seconds: CPU seconds of these.
        distance: Frechet distance of its images.
        error: standard error of the distance.
    """

    run: str
    steps: int
    seconds: float
    distance: float
    error: float


def peer_network(side: int, channels: int, widths: tuple[int, ...]) -> UNet2DModel:
    """A `UNet2DModel` with attention at one resolution and in the middle, as in Ho et al. 2020.

    It normalises in as many groups as its narrow layers allow, at most 32. A group of a single channel would lose the
    timestep, which a block adds to whole channels just before it normalises them.

    Args:
        side: of the images in pixels; must be divisible by 2 for each resolution after the first.
        channels: of the images.
        widths: channels at each resolution, finest first; multiples of 8.
    """
    sides = [side >> level for level in range(len(widths))]
    attends = [each == min(sides, key=lambda x: abs(x - ATTENTION_SIDE)) for each in sides]
    shared = math.gcd(*widths)
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        norm_num_groups=max(n for n in range(1, 33) if shared % n == 0 and (n == 1 or min(widths) >= OF_A_GROUP * n)),
    )


def judge(
    network: UNet2DModel, scheduler: SchedulerMixin, steps: int, features: FeatureNetwork, real: Tensor
) -> Measurement:
    """The Frechet distance of a network's images.

    Args:
        network: the trained network.
        scheduler: the sampler, with the noise schedule of the training.
        steps: of the sampler.
        features: the feature network.
        real: features (N, D) of real images; as many are generated.
    """
    return frechet_distance(real, features_of(features, generate(network.eval(), scheduler, steps, len(real))))


def generate(network: UNet2DModel, scheduler: SchedulerMixin, steps: int, count: int) -> Tensor:
    """Images float32 (N, C, H, W) in [-1, 1]; image i always has the same noise."""
    unet = network if isinstance(network, UNet) else UNet2DAdapter.from_stock(network)
    pipe = ImageGenerationPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(keyed_seed(0, "image", i)) for i in range(count)]
    (images,) = pipe(
        batch_size=count,
        num_inference_steps=steps,
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


def end_of(points: list[Point]) -> Point:
    """The peer's run that ours has to reach: the shortest that is as near as its nearest, within their errors."""
    best = min(points, key=lambda point: point.distance)
    level = [point for point in points if point.distance <= best.distance + math.hypot(point.error, best.error)]
    return min(level, key=lambda point: point.seconds)


def rows(curves: dict[str, list[Point]]) -> list[Row]:
    """How many times sooner ours reaches the quality of each peer."""
    ours = curves.get(OURS, [])
    found = []
    for peer, target in TARGETS.items():
        if not ours or not curves.get(peer):
            continue
        end = end_of(curves[peer])
        work = f"training until the Frechet distance is that of {end.run} after {end.seconds:.0f} s"
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
        (point.run, str(point.steps), f"{point.seconds:.1f}", f"{point.distance:.2f}", f"{point.error:.2f}")
        for points in curves.values()
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
        line = axes.errorbar(seconds, distances, errors, label=name, fmt=".", capsize=2)
        if name in TARGETS:
            axes.axhline(end_of(points).distance, color=line[0].get_color(), linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
