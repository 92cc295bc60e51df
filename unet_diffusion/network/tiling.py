"""Images of any size through a network, window by window (the overlap-tile strategy of Ronneberger et al. 2015).

How far a pixel of the output looks into the image follows from the network (`context`), and so does where windows may
start: at multiples of its stride, or pooling would join other pixels than it does in the whole image. Windows of a
padded network are cut inside the image, so that its zero padding lies where it lies for the whole image; those of
an unpadded network reach over the border, where the image is mirrored, and keep valid output only.

Without attention and without statistics over space, the tiled result equals that of the whole image but for rounding
(about 1e-6 of the largest logit). Otherwise every pixel depends on all others, and windows see only their own:
neighbouring windows are then blended by raised cosines, and a difference remains that shrinks as windows grow. A wider
overlap does not help: the difference comes from what the windows do not see, not from their borders.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.config import CONVOLUTIONS_PER_BLOCK
from unet_diffusion.network.maps import mirrored
from unet_diffusion.randomness import keyed_generator

# Windows of 1 GiB are no faster on a CPU than those of 64 MiB, whose maps stay in its caches. With GroupNorm a window
# is worse than the whole image, and a small one worse than a large one (docs/large-images.md: mean IoU 0.780 whole,
# 0.779 in windows of 416, 0.775 in windows of 208); so an image is cut only where the whole would take much.
MEMORY = 2**26  # bytes that a window chosen by us may take in the network
WHOLE = 2**29  # bytes that an image may take that is not cut where we choose the windows
LENGTH = 3  # times what it may share with its neighbours: the least side of a window chosen by us, so that the windows
# of a large image take at most (3 / 2)**2 times the work of the whole
MAPS = 12  # float32 maps of the finest width that are alive at once, by measurement
ATTENDED = 64  # positions a side of a window chosen by us where it attends: the cost grows with their fourth power
ATTENTION = (SelfAttention, Attention)  # that of our networks and of stock ones
BLOCK = 64  # pixels a side of the blocks that noise is drawn in

Read = Callable[[slice, slice], Tensor]  # rows and columns inside the image -> (B, C, rows, columns)
Predict = Callable[[Tensor], Tensor]  # (B, C, h, w) -> (B, K, h, w), or smaller where the network is unpadded


def context(unet: Any) -> tuple[int, int] | None:
    """How many input pixels before and after an output pixel can change it, along each side; None: all of them.

    All of them, where there is attention or a normalisation that takes its statistics from the image: GroupNorm,
    InstanceNorm, and BatchNorm in training mode. The same is taken for granted of networks other than `UNet`.
    """
    for module in unet.modules():
        of_image = isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d))
        statistics = of_image or (isinstance(module, nn.BatchNorm2d) and module.training)
        if statistics or isinstance(module, ATTENTION):
            return None
    ours = "blocks_per_stage" in unet.config
    return context_of_convolutions(unet.config) if ours else None


def context_of_convolutions(config: Mapping[str, Any]) -> tuple[int, int]:
    """The context of a `UNet` with this config if it had neither attention nor statistics over space.

    Follows an output pixel back through the U as an interval of pixels of each map. The interval depends on where the
    pixel lies in its cell of the coarsest map, so the widest over all places counts.
    """
    deepest = len(config["channels"]) - 1
    radius = CONVOLUTIONS_PER_BLOCK * config["blocks_per_stage"]  # of the 3x3 convolutions of a stage
    one_sided = 1 if config["upsample"] == "nearest" else 0  # its 2x2 convolution also reads the next pixel
    strided = 1 if config["downsample"] == "conv" and config["padding"] == "same" else 0  # 3x3 around the first of two

    def needed(level: int, low: int, high: int) -> tuple[int, int]:
        """What pixels low..high of the map that leaves the decoder at a level need of the map that enters it there."""
        low, high = low - radius, high + radius
        if level == deepest:
            return low, high
        coarse_low, coarse_high = needed(level + 1, low // 2, (high + one_sided) // 2)
        low, high = min(low, 2 * coarse_low - strided), max(high, 2 * coarse_high + 1)
        return low - radius, high + radius

    stem = 1 if config["block"] == "residual" else 0
    reach = [(pixel, *needed(0, pixel, pixel)) for pixel in range(2**deepest)]
    return max(p - low for p, low, _ in reach) + stem, max(high - p for p, _, high in reach) + stem


@dataclass(frozen=True)
class Piece:
    """Part of a window's output along one side."""

    start: int
    stop: int
    weights: Tensor  # float32 (stop - start,); those of the windows that share the part sum to 1
    finished: bool  # whether no later window adds to it


@dataclass(frozen=True)
class Span:
    """A window along one side: the image's pixels from start to stop, and the parts of its output that are used."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Tiling:
    """How windows of a network lie on an image.

    Args:
        stride: pixels of the image per pixel of the network's coarsest map; windows start at its multiples.
        tile: pixels that each further window adds along a side; a multiple of the stride.
        before: pixels at a window's begin whose output is not used, unless the image begins there.
        after: the same at its end.
        ramp: half the width over which neighbouring windows are blended, at most a quarter of the tile; 0: a sharp cut.
        smallest: input side of the smallest window of an unpadded network; 0: padded.
        margin: pixels that an unpadded network loses at each end.
        lead: pixels before the output that an unpadded network is given: its margin or, by whole strides, more.
        trail: pixels after the output that it is given at least.
        whole: pixels of the largest image that is one window, however large a window is otherwise.
    """

    stride: int
    tile: int
    before: int = 0
    after: int = 0
    ramp: int = 0
    smallest: int = 0
    margin: int = 0
    lead: int = 0
    trail: int = 0
    whole: int = 0

    @classmethod
    def of(cls, unet: Any, tile_size: int | None = None, symmetric: bool = False) -> "Tiling":
        """The tiling for a network.

        Args:
            unet: a `UNet`, or a network with its `config` and `feature_info`.
            tile_size: output pixels a side of a tile, rounded down to a multiple of the network's stride (but not to
                0). None: so that a window takes about 64 MiB in the network, or more if it would share more than a
                third of its side with a neighbour. Images that take at most 512 MiB are then not cut at all. Both
                have at most about 64 x 64 positions where the network attends.
            symmetric: whether the windows will be flipped too, so that both ends need the longer context.

        Raises:
            ValueError: a tile size that is not an integer of at least 1.
        """
        if tile_size is not None and (not isinstance(tile_size, int) or tile_size < 1):
            raise ValueError(
                f"tile_size is {tile_size!r}, but must be at least 1 output pixel, as an integer, or None."
            )
        stride = 2 * max(info["stride"] for info in unet.feature_info)
        reach = context(unet)
        ramp = 0 if reach else stride
        if unet.config.get("padding", "same") == "same":
            before, after = reach or (stride, stride)
            smallest = margin = lead = trail = 0
        else:
            before = after = 0
            smallest = unet.smallest_side  # its sides are even at every pooling, so the margins are equal
            margin = lead = (smallest - unet.output_size(smallest, smallest)[0]) // 2
            spoilt = stride - 1 if unet.config.upsample == "nearest" else 0  # at the end, by its one-sided padding
            trail = margin + spoilt
            if symmetric and spoilt:
                lead += stride
        if symmetric:
            before = after = max(before, after)

        whole = 0
        if tile_size is None:
            lost = before + after + 2 * ramp + lead + trail
            bytes_per_pixel = 4 * MAPS * unet.feature_info[-1]["channels"]
            side, whole = max(int((MEMORY / bytes_per_pixel) ** 0.5), LENGTH * lost), WHOLE // bytes_per_pixel
            if any(isinstance(module, ATTENTION) for module in unet.modules()):
                attends = unet.config.get("attention")
                attended = ATTENDED * (2 ** list(attends).index(True) if attends else stride)
                side, whole = min(side, attended), min(whole, attended**2)
            tile_size = max(side - lost, lost // 2)
        tile = max(tile_size // stride, 1) * stride
        return cls(stride, tile, before, after, min(ramp, tile // 4), smallest, margin, lead, trail, whole)

    @property
    def shared(self) -> int:
        """The least number of pixels that neighbouring windows have in common along a side."""
        return self.before + self.after + 2 * self.ramp

    def batch_size(self, height: int, width: int) -> int:
        """How many images of a size take about the memory of the largest window; 1 for those that are cut."""
        window = self.tile + self.shared + self.lead + self.trail
        pixels = (height + self.lead + self.trail) * (width + self.lead + self.trail)
        return max(max(window**2, self.whole) // pixels, 1)

    def count(self, height: int, width: int) -> int:
        """How many windows an image of a size takes."""
        rows, columns = self.windows(height, width)
        return len(rows) * len(columns)

    def windows(self, height: int, width: int) -> tuple[list[Span], list[Span]]:
        """The windows along both sides of an image of a size: one, if it is small enough to be run whole."""
        whole = (height + self.lead + self.trail) * (width + self.lead + self.trail) <= self.whole
        tiling = replace(self, tile=max(height, width)) if whole else self
        return tiling.spans(height), tiling.spans(width)

    def spans(self, side: int) -> list[Span]:
        """The windows along a side of the image, in order.

        Their length is that of the side modulo the stride. Thus the offset from the image's end is a multiple of the
        stride as well, and a flipped image is cut as it would be by itself.
        """
        length = self.tile + self.shared
        length += (side - length) % self.stride
        steps = max(side - length, 0) // self.stride
        count = 1 + -(-steps * self.stride // self.tile)
        starts = [i * steps // max(count - 1, 1) * self.stride for i in range(count)]
        stops = [min(start + length, side) for start in starts]
        cuts = [(start + stop + self.before - self.after) // 2 for start, stop in zip(starts[1:], stops)]
        edges = [0, *cuts, side]
        return [Span(start, stop, self._pieces(i, edges)) for i, (start, stop) in enumerate(zip(starts, stops))]

    def _pieces(self, window: int, edges: list[int]) -> tuple[Piece, ...]:
        """What window number i gives: the blend with its predecessor, its own part, the blend with its successor."""
        low, high = edges[window], edges[window + 1]
        rise = torch.sin((torch.arange(2 * self.ramp) + 0.5) / (2 * self.ramp) * (torch.pi / 2)).square()
        first, last = low == 0, high == edges[-1]
        own_low, own_high = low + (0 if first else self.ramp), high - (0 if last else self.ramp)
        pieces = [Piece(own_low, own_high, torch.ones(own_high - own_low), True)]
        if self.ramp and not first:
            pieces.insert(0, Piece(low - self.ramp, own_low, rise, True))
        if self.ramp and not last:
            pieces.append(Piece(own_high, high + self.ramp, rise.flip(0), False))
        return tuple(pieces)

    def input_range(self, span: Span) -> range:
        """The pixels that the network must be given for a window's output; beyond the image if it is unpadded."""
        if not self.smallest:
            return range(span.start, span.stop)
        wanted = max(self.lead + span.stop - span.start + self.trail, self.smallest)
        side = self.smallest + -(-(wanted - self.smallest) // self.stride) * self.stride
        return range(span.start - self.lead, span.start - self.lead + side)


def tiled(predict: Predict, read: Read, size: tuple[int, int], tiling: Tiling) -> Iterator[tuple[slice, slice, Tensor]]:
    """Runs a network over an image of any size and yields what is finished, part by part.

    Every pixel is yielded once. What is held beside the running window are the strips along the shorter side of the
    image in which windows are blended; so memory does not grow with the image.

    Args:
        predict: the network, on one window: (B, C, h, w) in [-1, 1] to (B, K, h, w), or smaller if it is unpadded.
        read: rows and columns inside the image to that part of it, (B, C, rows, columns).
        size: height and width of the image.
        tiling: where the windows lie.

    Yields:
        Rows, columns and their values, (B, K, rows, columns).
    """
    rows, columns = tiling.windows(*size)
    tall = size[0] >= size[1]
    offset = tiling.lead - tiling.margin  # of the output that is used, in what an unpadded network returns
    pending: dict[tuple[int, int], Tensor] = {}
    for first, second in product(rows, columns) if tall else product(columns, rows):
        row, column = (first, second) if tall else (second, first)
        values = predict(read_mirrored(read, size, tiling.input_range(row), tiling.input_range(column)))
        for r, c in product(row.pieces, column.pieces):
            place = (r.start, c.start)
            top, left = r.start - row.start + offset, c.start - column.start + offset
            part = values[..., top : top + r.stop - r.start, left : left + c.stop - c.start]
            part = part * (r.weights[:, None] * c.weights).to(part.device, part.dtype)
            part = part + pending.pop(place, 0)
            if r.finished and c.finished:
                yield slice(r.start, r.stop), slice(c.start, c.stop), part
            else:
                pending[place] = part
    assert not pending


def read_mirrored(read: Read, size: tuple[int, int], rows: range, columns: range) -> Tensor:
    """A window (B, C, rows, columns) that may reach beyond the image, which is mirrored there as often as needed.

    The border pixel itself is not repeated: `numpy.pad(mode="reflect")`.
    """
    if rows.start >= 0 and columns.start >= 0 and rows.stop <= size[0] and columns.stop <= size[1]:
        return read(slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    row, column = (mirrored(torch.tensor(places), side) for places, side in zip((rows, columns), size))
    top, left = int(row.min()), int(column.min())
    window = read(slice(top, int(row.max()) + 1), slice(left, int(column.max()) + 1))
    return window[..., (row - top)[:, None], column - left]


def noise_window(seed: int, draw: int, channels: int, rows: slice, columns: slice) -> Tensor:
    """A window (channels, rows, columns) of an endless field of unit Gaussian noise, float32.

    The value at a pixel depends on the seed, the draw and the place alone, so that all windows see the same noise.
    """
    down = range(rows.start // BLOCK, -(-rows.stop // BLOCK))
    across = range(columns.start // BLOCK, -(-columns.stop // BLOCK))
    blocks = [
        torch.randn(channels, BLOCK, BLOCK, generator=keyed_generator(seed, "noise", draw, i, j))
        for i, j in product(down, across)
    ]
    field = rearrange(blocks, "(down across) c h w -> c (down h) (across w)", down=len(down))
    top, left = rows.start - down.start * BLOCK, columns.start - across.start * BLOCK
    return field[:, top : top + rows.stop - rows.start, left : left + columns.stop - columns.start]
