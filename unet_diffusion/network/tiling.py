"""Images of any size through a network, window by window (the overlap-tile strategy of Ronneberger et al. 2015).

The network determines how far an output pixel looks into the image (`context`). It also determines where windows may
start: at multiples of its stride, since otherwise pooling would group other pixels than in the whole image. Windows of
a padded network lie inside the image, so that the zero padding is where it is for the whole image. Windows of an
unpadded network reach beyond the border, where the image is mirrored, and only valid output is kept.

Without attention and without statistics over space, the tiled result equals that of the whole image up to rounding
(about 1e-6 of the largest logit). Otherwise every pixel depends on all others, but a window sees only its own pixels.
Neighbouring windows are then blended by raised cosines, and a difference remains that shrinks as windows grow. A wider
overlap does not help: the difference comes from what the windows do not see, not from their borders.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from unet_diffusion.checks import is_count, plain, require
from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.config import CONVOLUTIONS_PER_BLOCK
from unet_diffusion.network.feature_maps import mirrored
from unet_diffusion.randomness import keyed_generator

# Windows of 1 GiB are not faster on a CPU than those of 64 MiB, whose maps stay in its caches. With GroupNorm, a window
# gives worse masks than the whole image, and a small window worse ones than a large one (docs/large-images.md: mean IoU
# 0.780 whole, 0.779 in windows of 416, 0.775 in windows of 208); so an image is cut only if the whole would take a lot
# of memory. The first four limit the windows that `Tiling.of` chooses.
MEMORY = 2**26  # bytes that a window may take in the network
WHOLE = 2**29  # bytes that an image may take without being cut
LENGTH = 3  # least side of a window, as a multiple of what it shares with its neighbours: the windows of a large image
# then take at most (3 / 2)**2 times the work of the whole
ATTENDED = 64  # positions a side of a window where the network attends: the cost grows with their fourth power
MAPS = 12  # float32 maps of the finest width that exist at once, by measurement
ATTENTION = (SelfAttention, Attention)  # of our networks and of stock ones
BLOCK = 64  # pixels a side of the blocks in which noise is drawn

Read = Callable[[slice, slice], Tensor]  # rows and columns inside the image -> (B, C, rows, columns)
Predict = Callable[[Tensor], Tensor]  # (B, C, h, w) -> (B, K, h, w), or smaller where the network is unpadded


def context(unet: Any) -> tuple[int, int] | None:
    """Returns how many input pixels before and after an output pixel can change it, along each side; None for all.

    All pixels can if there is attention, or a normalisation that uses statistics of the image: GroupNorm, InstanceNorm,
    and BatchNorm in training mode. Networks other than `UNet` are treated like this too.
    """
    for module in unet.modules():
        of_image = isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d))
        statistics = of_image or (isinstance(module, nn.BatchNorm2d) and module.training)
        if statistics or isinstance(module, ATTENTION):
            return None
    ours = "blocks_per_stage" in unet.config
    return context_of_convolutions(unet.config) if ours else None


def context_of_convolutions(config: Mapping[str, Any]) -> tuple[int, int]:
    """The context of a `UNet` with this config, ignoring attention and statistics over space.

    It follows an output pixel back through the U, as an interval of pixels in each map. The interval depends on where
    the pixel lies in its cell of the coarsest map, so the result is the widest one over all positions.
    """
    deepest = len(config["channels"]) - 1
    radius = CONVOLUTIONS_PER_BLOCK * config["blocks_per_stage"]  # of the 3x3 convolutions of a stage
    one_sided = 1 if config["upsample"] == "nearest" else 0  # its 2x2 convolution also reads the next pixel
    strided = 1 if config["downsample"] == "conv" and config["padding"] == "same" else 0  # 3x3 around the first of two

    def needed(level: int, low: int, high: int) -> tuple[int, int]:
        """The pixels of a level's encoder input that pixels low..high of its decoder output depend on."""
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
    finished: bool  # no later window adds to it


@dataclass(frozen=True)
class Span:
    """A window along one side: the image's pixels from start to stop, and the parts of its output that are used."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Tiling:
    """The layout of a network's windows on an image.

    Args:
        stride: pixels of the image per pixel of the network's coarsest map; windows start at its multiples.
        tile: pixels that each additional window adds along a side; a multiple of the stride.
        before: pixels at the start of a window whose output is not used, unless the image starts there.
        after: the same at the end of a window.
        ramp: half the width over which neighbouring windows are blended, at most a quarter of the tile; 0 for a sharp
            cut.
        smallest: input side of the smallest window of an unpadded network; 0 for a padded one.
        margin: pixels that an unpadded network loses at each end.
        lead: pixels that an unpadded network gets before the output: its margin, or whole strides more.
        trail: least number of pixels that an unpadded network gets after the output.
        whole: number of pixels of the largest image that runs as a single window, whatever the tile.
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
            unet: a `UNet`, or a network with the same `config` and `feature_info`.
            tile_size: output pixels a side of a tile, rounded down to a multiple of the network's stride (but not to
                0). None chooses it so that a window takes about 64 MiB in the network, or more if it would share more
                than a third of its side with a neighbour. Images that take at most 512 MiB are then not cut. If the
                network attends, windows and uncut images have at most about 64 x 64 positions there.
            symmetric: whether the windows will be flipped too, so that both ends need the longer context.

        Raises:
            ValueError: the tile size is not an integer of at least 1.
        """
        tile_size = plain(tile_size)
        valid = tile_size is None or is_count(tile_size)
        require(valid, "tile_size", tile_size, "must be an integer of at least 1 output pixel, or None")
        stride = 2 * max(info["stride"] for info in unet.feature_info)
        reach = context(unet)
        ramp = 0 if reach else stride
        if unet.config.get("padding", "same") == "same":
            before, after = reach or (stride, stride)
            smallest = margin = lead = trail = 0
        else:
            before = after = 0
            smallest = unet.smallest_side  # with even sides at every pooling, so the margins are equal
            margin = lead = (smallest - unet.output_size(smallest, smallest)[0]) // 2
            spoilt = stride - 1 if unet.config.upsample == "nearest" else 0  # at the end, by the one-sided padding
            trail = margin + spoilt
            if symmetric and spoilt:
                lead += stride
        if symmetric:
            before = after = max(before, after)

        whole = 0
        if tile_size is None:
            lost = before + after + 2 * ramp + lead + trail
            side, whole = affordable(unet, stride, LENGTH * lost)
            tile_size = max(side - lost, lost // 2)
        tile = max(tile_size // stride, 1) * stride
        return cls(stride, tile, before, after, min(ramp, tile // 4), smallest, margin, lead, trail, whole)

    @property
    def shared(self) -> int:
        """The least number of pixels that neighbouring windows share along a side."""
        return self.before + self.after + 2 * self.ramp

    def batch_size(self, height: int, width: int) -> int:
        """Returns how many images of a size take about the memory of the largest window; 1 if they are cut."""
        window = self.tile + self.shared + self.lead + self.trail
        pixels = (height + self.lead + self.trail) * (width + self.lead + self.trail)
        return max(max(window**2, self.whole) // pixels, 1)

    def batches(self, images: Iterable[Tensor], scale: int = 1) -> Iterator[list[Tensor]]:
        """Yields batches of consecutive images (C, h, w) of one size that take about the memory of the largest window.

        The network gets the images enlarged `scale` times a side.
        """
        batch: list[Tensor] = []
        for image in images:
            height, width = (scale * side for side in image.shape[1:])
            if batch and (image.shape != batch[0].shape or len(batch) == self.batch_size(height, width)):
                yield batch
                batch = []
            batch.append(image)
        if batch:
            yield batch

    def count(self, height: int, width: int) -> int:
        """The number of windows on an image of a size."""
        rows, columns = self.windows(height, width)
        return len(rows) * len(columns)

    def windows(self, height: int, width: int) -> tuple[list[Span], list[Span]]:
        """Returns the windows along both sides of an image; a single one if the image is small enough."""
        whole = (height + self.lead + self.trail) * (width + self.lead + self.trail) <= self.whole
        tiling = replace(self, tile=max(height, width)) if whole else self
        return tiling.spans(height), tiling.spans(width)

    def spans(self, side: int) -> list[Span]:
        """The windows along a side of the image, in order.

        Their length is congruent to the side modulo the stride. So their distance from the end of the image is a
        multiple of the stride too, and the windows suit the flipped image as they are.
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
        """The parts of a window: the blend with its predecessor, its own part, the blend with its successor."""
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
        """The pixels that the network needs for a window's output; unpadded networks need some beyond the image."""
        if not self.smallest:
            return range(span.start, span.stop)
        wanted = max(self.lead + span.stop - span.start + self.trail, self.smallest)
        side = self.smallest + -(-(wanted - self.smallest) // self.stride) * self.stride
        return range(span.start - self.lead, span.start - self.lead + side)


def affordable(unet: Any, stride: int, least: int) -> tuple[int, int]:
    """Returns the side of a window, at least `least` if attention allows, and the size in pixels of an uncut image."""
    bytes_per_pixel = 4 * MAPS * unet.feature_info[-1]["channels"]
    side, whole = max(int((MEMORY / bytes_per_pixel) ** 0.5), least), WHOLE // bytes_per_pixel
    if any(isinstance(module, ATTENTION) for module in unet.modules()):
        attends = unet.config.get("attention")
        attended = ATTENDED * (2 ** list(attends).index(True) if attends else stride)
        side, whole = min(side, attended), min(whole, attended**2)
    return side, whole


def tiled(predict: Predict, read: Read, size: tuple[int, int], tiling: Tiling) -> Iterator[tuple[slice, slice, Tensor]]:
    """Runs a network over an image of any size and yields the finished parts.

    Every pixel is yielded once. Besides the current window, memory holds the strips along the shorter side of the image
    in which windows are blended, so it grows only with the length of that side.

    Args:
        predict: the network, on one window: (B, C, h, w) in [-1, 1] to (B, K, h, w), or smaller if it is unpadded.
        read: rows and columns inside the image to that part of it, (B, C, rows, columns).
        size: height and width of the image.
        tiling: the layout of the windows.

    Yields:
        Rows, columns and their values, (B, K, rows, columns).
    """
    rows, columns = tiling.windows(*size)
    tall = size[0] >= size[1]
    offset = tiling.lead - tiling.margin  # of the used output, within the output of an unpadded network
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

    The border pixel itself is not repeated, as in `numpy.pad(mode="reflect")`.
    """
    if rows.start >= 0 and columns.start >= 0 and rows.stop <= size[0] and columns.stop <= size[1]:
        return read(slice(rows.start, rows.stop), slice(columns.start, columns.stop))
    row, column = (mirrored(torch.tensor(places), side) for places, side in zip((rows, columns), size))
    top, left = int(row.min()), int(column.min())
    window = read(slice(top, int(row.max()) + 1), slice(left, int(column.max()) + 1))
    return window[..., (row - top)[:, None], column - left]


def noise_window(seed: int, draw: int, channels: int, rows: slice, columns: slice) -> Tensor:
    """A window (channels, rows, columns) of an endless field of unit Gaussian noise, float32.

    The value at a pixel depends only on the seed, the draw and the place, so all windows see the same noise.
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
