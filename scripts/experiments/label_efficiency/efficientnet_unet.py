"""A U-Net with an encoder that was trained on ImageNet, behind the interface of ours."""

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from scripts.benchmarks.other_libraries import Peer, block
from unet_diffusion.checks import require
from unet_diffusion.evaluation.feature_networks import EfficientNetLite0

GROUPS = 8  # of the normalisations in the decoder


class EfficientNetUNet(Peer):
    """EfficientNet-lite0 (Tan & Le 2019) with its ImageNet weights as the encoder of a U-Net.

    Each stage of the decoder joins the upsampled maps with the last maps of the encoder at that resolution, the finest
    with the image itself. The batch normalisation of the encoder keeps the statistics of ImageNet, since those of a few
    small squares are noisy; its scales and shifts learn, like everything else. Images may have any size.

    Args:
        in_channels: 3, or 1, which is repeated three times.
        num_classes: number of classes, including the background.
        widths: channels of the decoder's stages, coarsest first; multiples of 8.

    Raises:
        ValueError: `in_channels` or `widths` have other values.
        ImportError: the extra `metrics`, which brings the weights, is not installed.
    """

    mean: Tensor
    deviation: Tensor

    @register_to_config
    def __init__(self, in_channels: int, num_classes: int, widths: tuple[int, ...] = (128, 64, 48, 32, 16)) -> None:
        super().__init__()
        require(in_channels in (1, 3), "in_channels", in_channels, "must be 1 or 3; convert the images")
        valid = len(widths) == 5 and all(width >= GROUPS and width % GROUPS == 0 for width in widths)
        require(valid, "widths", tuple(widths), f"must be 5 multiples of {GROUPS}, one for each stage")
        known = EfficientNetLite0()
        # image_size=None: padding that follows the image, equal to the original at 224 pixels
        kind = import_module("efficientnet_lite_pytorch").EfficientNet
        self.encoder = kind.from_name("efficientnet-lite0", image_size=None)
        self.encoder.load_state_dict(known.network.state_dict())
        del self.encoder._conv_head, self.encoder._bn1, self.encoder._fc  # the layers after the last block
        self.register_buffer("mean", known.mean)
        self.register_buffer("deviation", known.deviation)

        filters = [block._block_args.output_filters for block in self.encoder._blocks]
        strides = [block._depthwise_conv.stride[0] for block in self.encoder._blocks]
        self.halving = {index for index, stride in enumerate(strides) if stride == 2}  # blocks that halve the sides
        skips = [3, *(filters[index - 1] for index in sorted(self.halving))]  # channels, finest first
        inputs = [filters[-1], *widths]
        self.decoder = nn.ModuleList(
            block(below + skip, width, partial(nn.GroupNorm, GROUPS), nn.SiLU)
            for below, skip, width in zip(inputs, reversed(skips), widths)
        )
        self.segmentation_head = nn.Conv2d(widths[-1], num_classes, 1)
        self.feature_info = [{"channels": width, "stride": 2**level} for level, width in zip((4, 3, 2, 1, 0), widths)]

    def train(self, mode: bool = True) -> "EfficientNetUNet":
        """Sets the mode of all modules but the batch normalisations of the encoder, which keep their statistics."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def maps(self, sample: Tensor) -> list[Tensor]:
        """The normalised image and the last maps of the encoder at each resolution, strides 1 to 32."""
        encoder = self.encoder
        image = (sample.expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.deviation
        x, found = encoder._swish(encoder._bn0(encoder._conv_stem(image))), [image]
        for index, layer in enumerate(encoder._blocks):
            if index in self.halving:
                found.append(x)
            x = layer(x)
        return [*found, x]

    def logits(self, sample: Tensor) -> Tensor:
        """Images (B, C, H, W) to scores (B, K, H, W)."""
        *skips, x = self.maps(sample)
        for each in self.decoder:
            skip = skips.pop()
            x = each(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], dim=1))
        return self.segmentation_head(x)
