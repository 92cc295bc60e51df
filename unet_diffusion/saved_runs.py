"""Loads networks and pipelines from a preset, a JSON config or an earlier run, and chooses their device."""

from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.images.axes import AXIS_ORDERS
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.network.config import check_keys, check_model
from unet_diffusion.network.own_config import FOREIGN
from unet_diffusion.saved_index import (
    SUPER_RESOLUTION,
    check_run_for,
    read_object,
    saved_components,
    saved_kind,
    unet_folder,
)
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

T = TypeVar("T")

NETWORKS = {(kind.__module__, kind.__name__): kind for kind in (UNet, UNet2DAdapter, PixelClassifier)}
FUSED = ".to_qkv."  # in the names of weights that `fuse_qkv_projections` adds
MAX_NAMES = 3  # number of weights that an error names
GET_AGAIN = "get it again, or give the folder of another run."


def load_unet(source: str, wanted: dict[str, Any]) -> UNet:
    """Builds or loads a network.

    Args:
        source: name of a preset; path of a JSON file of config values; or a folder that a run or `save_pretrained`
            wrote, whose weights are loaded. A `UNet2DModel` of diffusers becomes a `UNet2DAdapter`.
        wanted: config values that the run needs. They override those of a preset or a file. Saved weights must agree
            with them, except for `sample_size`, which any padded network can change.

    Raises:
        ValueError: nothing has that name, a config value is unknown, or the weights were made for something else, such
            as the weights of a super-resolution run for a network that sees one image.
    """
    check_model(source)
    path = Path(source)
    if path.is_dir():
        sees_one_image = "in_channels" in wanted and wanted.get("out_channels") in (None, wanted["in_channels"])
        if sees_one_image and saved_kind(path) == SUPER_RESOLUTION:
            raise ValueError(
                f"model is {source}, a super-resolution run, whose network sees a small image beside the noisy one; "
                "start from a generation run, or from a preset."
            )
        unet = load_saved(unet_folder(path))
        for key, value in wanted.items():
            if key != "sample_size" and unet.config[key] != value:
                raise ValueError(
                    f"{key} is {value!r} for these data and options, but the network in {source} has "
                    f"{unet.config[key]!r}; use data and options that fit it, or start from a preset."
                )
        unet.register_to_config(sample_size=wanted.get("sample_size", unet.config.sample_size))
        return unet
    if path.suffix == ".json":
        values = {key: value for key, value in read_object(path).items() if not key.startswith("_") and key != FOREIGN}
        check_keys(values, UNet._get_init_keys(UNet) - {"self"})
        return UNet(**{**values, **wanted})
    return UNet.from_preset(source, **wanted)


def load_saved(folder: Path) -> UNet:
    """Loads the network in a folder with weights and a `config.json`, as the class that this file names."""
    name = read_object(folder / "config.json").get("_class_name")
    if name == UNet2DModel.__name__:
        return UNet2DAdapter.from_stock(load_weights(UNet2DModel, folder))
    for network in (UNet, UNet2DAdapter):
        if name == network.__name__:
            return load_weights(network, folder)
    raise ValueError(f"the network in {folder} is a {name}, but must be a UNet, or a UNet2DModel of diffusers.")


def load_weights(kind: type[T], folder: Path) -> T:
    """Loads a network with all of its weights, from safetensors only; a pickle is never read in their place.

    Raises:
        ValueError: the config or the weights are missing, damaged, not finite or those of another network.
    """
    read_object(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}; {GET_AGAIN}") from error
    # Weights that do not fit are reported by from_pretrained, and raise an error below.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    try:
        network, info = kind.from_pretrained(folder, use_safetensors=True, **options)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        cause = str(error).rstrip(".")
        raise ValueError(
            f"the network in {folder} cannot be loaded from safetensors, the only format that is read: {cause}; "
            f"{GET_AGAIN}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(map(str, sorted(info[problem], key=str)[:MAX_NAMES]))
            if all(FUSED in name for name in info[problem]):
                raise ValueError(
                    f"the network in {folder} was saved with fused projections, such as {names}; call "
                    "unfuse_qkv_projections() and save it again."
                )
            raise ValueError(
                f"the weights in {folder} are those of another network: {len(info[problem])} "
                f"{problem.replace('_', ' ')}, such as {names}; {GET_AGAIN}"
            )
    check_finite(network, folder)
    return network


def check_finite(network: nn.Module, place: Path) -> None:
    """Raises a ValueError if a network, read from `place`, has weights that are NaN or infinite."""
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {place} holds NaN or infinite values, so the output would too; {GET_AGAIN}")


def load_pipeline(kind: type[T], run: Path) -> T:
    """Loads the pipeline in the folder of a run, from components of this package and diffusers only.

    It reads images like the run's own, if the options `channels` and `axes` of its training state how.

    Raises:
        ValueError: the folder holds no run; a component is damaged, missing or from other code; the components do not
            make a pipeline of this kind; or only one of run and pipeline is for super-resolution.
    """
    check_run_for(run, kind.__name__)
    taken = signature(kind).parameters
    networks: dict[str, Any] = {
        name: load_weights(NETWORKS[entry], run / name)
        for name, entry in saved_components(run).items()
        if entry in NETWORKS and name in taken
    }
    try:
        pipe = kind.from_pretrained(run, use_safetensors=True, **networks)  # type: ignore[attr-defined]
    except (OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{run} cannot be loaded: {error} Get it again, or give the folder of another run.") from error
    pipe.preparation = stated_preparation(run)
    return pipe


def stated_preparation(run: Path) -> Preparation:
    """Returns the channels and the order of axes that a run's options state for its images in its `config.json`."""
    options = read_object(run / "config.json").get("data") if (run / "config.json").is_file() else None
    options = options if isinstance(options, dict) else {}
    channels, axes = options.get("channels"), options.get("axes")
    return Preparation(channels=channels if channels in (1, 3) else None, axes=axes if axes in AXIS_ORDERS else None)


def best_device(name: str) -> torch.device:
    """Returns the device of a name; "auto" is the accelerator that PyTorch finds, or else the CPU.

    Raises:
        ValueError: the name is not that of a device, or the device is not available.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    available = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise ValueError(
            f"device is {name!r}, but only {', '.join(available)} can be used here; choose one of them, or 'auto'."
        )
    return device
