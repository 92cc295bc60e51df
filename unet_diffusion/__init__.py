"""One U-Net for diffusion and segmentation.

Importing the package imports `unet_diffusion.unet`, which saved pipelines are resolved through.
"""

from unet_diffusion.unet import UNet, UNetOutput
from unet_diffusion.version import __version__

__all__ = ["UNet", "UNetOutput", "__version__"]
