"""Draws the windows of networks on an image, as `unet_diffusion.network.tiling` places them."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scripts.reports import save_figure
from unet_diffusion import UNet
from unet_diffusion.network.tiling import Tiling

SIDE = 1024  # pixels of the image
TILE = 256
DRAWN = {"tab:orange": 0, "tab:blue": 2}  # windows by colour: the first and the third in both directions


@dataclass
class Drawing:
    """Draw the windows of a padded, an unpadded and a blended network."""

    output: Path = Path("docs/images/tiling.png")
    """The PNG to write."""


def draw_windows(axes: Axes, tiling: Tiling) -> None:
    """Draws the input of two windows (dashed) and the part of their output that is used (filled)."""
    spans = tiling.spans(SIDE)
    axes.add_patch(Rectangle((0, 0), SIDE, SIDE, facecolor="0.92", edgecolor="0.3"))
    cuts = [span.pieces[0].start for span in spans[1:]]
    axes.vlines(cuts, 0, SIDE, color="0.6", linewidth=0.8)
    axes.hlines(cuts, 0, SIDE, color="0.6", linewidth=0.8)
    for colour, number in DRAWN.items():
        given, (used,) = tiling.input_range(spans[number]), spans[number].pieces
        corner, side = (given.start, given.start), len(given)
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.5, linestyle="--"))
        corner, side = (used.start, used.start), used.stop - used.start
        axes.add_patch(Rectangle(corner, side, side, facecolor=colour, alpha=0.6))
    axes.set(xlim=(-130, SIDE + 130), ylim=(SIDE + 130, -130), aspect="equal")


def draw_weights(axes: Axes, tiling: Tiling) -> None:
    """Draws the weights of the outputs of all windows along one side."""
    for span in tiling.spans(SIDE):
        weights = torch.zeros(span.stop - span.start)
        for piece in span.pieces:
            weights[piece.start - span.start : piece.stop - span.start] = piece.weights
        axes.plot(range(span.start, span.stop), weights)
    axes.set(xlabel="pixel along a side", ylabel="weight", xlim=(0, SIDE))


def draw(options: Drawing) -> Path:
    """Writes the image and returns its path."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    padded, unpadded, blended = figure.subplots(1, 3)
    with torch.device("meta"):
        networks = [UNet.from_preset("ronneberger-2015", padding=padding) for padding in ("same", "valid")]
        attending = UNet.from_preset("small-32", num_classes=2)
    draw_windows(padded, Tiling.of(networks[0], TILE))
    draw_windows(unpadded, Tiling.of(networks[1], TILE))
    draw_weights(blended, Tiling.of(attending, TILE))
    padded.set_title("padded: cut inside the image")
    unpadded.set_title("unpadded: mirrored beyond its border")
    blended.set_title("statistics over space: blended")
    return save_figure(figure, options.output)


if __name__ == "__main__":
    print(draw(tyro.cli(Drawing)))
