"""The small image that super-resolution starts from, and the network's condition that is made from it.

As in SR3 (Saharia et al. 2021), the network sees the noisy image and, in further channels, the small image enlarged to
the same size by bicubic interpolation. Images are shrunk and enlarged by the antialiased bicubic filter of Pillow
(a = -0.5), computed by PyTorch in float32; so an image that Pillow has shrunk is like the small images of the training.
"""

import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.images.pixel_range import PixelRange


def shrunk(clean: Tensor, scale: int, pixel_range: PixelRange) -> Tensor:
    """Shrinks images (B, C, H, W) in [-1, 1] to (B, C, H / scale, W / scale), as a file would store them.

    Args:
        clean: the images; both sides are multiples of the scale.
        scale: the factor by which each side becomes smaller.
        pixel_range: how values are stored; overshoot is clipped, and values are rounded if they are stored as integers.
    """
    size = (clean.shape[2] // scale, clean.shape[3] // scale)
    return pixel_range.to_stored(F.interpolate(clean.float(), size, mode="bicubic", antialias=True))


def enlarged(small: Tensor, scale: int, pixel_range: PixelRange) -> Tensor:
    """Enlarges stored images (B, C, h, w) `scale` times a side: the network's condition, float32 in [-1, 1]."""
    size = (small.shape[2] * scale, small.shape[3] * scale)
    return F.interpolate(pixel_range.to_model(small), size, mode="bicubic", antialias=True).clamp(-1, 1)


def with_noise(condition: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """Gaussian conditioning augmentation (Ho et al. 2021, "Cascaded diffusion models"), (B, C, H, W).

    sqrt(1 - s^2) c + s eps, the forward process with the deviation s. In the paper the network gets the level too. Here
    it does not, since levels are small and the network can see how noisy the condition is.

    Args:
        condition: enlarged images, (B, C, H, W).
        levels: deviation of the noise of each image, (B,), from 0 to 1.
        noise: standard normal, (B, C, H, W).
    """
    deviation = levels[:, None, None, None]
    return (1 - deviation.square()).sqrt() * condition + deviation * noise
