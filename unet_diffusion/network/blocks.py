"""The parts of the U: convolution blocks, encoder and decoder stages, down- and upsampling."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.config import CONVOLUTIONS_PER_BLOCK
from unet_diffusion.network.feature_maps import fit, has_channels_last, in_layout_of

MAX_GROUPS = 32  # of GroupNorm (Wu & He 2018)
SMALL = 1024  # pixels; PyTorch's GroupNorm has another kernel for smaller maps (its `feature_map_threshold`)


@dataclass(frozen=True)
class BlockStyle:
    """The options that all blocks of a network share: config keys of `UNet`, which documents them."""

    block: str
    norm: str
    activation: str
    padding: str
    head_channels: int
    embed_dim: int | None  # size of the condition embedding; None: the blocks get no timestep

    @property
    def border(self) -> int:
        """Pixels that each side of a map loses in one 3x3 convolution."""
        return 1 if self.padding == "valid" else 0

    def conv(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        """A 3x3 convolution of stride 1."""
        return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1 - self.border)

    def make_norm(self, channels: int) -> nn.Module:
        """The normalisation over a map of `channels` channels."""
        if self.norm == "group":
            return GroupNorm(group_count(channels), channels)
        return nn.BatchNorm2d(channels) if self.norm == "batch" else nn.Identity()

    def make_activation(self) -> nn.Module:
        """The elementwise nonlinearity."""
        return nn.ReLU() if self.activation == "relu" else nn.SiLU()


def group_count(channels: int) -> int:
    """The largest number of groups up to 32 that divides `channels` and leaves at least two channels a group.

    One channel a group is too few: at 1x1 pixel, such a group has a single value, which cannot be normalised.
    """
    return max(groups for groups in range(1, MAX_GROUPS + 1) if channels % groups == 0 and 2 * groups <= channels)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) that returns a map in the layout of its input, as PyTorch's does on a CPU.

    On CUDA, PyTorch up to 2.13 returns contiguous maps. The next convolution would convert them to channels last again,
    in the forward pass and in the backward pass, and the activation in between would get gradients in another layout.
    Here they are converted once. A compiler chooses layouts itself.

    On a CPU, PyTorch 2.13 takes ten times as long for small bfloat16 maps with channels last as for contiguous ones.
    This class normalises such maps itself, from the sums of each channel. Training does not need this, since it keeps
    maps contiguous.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to a map of the same shape."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        if self._is_slow_for(x):
            return self._from_sums(x)
        return in_layout_of(super().forward(x), x)

    @staticmethod
    def _is_slow_for(x: Tensor) -> bool:
        """Whether PyTorch would go through each group of a map pixel by pixel, a few of its channels at a time."""
        small = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[-2] * x.shape[-1] < SMALL
        return small and not torch.is_grad_enabled() and has_channels_last(x)

    def _from_sums(self, x: Tensor) -> Tensor:
        """The normalised map, computed in float32 from the sums of each channel's values and of their squares."""
        groups = (len(x), self.num_groups, -1)
        wide = x.float()
        mean, square = (
            sums.view(groups).mean(2, keepdim=True) / (x.shape[2] * x.shape[3])  # (B, G, 1)
            for sums in (wide.sum((2, 3)), wide.square_().sum((2, 3)))
        )
        variance = (square - mean.square()).clamp_(min=0)  # rounding makes it negative for equal values
        scale = (variance + self.eps).rsqrt() * self.weight.float().view(1, *groups[1:])
        shift = self.bias.float().view(1, *groups[1:]) - mean * scale
        scale, shift = (each.view(*x.shape[:2], 1, 1) for each in (scale, shift))
        return torch.addcmul(shift, x, scale).to(x.dtype)


class ScaleShift(nn.Module):
    """Scales and shifts each channel by the condition (AdaGN, Dhariwal & Nichol 2021)."""

    def __init__(self, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C, H, W) and embedding (B, E) to a map of the same shape."""
        scale, shift = self.linear(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return torch.addcmul(shift, x, 1 + scale)

    def after(self, norm: nn.Module, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Scales and shifts `norm(x)`, for x (B, C, H, W).

        In training, GroupNorm does both in one pass, so one map less is kept for the backward pass. For this, the batch
        is treated as one image of B * C channels, with separate weights for each original image. Otherwise the layers
        are called one by one: a graph has to work for any batch, and hooks run only if their layer is called, such as
        those that bring weights back from a disk. A map with channels last cannot be viewed in this shape, so on a CPU
        the layers are called for it too. On other devices GroupNorm copies such a map anyway, twice in training.
        """
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if eager and isinstance(norm, nn.GroupNorm) and (x.is_contiguous() or x.device.type != "cpu"):
            if has_hooks(norm) or has_hooks(self):
                return self(norm(x), embedding)
            scale, shift = self.linear(embedding).chunk(2, dim=1)  # (B, C) each
            return norm_scale_shift(norm, x, scale, shift)
        return self(norm(x), embedding)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a call of the module runs more than its class's `forward`.

    PyTorch keeps its hooks in dictionaries; Accelerate and diffusers replace the `forward` of the object.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def norm_scale_shift(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`norm(x) * (1 + scale) + shift` of maps (B, C, H, W) in one pass, in the layout of x; scale and shift (B, C)."""
    batch, channels, height, width = x.shape
    weight, bias = norm.weight * (1 + scale), torch.addcmul(shift, norm.bias, 1 + scale)  # (B, C) each
    joined = x.contiguous().view(1, batch * channels, height, width)
    result = F.group_norm(joined, batch * norm.num_groups, weight.view(-1), bias.view(-1), norm.eps)
    return in_layout_of(result.view(x.shape), x)


class PlainBlock(nn.Module):
    """Convolution, activation, convolution, activation (Ronneberger et al. 2015, figure 1, blue arrows).

    The network of 2015 had no timestep. Here a timestep scales and shifts the map between the two convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, style: BlockStyle) -> None:
        super().__init__()
        self.conv1 = style.conv(in_channels, out_channels)
        self.norm1 = style.make_norm(out_channels)
        self.scale_shift = None if style.embed_dim is None else ScaleShift(out_channels, style.embed_dim)
        self.conv2 = style.conv(out_channels, out_channels)
        self.norm2 = style.make_norm(out_channels)
        self.activation = style.make_activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W), or 4 pixels a side smaller without padding."""
        x = self.activation(self.norm1(self.conv1(x)))
        if self.scale_shift is not None:
            x = self.scale_shift(x, embedding)
        return self.dropout(self.activation(self.norm2(self.conv2(x))))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, with the timestep between them (Dhariwal & Nichol 2021, section 3).

    The second convolution starts at zero, so an untrained block passes its input on.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, style: BlockStyle) -> None:
        super().__init__()
        self.norm1 = style.make_norm(in_channels)
        self.conv1 = style.conv(in_channels, out_channels)
        self.norm2 = style.make_norm(out_channels)
        self.scale_shift = None if style.embed_dim is None else ScaleShift(out_channels, style.embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = style.conv(out_channels, out_channels)
        self.activation = style.make_activation()
        widen = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, kernel_size=1)
        crop = nn.ZeroPad2d(-CONVOLUTIONS_PER_BLOCK * style.border) if style.border else nn.Identity()
        self.shortcut = nn.Sequential(crop, widen)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W), or 4 pixels a side smaller without padding."""
        h = self.conv1(self.activation(self.norm1(x)))
        h = self.norm2(h) if self.scale_shift is None else self.scale_shift.after(self.norm2, h, embedding)
        return self.shortcut(x) + self.conv2(self.dropout(self.activation(h)))


BLOCKS: dict[str, type[PlainBlock] | type[ResidualBlock]] = {"plain": PlainBlock, "residual": ResidualBlock}


class Blocks(nn.Module):
    """The blocks of one resolution, each followed by self-attention where the config asks for it.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        count: number of blocks.
        attention: whether self-attention follows each block.
        dropout: share of values dropped in training.
        style: the options that all blocks of the network share.
    """

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin.enable_gradient_checkpointing

    def __init__(
        self, in_channels: int, out_channels: int, count: int, attention: bool, dropout: float, style: BlockStyle
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * count
        self.blocks = nn.ModuleList(BLOCKS[style.block](i, o, dropout, style) for i, o in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(
            SelfAttention(out_channels, style.head_channels, style.make_norm(out_channels))
            if attention
            else nn.Identity()
            for _ in range(count)
        )
        self.gradient_checkpointing = False  # set by the same call

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, C_in, H, W) and embedding (B, E) to a map (B, C_out, H, W)."""
        for block, attention in zip(self.blocks, self.attentions):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, embedding)
                x = self._gradient_checkpointing_func(attention, x)
            else:
                x = attention(block(x, embedding))
        return x


class Downsample(nn.Sequential):
    """Halves height and width: 2x2 max pooling (2015) or a strided convolution.

    Sizes round up in a padded network, so that no row is lost, and down in an unpadded one. To round up, pooling adds a
    row and a column of -inf at the far end; for an even size, pooling drops these again. `ceil_mode` would give the
    same values, but the default compiler would then make a graph for each parity.
    """

    def __init__(self, kind: str, channels: int, style: BlockStyle) -> None:
        padded = style.border == 0
        if kind == "max_pool":
            far_end = nn.ConstantPad2d((0, 1, 0, 1), -torch.inf) if padded else nn.Identity()
            super().__init__(far_end, nn.MaxPool2d(kernel_size=2))
        elif padded:
            super().__init__(nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1))
        else:
            super().__init__(nn.Conv2d(channels, channels, kernel_size=2, stride=2))


class Upsample(nn.Sequential):
    """Doubles height and width by the up-convolution of 2015, in either of its two readings.

    "transposed": a transposed 2x2 convolution of stride 2, as in the authors' network. "nearest": every value repeated
    2x2, then a 2x2 convolution (padded by one zero row and column at the far end to keep the size).
    """

    def __init__(self, kind: str, in_channels: int, out_channels: int) -> None:
        if kind == "transposed":
            super().__init__(nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2))
        else:
            super().__init__(
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.ZeroPad2d((0, 1, 0, 1)),
                nn.Conv2d(in_channels, out_channels, kernel_size=2),
            )


class EncoderStage(nn.Module):
    """One resolution of the contracting path: blocks, then downsampling."""

    def __init__(self, blocks: Blocks, downsample: Downsample) -> None:
        super().__init__()
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: Tensor, embedding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map (B, C_in, H, W) to the downsampled map (B, C, H / 2, W / 2) and the skip connection (B, C, H, W)."""
        skip = self.blocks(x, embedding)
        return self.downsample(skip), skip


class DecoderStage(nn.Module):
    """One resolution of the expanding path: upsampling, concatenation with the skip connection, blocks."""

    def __init__(self, upsample: Upsample, blocks: Blocks, crop_skip: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.blocks = blocks
        self.crop_skip = crop_skip  # unpadded convolutions make the map smaller than the skip

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor | None) -> Tensor:
        """Map (B, C_in, H / 2, W / 2) and skip connection (B, C, H, W) to a map (B, C, H, W)."""
        x = self.upsample(x)
        if self.crop_skip:
            skip = fit(skip, x)
        else:
            x = fit(x, skip)  # crops a row or column where downsampling rounded up
        return self.blocks(torch.cat([skip, x], dim=1), embedding)
