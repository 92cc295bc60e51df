"""Our networks, and those that a user would pick instead, at equal numbers of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from diffusers import UNet2DModel
from torch import Tensor, nn

from unet_diffusion import UNet
from unet_diffusion.networks import load_unet

NETWORKS = Path(__file__).parents[1] / "networks"
OURS = "unet-diffusion"


@dataclass(frozen=True)
class Contender:
    """A noise predictor.

    Attributes:
        network: of about as many parameters as the others.
        predict: noisy pictures (B, C, H, W) and timesteps (B,) to the prediction (B, C, H, W).
    """

    network: nn.Module
    predict: Callable[[Tensor, Tensor], Tensor]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def stock(network: UNet2DModel) -> Contender:
    """A network with the calls of `UNet2DModel`, which ours has too."""
    return Contender(network, lambda noisy, timesteps: network(noisy, timesteps, return_dict=False)[0])


def nine_million(name: str, side: int) -> Contender:
    """About 9 million parameters for RGB pictures of `side` pixels; what each library's defaults leave open is widths.

    Raises:
        ImportError: the library is not installed, or does not load on this machine.
    """
    if name == OURS:
        return stock(load_unet(str(NETWORKS / "cifar-9m.json"), {"sample_size": side}))
    if name == "diffusers UNet2DModel":
        return stock(UNet2DModel(sample_size=side, block_out_channels=(64, 128, 128, 128)))
    if name == "MONAI DiffusionModelUNet":
        kind = import_module("monai.networks.nets").DiffusionModelUNet
        network = kind(2, 3, 3, channels=(64, 128, 128, 128), attention_levels=(False, True, True, True))
        return Contender(network, network)
    if name == "lucidrains Unet":
        kind = import_module("denoising_diffusion_pytorch").Unet
        network = kind(dim=32, channels=3)
        return Contender(network, network)
    raise ValueError(f"name is {name!r}, which is no contender.")


def ddpm_32(name: str) -> Contender:
    """The networks of the CIFAR-10 experiments: ours, or the configuration of google/ddpm-cifar10-32."""
    if name == OURS:
        return stock(UNet.from_preset("ddpm-32"))
    return stock(
        UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            attention_head_dim=None,
            norm_eps=1e-6,
        )
    )


CONTENDERS = (OURS, "diffusers UNet2DModel", "MONAI DiffusionModelUNet", "lucidrains Unet")
