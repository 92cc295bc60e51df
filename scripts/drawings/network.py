"""Draws a network as the U of Ronneberger, Fischer and Brox (2015), figure 1, from the shapes of one forward pass.

Every box is the output of a module, with its channels above and its height and width below.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from scripts.reports import save_figure
from unet_diffusion import UNet
from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.blocks import Blocks
from unet_diffusion.saved_runs import load_unet

# All lengths are in units of the drawing.
PITCH = 1.36  # from one column of boxes to the next
TALLEST, WIDEST, THINNEST = 2.8, 0.66, 0.16  # boxes
BETWEEN = 1.15  # from one level to the next, for a size, an arrow and a number of channels
GAP, UNDER, OVER = 0.1, 0.34, 0.42  # from a box to its neighbour, and to arrows below and above its numbers
LEFT, RIGHT, ABOVE, BELOW = (-1, 0), (1, 0), (0, 1), (0, -1)
FRAME = 0.08  # around maps with self-attention
INK = "#333333"
MAP, COPIED = "#cfe3f3", "#ffffff"
COLOURS = {  # of the arrows, which colour-blind readers can tell apart (Okabe & Ito 2008)
    "convolution": "#0072b2",
    "down": "#d55e00",
    "up": "#009e73",
    "copy": "#8c8c8c",
    "head": "#cc79a7",
    "timestep": "#e69f00",
    "attention": "#6a3d9a",
}
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU"}
HEADS = {"noise_head": "noise", "segmentation_head": "classes"}


@dataclass
class DrawNetwork:
    """Draw a network as a U, with the shapes of its maps."""

    model: str = "ronneberger-2015"
    """A preset, or a JSON file of config values, such as the `unet/config.json` of a run."""
    side: int | None = None
    """Height and width of the input image; by default the network's `sample_size`."""
    num_classes: int = 2
    """Classes of the segmentation head, if the network does not have one."""
    output: Path = Path("docs/images/network-2015.png")
    """The PNG to write."""


@dataclass(frozen=True)
class Map:
    """The shape of the output of a module.

    Attributes:
        channels: number of channels.
        height: in pixels.
        width: in pixels.
        copied: how many of the channels were copied from the contracting path.
        attended: whether self-attention follows.
    """

    channels: int
    height: int
    width: int
    copied: int = 0
    attended: bool = False

    @property
    def size(self) -> str:
        """Height and width, written as in the figure of the paper."""
        return f"{self.height}²" if self.height == self.width else f"{self.height}x{self.width}"


Level = tuple[Map, ...]


@dataclass(frozen=True)
class Shapes:
    """All maps of a network in the order of the U.

    Each level has the input of its blocks and the output of each of their convolutions.
    """

    image: Map
    encoder: tuple[Level, ...]  # the finest first
    bridge: Level
    decoder: tuple[Level, ...]  # the finest last
    heads: dict[str, Map]
    stem: bool  # whether a convolution stands before the first block


def read_shapes(unet: UNet, height: int, width: int) -> Shapes:
    """The shapes of an image on its way through a network and all its heads."""
    given: dict[nn.Module, Map] = {}
    taken: dict[nn.Module, Map] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == inputs[0].dim() == 4:
            taken[module], given[module] = Map(*inputs[0].shape[1:]), Map(*output.shape[1:])

    heads = {name: getattr(unet, name) for name in HEADS if getattr(unet, name) is not None}
    hooks = [module.register_forward_hook(remember) for module in unet.modules() if module is not unet]
    image = torch.zeros(1, unet.config.in_channels, height, width, device=unet.device)
    timestep = None if unet.time_embed is None else 0
    with torch.no_grad():
        unet(image, timestep, head="both" if len(heads) == 2 else None)
    for hook in hooks:
        hook.remove()

    def level(blocks: Blocks, copied: int = 0) -> Level:
        start = taken[blocks]
        maps = [Map(start.channels, start.height, start.width, copied)]
        for block, attention in zip(blocks.blocks, blocks.attentions):
            last = given[block]
            attended = not isinstance(attention, nn.Identity)
            maps += [given[block.conv1], Map(last.channels, last.height, last.width, attended=attended)]
        return tuple(maps)

    skips = [given[stage.blocks].channels for stage in unet.encoder]
    return Shapes(
        image=Map(*image.shape[1:]),
        encoder=tuple(level(stage.blocks) for stage in unet.encoder),
        bridge=level(unet.bridge),
        decoder=tuple(level(stage.blocks, skip) for stage, skip in zip(unet.decoder, reversed(skips))),
        heads={name: given[head] for name, head in heads.items()},
        stem=not isinstance(unet.stem, nn.Identity),
    )


@dataclass(frozen=True)
class Box:
    """The middle of the box of a map, and half of its width and height."""

    x: float
    y: float
    half_width: float
    half_height: float

    def beyond(self, side: tuple[int, int], gap: float) -> tuple[float, float]:
        """The point outside the box at a distance from the middle of a side."""
        across, up = side
        return self.x + across * (self.half_width + gap), self.y + up * (self.half_height + gap)


class Drawing:
    """The U on axes: columns of boxes from left to right, one row of them per resolution.

    Args:
        axes: the axes to draw on.
        shapes: the maps to draw.
        timestep: whether the blocks depend on a timestep.
    """

    def __init__(self, axes: Axes, shapes: Shapes, timestep: bool) -> None:
        self.axes, self.timestep = axes, timestep
        going_down = [*shapes.encoder, shapes.bridge]
        self.tallest = max(shape.height for shape in (shapes.image, *going_down[0]))
        self.widest = max(shape.channels for level in going_down for shape in level)
        self.column = 0
        self.rows = [0.0]  # the middle of each resolution
        for upper, lower in zip(going_down, going_down[1:]):
            self.rows.append(self.rows[-1] - self.half_height(upper[0]) - BETWEEN - self.half_height(lower[0]))

    def half_height(self, shape: Map) -> float:
        """Half of the height of a box; it grows less than in proportion, so that the lowest resolution can be seen."""
        return TALLEST * (shape.height / self.tallest) ** 0.7 / 2

    def half_width(self, channels: int) -> float:
        """Half of the width of a box, which also grows less than in proportion."""
        return (THINNEST + (WIDEST - THINNEST) * (channels / self.widest) ** 0.6) / 2

    def arrow(self, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draws an arrow in the colour of its operation."""
        style = {"arrowstyle": "-|>", "color": COLOURS[kind], "linewidth": 1.8, "mutation_scale": 11}
        self.axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})

    def box(self, shape: Map, x: float, y: float) -> Box:
        """Draws a map with its numbers."""
        half_width, half_height = self.half_width(shape.channels), self.half_height(shape)
        corner, width, height = (x - half_width, y - half_height), 2 * half_width, 2 * half_height
        copied = width * shape.copied / shape.channels
        self.rectangle(corner, (width, height), facecolor=MAP)
        if copied:
            self.rectangle(corner, (copied, height), facecolor=COPIED)
        box = Box(x, y, half_width, half_height)
        if shape.attended:
            box = Box(x, y, half_width + FRAME, half_height + FRAME)
            around, size = (corner[0] - FRAME, corner[1] - FRAME), (width + 2 * FRAME, height + 2 * FRAME)
            self.rectangle(around, size, fill=False, edgecolor=COLOURS["attention"], linewidth=1.6)
        self.axes.text(*box.beyond(ABOVE, GAP), str(shape.channels), ha="center", va="bottom", fontsize=9.5, color=INK)
        self.axes.text(*box.beyond(BELOW, GAP), shape.size, ha="center", va="top", fontsize=8, color="#666666")
        return box

    def rectangle(self, corner: tuple[float, float], size: tuple[float, float], **style: Any) -> None:
        """Draws a rectangle from its lower left corner."""
        self.axes.add_patch(Rectangle(corner, *size, **{"edgecolor": INK, "linewidth": 0.9, **style}))

    def row(self, maps: tuple[Map, ...], row: int, stem: int = 0) -> list[Box]:
        """Draws boxes from the current column on, with convolutions between them; `stem` of them precede the blocks."""
        boxes: list[Box] = []
        for number, shape in enumerate(maps):
            boxes.append(self.box(shape, PITCH * self.column, self.rows[row]))
            if number:
                start, end = boxes[-2].beyond(RIGHT, GAP), boxes[-1].beyond(LEFT, GAP)
                self.arrow("convolution", start, end)
                if self.timestep and number > stem and (number - stem) % 2 == 0:  # between the two of a block
                    middle = (start[0] + end[0]) / 2 - 0.05
                    self.axes.plot(middle, start[1], "o", color=COLOURS["timestep"], markersize=6, zorder=5)
            self.column += number < len(maps) - 1
        return boxes

    def name(self, text: str, box: Box, side: tuple[int, int]) -> None:
        """Writes the name of a map beside it."""
        self.axes.text(*box.beyond(side, 0.28), text, ha="center", va="center", fontsize=10.5, color=INK, rotation=90)

    def crop(self, skip: Box, half_height: float) -> None:
        """Marks the part of a map that is copied, if it is not the whole map."""
        size = (2 * skip.half_width, 2 * half_height)
        self.rectangle((skip.x - skip.half_width, skip.y - half_height), size, fill=False, linestyle=":")


def draw_u(drawing: Drawing, shapes: Shapes) -> None:
    """Draws all maps and the arrows between them."""
    skips: list[Box] = []
    for row, level in enumerate((*shapes.encoder, shapes.bridge)):
        stem = (shapes.image,) if row == 0 and shapes.stem else ()
        boxes = drawing.row((*stem, *level), row, len(stem))
        if skips:
            drawing.arrow("down", skips[-1].beyond(BELOW, UNDER), boxes[0].beyond(ABOVE, OVER))
        else:
            drawing.name("image", boxes[0], LEFT)
        skips.append(boxes[-1])
    last = skips.pop()
    for row, level in reversed(list(enumerate(shapes.decoder[::-1]))):
        boxes = drawing.row(level, row)
        drawing.arrow("up", last.beyond(ABOVE, OVER), boxes[0].beyond(BELOW, UNDER))
        skip = skips.pop()
        drawing.arrow("copy", skip.beyond(RIGHT, GAP), boxes[0].beyond(LEFT, GAP))
        if level[0].height < shapes.encoder[row][-1].height:
            drawing.crop(skip, boxes[0].half_height)
        last = boxes[-1]
    half = last.half_height
    places = [0.0] if len(shapes.heads) == 1 else [half + BETWEEN / 2, -half - BETWEEN / 2]
    for (name, shape), place in zip(shapes.heads.items(), places):
        box = drawing.box(shape, last.x + PITCH, last.y + place)
        drawing.arrow("head", last.beyond(RIGHT, GAP), box.beyond(LEFT, GAP))
        drawing.name(HEADS[name], box, RIGHT)


def explain(drawing: Drawing, unet: UNet, place: tuple[float, float]) -> None:
    """Writes the legend of the arrows, line by line upwards from a place."""
    config = unet.config
    lines = {
        "convolution": f"3x3 convolution, {ACTIVATIONS[config.activation]}",
        "copy": "copy and crop" if config.padding == "valid" else "copy",
        "down": "2x2 max pooling" if config.downsample == "max_pool" else "convolution of stride 2",
        "up": "2x2 up-convolution",
        "head": "1x1 convolution",
    }
    if unet.time_embed is not None:
        lines["timestep"] = f"the timestep, as {4 * config.channels[0]} values, scales and shifts"
    if any(isinstance(module, SelfAttention) for module in unet.modules()):
        lines["attention"] = "self-attention follows"
    for number, (kind, text) in enumerate(reversed(lines.items())):
        x, y = place[0], place[1] + 0.52 * number
        if kind == "timestep":
            drawing.axes.plot(x + 0.4, y, "o", color=COLOURS[kind], markersize=6)
        elif kind == "attention":
            drawing.rectangle((x + 0.2, y - 0.16), (0.4, 0.32), fill=False, edgecolor=COLOURS[kind], linewidth=1.6)
        else:
            drawing.arrow(kind, (x, y), (x + 0.8, y))
        drawing.axes.text(x + 1.05, y, text, va="center", fontsize=10.5, color=INK)


def draw(options: DrawNetwork) -> Path:
    """Writes the image and returns its path."""
    with torch.device("meta"):  # shapes only
        unet = load_unet(options.model, {}).eval()
        unet.to_segmentation(unet.config.num_classes or options.num_classes)
        size = options.side or unet.config.sample_size
        shapes = read_shapes(unet, *((size, size) if isinstance(size, int) else size))
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    drawing = Drawing(axes, shapes, unet.time_embed is not None)
    draw_u(drawing, shapes)
    explain(drawing, unet, (-0.5, drawing.rows[-1] - 0.5))
    left, right = -0.9, PITCH * (drawing.column + 1) + 0.8
    top = TALLEST / 2 + 0.5 + (len(shapes.heads) - 1) * (TALLEST + BETWEEN) / 2
    bottom = drawing.rows[-1] - 0.9
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    figure.set_size_inches(0.5 * (right - left), 0.5 * (top - bottom))
    return save_figure(figure, options.output, dpi=120)


if __name__ == "__main__":
    print(draw(tyro.cli(DrawNetwork, description=__doc__)))
