"""Networks of other libraries behind the interface of ours: the same loop trains, the same pipeline runs them."""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from monai.networks.nets import BasicUNet
from torch import Tensor

from unet_diffusion import UNetOutput


class MonaiUNet(ModelMixin, ConfigMixin):
    """MONAI's `BasicUNet` in two dimensions, with its own defaults but for channels and classes.

    Args:
        in_channels: of the pictures.
        num_classes: the background included.
        features: widths, as `BasicUNet` takes them.
    """

    noise_head = None

    @register_to_config
    def __init__(
        self, in_channels: int, num_classes: int, features: tuple[int, ...] = (32, 32, 64, 128, 256, 32)
    ) -> None:
        super().__init__()
        self.network = BasicUNet(2, in_channels, num_classes, features=features)
        # finest last, as of our networks: four poolings
        self.feature_info = [{"channels": features[-1], "stride": stride} for stride in (8, 4, 2, 1)]

    def to_segmentation(self) -> "MonaiUNet":
        """It has no other head."""
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Any = None,
        class_labels: Any = None,
        return_dict: bool = True,
        *,
        head: str = "",
    ) -> UNetOutput | tuple[Tensor]:
        """Pictures (B, C, H, W) to logits (B, K, H, W)."""
        logits = self.network(sample)
        return UNetOutput(logits=logits) if return_dict else (logits,)
