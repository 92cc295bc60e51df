"""Segmentation networks of other libraries with the interface of ours: our loop trains and our pipeline runs them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion import UNetOutput


class Peer(ModelMixin, ConfigMixin):
    """A network that only segments; its `feature_info` lists the maps of its decoder, finest last."""

    noise_head = None
    feature_info: list[dict[str, int]]

    def to_segmentation(self, *, instances: bool | None = None) -> "Peer":
        """Returns itself, since it has no other head, and none for objects."""
        return self

    def logits(self, sample: Tensor) -> Tensor:
        """Images (B, C, H, W) to scores (B, K, H, W)."""
        raise NotImplementedError

    def forward(
        self,
        sample: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        return_dict: bool = True,
        *,
        head: str = "",
    ) -> UNetOutput | tuple[Tensor]:
        """The scores, as our networks return them."""
        logits = self.logits(sample)
        return UNetOutput(logits=logits) if return_dict else (logits,)


class MonaiUNet(Peer):
    """MONAI's `BasicUNet` in two dimensions, with its defaults except for channels and classes.

    Args:
        in_channels: number of image channels.
        num_classes: number of classes, including the background.
        features: widths, as for `BasicUNet`.

    Raises:
        ImportError: MONAI is not installed.
    """

    @register_to_config
    def __init__(
        self, in_channels: int, num_classes: int, features: tuple[int, ...] = (32, 32, 64, 128, 256, 32)
    ) -> None:
        super().__init__()
        self.network = import_module("monai.networks.nets").BasicUNet(2, in_channels, num_classes, features=features)
        # four poolings
        self.feature_info = [{"channels": features[-1], "stride": stride} for stride in (8, 4, 2, 1)]

    def logits(self, sample: Tensor) -> Tensor:
        """Images (B, C, H, W) to scores (B, K, H, W)."""
        return self.network(sample)


class BatchNormUNet(Peer):
    """The network of 2015 as most repositories build it: padded, with batch normalisation, and nothing else.

    Args:
        in_channels: number of image channels; the sides of the images must be multiples of the stride of the poolings.
        num_classes: number of classes, including the background.
        widths: channels of each resolution, finest first.
    """

    @register_to_config
    def __init__(self, in_channels: int, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        pairs = list(zip((in_channels, *widths), widths))
        self.down = nn.ModuleList(block(i, o) for i, o in pairs)
        self.pool = nn.MaxPool2d(2)
        up = pairs[:0:-1]  # from the deepest resolution
        self.widen = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, stride=2) for fine, deep in up)
        self.up = nn.ModuleList(block(2 * fine, fine) for fine, _ in up)
        self.head = nn.Conv2d(widths[0], num_classes, 1)
        strides = [2**level for level in range(len(widths) - 1)]
        self.feature_info = [{"channels": w, "stride": s} for w, s in reversed(list(zip(widths, strides)))]

    def logits(self, sample: Tensor) -> Tensor:
        """Images (B, C, H, W) to scores (B, K, H, W)."""
        x, skips = sample, []
        for depth, stage in enumerate(self.down):
            x = stage(self.pool(x) if depth else x)
            skips.append(x)
        skips.pop()
        for widen, stage in zip(self.widen, self.up):
            x = stage(torch.cat([skips.pop(), widen(x)], dim=1))
        return self.head(x)


def block(
    in_channels: int,
    out_channels: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Convolution, normalisation and activation, twice."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), norm(out_channels), activation()]
    return nn.Sequential(*layers)
