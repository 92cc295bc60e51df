"""One U-Net for diffusion and segmentation.

Importing the package imports the modules that saved pipelines are resolved through: `unet_diffusion.unet`,
`unet_diffusion.stock_unet` and `unet_diffusion.adapters`.
"""

from unet_diffusion.adapters import PixelClassifier, UNet2DAdapter
from unet_diffusion.unet import UNet, UNetOutput
from unet_diffusion.version import __version__

__all__ = ["PixelClassifier", "UNet", "UNet2DAdapter", "UNetOutput", "__version__"]
