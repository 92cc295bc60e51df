"""Segmentation networks for grey pictures: ours, and those that a user would pick instead, at equal parameters."""

from collections.abc import Callable
from importlib import import_module

import torch
from benchmarks.contenders import NETWORKS, OURS
from torch import Tensor, nn

from unet_diffusion.networks import load_unet

MONAI, LAYOUT, SMP = "MONAI BasicUNet", "U-Net with batch norm", "smp Unet"
PEERS = (MONAI, LAYOUT, SMP)
CLASSES = 2
WIDTHS = (16, 32, 64, 128, 256)


class BatchNormUNet(nn.Module):
    """The network of 2015 as most repositories build it: padded, with batch normalisation, and nothing else.

    Args:
        widths: channels of each resolution, finest first.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        pairs = list(zip((1, *widths), widths))
        self.down = nn.ModuleList(block(i, o) for i, o in pairs)
        self.pool = nn.MaxPool2d(2)
        up = pairs[:0:-1]  # from the deepest resolution
        self.widen = nn.ModuleList(nn.ConvTranspose2d(deep, fine, 2, stride=2) for fine, deep in up)
        self.up = nn.ModuleList(block(2 * fine, fine) for fine, _ in up)
        self.head = nn.Conv2d(widths[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 1, H, W), of sides that the poolings divide, to scores (B, classes, H, W)."""
        skips = []
        for depth, stage in enumerate(self.down):
            x = stage(self.pool(x) if depth else x)
            skips.append(x)
        skips.pop()
        for widen, stage in zip(self.widen, self.up):
            x = stage(torch.cat([skips.pop(), widen(x)], dim=1))
        return self.head(x)


def block(in_channels: int, out_channels: int) -> nn.Module:
    """Twice: convolution, normalisation, activation."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


def segmenter(name: str) -> nn.Module:
    """A network of about 2 million parameters; smp's is the one with a small encoder of its own making.

    Raises:
        ImportError: the library is not installed, or does not load on this machine.
    """
    config = {"in_channels": 1, "out_channels": None, "time_embedding": None, "num_classes": CLASSES}
    makers: dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: load_unet(str(NETWORKS / "segmentation-2m.json"), config),
        MONAI: lambda: import_module("monai.networks.nets").BasicUNet(2, 1, CLASSES),
        LAYOUT: BatchNormUNet,
        SMP: lambda: import_module("segmentation_models_pytorch").Unet(
            "mobilenet_v2", encoder_weights=None, in_channels=1, classes=CLASSES
        ),
    }
    return makers[name]()
