"""Our segmentation networks for grey images and those that a user would pick instead, at equal parameters."""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from scripts import NETWORKS
from scripts.benchmarks.compared_networks import OURS
from scripts.benchmarks.other_libraries import BatchNormUNet, MonaiUNet
from unet_diffusion.saved_runs import load_unet

LEAN = "unet-diffusion, lean"
MONAI, LAYOUT, SMP = "MONAI BasicUNet", "U-Net with batch norm", "smp Unet"
PEERS = (MONAI, LAYOUT, SMP)
CLASSES = 2


def segmenter(name: str) -> nn.Module:
    """A network of about 2 million parameters; smp's, with MobileNetV2 as its encoder, is larger.

    Raises:
        ImportError: the library is not installed, or does not load on this machine.
    """
    config = {"in_channels": 1, "out_channels": None, "time_embedding": None, "num_classes": CLASSES}
    makers: dict[str, Callable[[], nn.Module]] = {
        OURS: lambda: load_unet(str(NETWORKS / "segmentation-2m.json"), config),
        LEAN: lambda: load_unet(str(NETWORKS / "segmentation-lean.json"), config),
        MONAI: lambda: MonaiUNet(1, CLASSES),
        LAYOUT: lambda: BatchNormUNet(1, CLASSES),
        SMP: lambda: import_module("segmentation_models_pytorch").Unet(
            "mobilenet_v2", encoder_weights=None, in_channels=1, classes=CLASSES
        ),
    }
    return makers[name]()
