"""One U-Net for diffusion and segmentation.

diffusers looks up the class of a saved network in the modules that are already imported: `unet_diffusion.unet`,
`unet_diffusion.stock_unet` and `unet_diffusion.adapters`. So importing the package adds these three to the imported
modules. They run, and import torch and diffusers, only when something in them is first used, since `unet-diffusion
--help` needs neither.
"""

import sys
from typing import TYPE_CHECKING, Any

from unet_diffusion.importing import FormerNames, import_late
from unet_diffusion.version import __version__

if TYPE_CHECKING:
    from unet_diffusion.adapters import PixelClassifier
    from unet_diffusion.stock_unet import UNet2DAdapter
    from unet_diffusion.unet import UNet, UNetOutput

__all__ = ["PixelClassifier", "UNet", "UNet2DAdapter", "UNetOutput", "__version__"]

unet, stock_unet, adapters = (import_late(f"{__name__}.{name}") for name in ("unet", "stock_unet", "adapters"))
if not any(type(finder).__name__ == FormerNames.__name__ for finder in sys.meta_path):  # a reload makes new classes
    sys.meta_path.append(FormerNames())  # last, so that today's names come first


def __dir__() -> list[str]:
    """Lists the public names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Finds the public classes in their modules."""
    places = {"PixelClassifier": adapters, "UNet2DAdapter": stock_unet, "UNet": unet, "UNetOutput": unet}
    if name in places:
        return getattr(places[name], name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
