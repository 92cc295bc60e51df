"""Our noise predictors and those that a user would pick instead, at equal numbers of parameters."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

from diffusers import UNet2DModel
from torch import Tensor, nn

from scripts import NETWORKS
from unet_diffusion import UNet
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import autocast
from unet_diffusion.saved_runs import load_unet

T = TypeVar("T")
OURS, STOCK = "unet-diffusion", "diffusers UNet2DModel"


@dataclass(frozen=True)
class Contender:
    """A noise predictor.

    Attributes:
        network: has about as many parameters as the others.
        predict: maps noisy images (B, C, H, W) and timesteps (B,) to the prediction (B, C, H, W).
    """

    network: nn.Module
    predict: Callable[[Tensor, Tensor], Tensor]

    @property
    def parameters(self) -> int:
        """Number of parameters of the network."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def at(self, precision: Precision) -> "Contender":
        """The same network, which computes in a precision as our training and pipelines do; it predicts in float32."""

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            with autocast(noisy.device, precision):
                predicted = self.predict(noisy, timesteps)
            return predicted.float()

        return Contender(self.network, predict)


def stock(network: UNet2DModel) -> Contender:
    """A contender whose network has the call signature of `UNet2DModel`, like ours."""
    return Contender(network, lambda noisy, timesteps: network(noisy, timesteps, return_dict=False)[0])


def nine_million(name: str, side: int) -> Contender:
    """A network of about 9 million parameters for RGB images of `side` pixels; defaults of its library except widths.

    Raises:
        ImportError: the library is not installed, or does not load on this machine.
        ValueError: `name` is not a contender.
    """
    if name == OURS:
        return stock(load_unet(str(NETWORKS / "cifar-9m.json"), {"sample_size": side}))
    if name == STOCK:
        return stock(UNet2DModel(sample_size=side, block_out_channels=(64, 128, 128, 128)))
    if name == "MONAI DiffusionModelUNet":
        kind = import_module("monai.networks.nets").DiffusionModelUNet
        network = kind(2, 3, 3, channels=(64, 128, 128, 128), attention_levels=(False, True, True, True))
        return Contender(network, network)
    if name == "lucidrains Unet":
        kind = import_module("denoising_diffusion_pytorch").Unet
        network = kind(dim=32, channels=3)
        return Contender(network, network)
    raise ValueError(f"name is {name!r}, but must be one of {', '.join(CONTENDERS)}.")


def ddpm_32(name: str, side: int = 32) -> Contender:
    """A network for CIFAR-10 without dropout: ours, or the configuration of google/ddpm-cifar10-32.

    Raises:
        ValueError: the library has no network of this size.
    """
    if name == OURS:
        return stock(UNet.from_preset("ddpm-32", sample_size=side, dropout=0.0))
    if name != STOCK:
        raise ValueError(f"name is {name!r}, but only {OURS} and {STOCK} have a network of this size.")
    return stock(
        UNet2DModel(
            sample_size=side,
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


def present(make: Callable[[str], T], names: Iterable[str]) -> tuple[dict[str, T], dict[str, str]]:
    """The contenders that load on this machine, and the reasons why the others do not."""
    loaded, missing = {}, {}
    for name in names:
        try:
            loaded[name] = make(name)
        except (ImportError, RuntimeError) as error:
            missing[name] = f"not run: {type(error).__name__}: {error}"
    return loaded, missing


CONTENDERS = (OURS, STOCK, "MONAI DiffusionModelUNet", "lucidrains Unet")
SIZES: dict[str, Callable[[str, int], Contender]] = {"9m": nine_million, "ddpm-32": ddpm_32}
