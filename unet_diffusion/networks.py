"""The network that a run starts from: a preset, a JSON config, or an earlier run."""

import json
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from unet_diffusion.config import check_keys
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet


def load_unet(source: str, wanted: dict[str, Any]) -> UNet:
    """Builds or loads a network.

    Args:
        source: name of a preset; path of a JSON file of config values; or a folder that a run or `save_pretrained`
            wrote, whose weights are loaded. A `UNet2DModel` of diffusers becomes a `UNet2DAdapter`.
        wanted: config values that the run needs. They override a preset's or a file's; saved weights must agree with
            them, but for `sample_size`, which any padded network can change.

    Raises:
        ValueError: nothing of that name, an unknown config value, or weights made for something else.
    """
    path = Path(source)
    if path.is_dir():
        unet = load_saved(saved_unet_folder(path))
        for key, value in wanted.items():
            if key != "sample_size" and unet.config[key] != value:
                raise ValueError(
                    f"{key} is {value!r} for these data and options, but the network in {source} has "
                    f"{unet.config[key]!r}; use data and options like its own, or start from a preset."
                )
        unet.register_to_config(sample_size=wanted.get("sample_size", unet.config.sample_size))
        return unet
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"model is {source!r}, but there is no such file.")
        values = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if not key.startswith("_")}
        check_keys(values, UNet._get_init_keys(UNet) - {"self"})
        return UNet(**{**values, **wanted})
    return UNet.from_preset(source, **wanted)


def load_saved(folder: Path) -> UNet:
    """The network in a folder with its weights and `config.json`, of the class that this file names.

    Raises:
        ValueError: a class that is neither ours nor a `UNet2DModel`.
    """
    name = json.loads((folder / "config.json").read_text("utf-8")).get("_class_name")
    if name == UNet2DModel.__name__:
        return UNet2DAdapter.from_stock(UNet2DModel.from_pretrained(folder, use_safetensors=True))
    for network in (UNet, UNet2DAdapter):
        if name == network.__name__:
            return network.from_pretrained(folder)
    raise ValueError(f"the network in {folder} is a {name}, but must be a UNet, or a UNet2DModel of diffusers.")


def check_run(run: Path) -> None:
    """Raises a ValueError unless the folder holds a saved pipeline."""
    if not (run / "model_index.json").is_file():
        raise ValueError(f"run is {run}, but there is no model_index.json; give the folder of a finished run.")


def saved_unet_folder(run: Path) -> Path:
    """Where the weights of a run or of a saved network are.

    Raises:
        ValueError: there is no network in the folder.
    """
    for folder in (run / "unet", run):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            return folder
    raise ValueError(f"{run} holds no trained network; give the folder of a finished run.")
