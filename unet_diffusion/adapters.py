"""Masks from a trained noise predictor: a `PixelClassifier`, for any network, and `UNet2DAdapter`, for a stock one.

The classifier reads the features of a frozen noise predictor, pixel by pixel: the label-efficient recipe of Baranchuk
et al. 2022 (section 4). Given an image with the noise of a few timesteps, the decoder's maps show what each pixel
belongs to. A classifier learns to read these maps from a handful of masks. In the paper, ten classifiers vote on the
stored features of all images; here there is one classifier, and features are computed one timestep at a time.

The path of this module, `unet_diffusion.adapters`, is written into pipelines saved with a classifier; do not move it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from einops import rearrange
from torch import Tensor, nn

from unet_diffusion.checks import is_count, require, takes_plain
from unet_diffusion.network.config import check_recipe, check_segments_without_class
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.network.own_config import OwnConfig
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

__all__ = ["PixelClassifier", "UNet2DAdapter"]


class PixelClassifier(OwnConfig, ModelMixin, ConfigMixin):
    """Class scores of each pixel, from the maps of a network's decoder at several timesteps.

    It computes a perceptron on the features of all timesteps and stages, upsampled to the image's size and joined. The
    first layer and bilinear upsampling are both linear, so they can be swapped: every map is normalised and projected
    at its own resolution, projections of one resolution are added up, and only their sums are upsampled. So only one
    timestep's features are held at full width at a time.

    It takes no statistics from the batch or the image: a pixel's scores depend only on the features around it.

    Args:
        channels: channels of each map from the decoder.
        strides: pixels of the image per pixel of each of these maps.
        stages: indices of these maps in `UNet.feature_info`.
        timesteps: timesteps whose noise is added to the image that the network sees.
        num_classes: number of classes, background included.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: a value is wrong; the message gives the rule and the fix.
    """

    _no_split_modules = ["Projection"]
    _repeated_blocks = ["Projection"]

    @takes_plain
    @register_to_config
    def __init__(
        self,
        channels: tuple[int, ...],
        strides: tuple[int, ...],
        stages: tuple[int, ...],
        timesteps: tuple[int, ...],
        num_classes: int,
        hidden: tuple[int, ...] = (128, 32),
    ) -> None:
        super().__init__()
        check_recipe(timesteps, hidden, stages)
        if not len(channels) == len(strides) == len(stages) or not all(is_count(v) for v in (*channels, *strides)):
            raise ValueError(
                f"channels are {channels}, strides {strides} and stages {stages}, but each stage has one number of "
                "channels and one stride; PixelClassifier.beside(unet, ...) reads them from a network."
            )
        require(is_count(num_classes, 2), "num_classes", num_classes, "must be at least 2, background included")
        first, *further = hidden
        self.projections = nn.ModuleList(
            nn.ModuleList(Projection(width, first) for width in channels) for _ in timesteps
        )
        self.bias = nn.Parameter(torch.zeros(first, 1, 1))  # one for all projections: their sum is the first layer
        self.layers = nn.Sequential(nn.ReLU(inplace=True))
        for before, after in zip(hidden, further):
            self.layers.extend([nn.Conv2d(before, after, kernel_size=1), nn.ReLU(inplace=True)])
        self.head = nn.Conv2d(hidden[-1], num_classes, kernel_size=1)
        self._initialise()

    @classmethod
    def beside(
        cls,
        unet: UNet,
        num_classes: int,
        timesteps: Sequence[int],
        hidden: Sequence[int] = (128, 32),
        stages: Sequence[int] | None = None,
    ) -> "PixelClassifier":
        """Makes an untrained classifier for the features of a network, of all stages if `stages` is None.

        Raises:
            ValueError: the network lacks a stage, or a value is wrong for a classifier.
        """
        info = unet.feature_info
        stages = tuple(range(len(info)) if stages is None else stages)
        check_recipe(timesteps, hidden, stages)
        check_stages(stages, info)
        channels, strides = (tuple(info[stage][key] for stage in stages) for key in ("channels", "stride"))
        return cls(channels, strides, stages, tuple(timesteps), num_classes, tuple(hidden))

    def check_trunk(self, unet: UNet, scheduler: SchedulerMixin | None) -> None:
        """Raises a ValueError unless the classifier can read the network's features and the scheduler can add noise."""
        config, own = unet.config, self.config
        if scheduler is None or not hasattr(scheduler, "add_noise"):
            raise ValueError(
                "a pixel classifier reads images with noise, but there is no scheduler that adds it; "
                "pass the scheduler that the noise predictor was trained with."
            )
        limit = scheduler.config.num_train_timesteps
        if max(own.timesteps) >= limit:
            raise ValueError(f"timesteps are {list(own.timesteps)}, but those of the scheduler are 0 to {limit - 1}.")
        if config.get("padding", "same") != "same" or config.get("time_embedding", "sinusoidal") is None:
            raise ValueError(
                f"the network has padding {config.get('padding')!r} and time_embedding "
                f"{config.get('time_embedding')!r}, but a pixel classifier reads noise predictors, which are padded "
                "and take timesteps; give the network of a DDPM run."
            )
        check_segments_without_class(config)
        check_stages(own.stages, unet.feature_info)
        wanted = [{"channels": width, "stride": stride} for width, stride in zip(own.channels, own.strides)]
        found = [unet.feature_info[stage] for stage in own.stages]
        if found != wanted:
            raise ValueError(
                f"the classifier reads {wanted} at stages {list(own.stages)}, but the network has {found} there; "
                "use the network that it was trained with."
            )

    def features(
        self, unet: UNet, scheduler: SchedulerMixin, clean: Tensor, noises: Iterable[Tensor]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yields the decoder's maps of noisy images, one timestep after the other; each is computed when it is needed.

        Args:
            unet: the network, in evaluation mode; it gets no gradients.
            scheduler: its `add_noise` makes the noisy versions.
            clean: float32 images in [-1, 1], (B, C, H, W).
            noises: standard normal, (B, C, H, W), one for each timestep.

        Yields:
            The maps of the classifier's stages, (B, C_stage, H / stride, W / stride), sizes rounded up.
        """
        for timestep, noise in zip(self.config.timesteps, noises):
            yield noisy_features(unet, scheduler, clean, noise, timestep, self.config.stages)

    def forward(self, features: Iterable[Sequence[Tensor]], size: Sequence[int]) -> Tensor:
        """Returns class scores before softmax, (B, K, H, W).

        Without gradients, the maps of one timestep are freed before those of the next are computed; with gradients, the
        normalised maps stay for the backward pass.

        Args:
            features: the maps of all stages for each timestep, as `features` yields them.
            size: height and width of the image.

        Raises:
            ValueError: maps are missing, or their size does not fit the image.
        """
        maps_of_timesteps = iter(features)
        sums: list[Any] = [0] * len(self.config.stages)  # (B, hidden, H / stride, W / stride) each
        for projections in self.projections:
            _add(sums, projections, next(maps_of_timesteps, ()))  # not in a variable, which would keep the maps
        hidden: Tensor = self.bias
        for total, stride in zip(sums, self.config.strides):
            hidden = hidden + upsampled(total, stride, size)  # (B, hidden, H, W)
        return self.head(self.layers(hidden))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialises all projections together as one layer (He et al. 2015), and the head at zero."""
        fan_in = len(self.projections) * sum(self.config.channels)
        for module in self.modules():
            if isinstance(module, Projection):
                nn.init.normal_(module.linear.weight, std=(2 / fan_in) ** 0.5)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)


class Projection(nn.Module):
    """The part of the first layer for one map, computed at the map's own resolution.

    Each pixel's features are normalised first (Ba et al. 2016), since their scales differ between stages and timesteps.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)  # the linear layer after it can do that
        self.linear = nn.Conv2d(channels, width, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, hidden, h, w)."""
        normal = self.norm(rearrange(x, "b c h w -> b h w c"))
        return self.linear(rearrange(normal, "b h w c -> b c h w"))


@torch.no_grad()
def noisy_features(
    unet: UNet, scheduler: SchedulerMixin, clean: Tensor, noise: Tensor, timestep: int, stages: Sequence[int]
) -> tuple[Tensor, ...]:
    """Returns the decoder's maps (B, C_stage, h, w) of images (B, C, H, W) in [-1, 1] with one timestep's noise."""
    steps = torch.full((len(clean),), timestep, device=clean.device)
    noisy = scheduler.add_noise(clean, noise, steps).to(unet.dtype)
    maps = unet(channels_last(noisy), timestep, head="features").features
    return tuple(maps[stage] for stage in stages)


def upsampled(x: Tensor, stride: int, size: Sequence[int]) -> Tensor:
    """Enlarges a map (B, C, h, w) bilinearly to the height and width of the image, (B, C, H, W).

    Pixel p of the map stands for pixels stride * p to stride * p + stride - 1 of the image. The last map pixel may
    reach beyond the border, since sizes round up. So the map is enlarged by exactly the stride and cut at the far end.
    If it were enlarged to the image's size directly, it would be squeezed unless that size is a multiple of the stride,
    and a window would differ from the whole image.
    """
    height, width = size
    if x.shape[2:] != (-(-height // stride), -(-width // stride)):
        raise ValueError(
            f"a map of stride {stride} is {x.shape[2]}x{x.shape[3]}, but the image is {height}x{width}; "
            "give the size of the image that the features come from."
        )
    if stride == 1:
        return x
    return F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)[..., :height, :width]


def check_stages(stages: Sequence[int], feature_info: Sequence[Any]) -> None:
    """Raises a ValueError if a network lacks one of the stages."""
    if max(stages) >= len(feature_info):
        raise ValueError(
            f"stages are {list(stages)}, but the network's decoder has stages 0 to {len(feature_info) - 1}, the "
            "finest last."
        )


def _add(sums: list[Any], projections: Any, maps: Sequence[Tensor]) -> None:
    """Adds the projected maps of a timestep to the sum of each stage."""
    if len(maps) != len(projections):
        raise ValueError(
            f"there are {len(maps)} maps of a timestep, but the classifier takes {len(projections)} of each of its "
            "timesteps; give the output of its method `features`."
        )
    for stage, (projection, x) in enumerate(zip(projections, maps)):
        sums[stage] += projection(x)
