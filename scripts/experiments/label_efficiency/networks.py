"""The networks of the experiment that are not ours, and the sizes of all."""

from functools import cache
from pathlib import Path

import torch

from scripts.benchmarks.other_libraries import MonaiUNet, Peer
from scripts.experiments.label_efficiency.efficientnet_unet import EfficientNetUNet
from unet_diffusion.saved_runs import load_unet

MONAI_WIDTHS = (32, 32, 64, 128, 256, 32)  # the defaults of MONAI, which are scaled
EQUAL = 0.05  # numbers of parameters count as equal up to this relative difference


@cache
def monai_features(network: Path, channels: int, num_classes: int) -> tuple[int, ...]:
    """Widths with which MONAI's network has as many parameters as ours, within 5%.

    Raises:
        ValueError: no such widths exist, since ours is too small.
    """
    with torch.device("meta"):
        wanted = {"in_channels": channels, "out_channels": None, "num_classes": num_classes}
        ours = parameters(load_unet(str(network), wanted))
        found: tuple[int, ...] = MONAI_WIDTHS
        low, high = 0.0, 16.0
        for _ in range(20):  # parameters grow with the factor
            middle = (low + high) / 2
            widths = tuple(max(1, round(middle * width)) for width in MONAI_WIDTHS)
            theirs = {each: parameters(MonaiUNet(channels, num_classes, each)) for each in (found, widths)}
            found = min(theirs, key=lambda each: abs(theirs[each] - ours))
            low, high = (low, middle) if theirs[widths] > ours else (middle, high)
    if abs(theirs[found] - ours) > EQUAL * ours:
        raise ValueError(
            f"{network} has {ours:,} parameters, but the nearest MONAI network {theirs[found]:,}, more than "
            f"{EQUAL:.0%} off; give a larger network, or leave monai out of methods."
        )
    return found


def parameters(network: torch.nn.Module) -> int:
    """The number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


def untrained_peer(method: str, channels: int, num_classes: int, features: tuple[int, ...] = ()) -> Peer | None:
    """The network of a method that does not use ours; None for other methods.

    Args:
        method: the way to learn.
        channels: number of image channels.
        num_classes: number of classes, including the background.
        features: widths of MONAI's network.
    """
    if method == "monai":
        return MonaiUNet(channels, num_classes, features)
    return EfficientNetUNet(channels, num_classes) if method == "imagenet" else None
