"""The network that a run starts from: a preset, a JSON config, or an earlier run."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from diffusers import UNet2DModel
from safetensors import SafetensorError, safe_open

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.network.config import check_keys
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

T = TypeVar("T")

NETWORKS: dict[tuple[str, str], type] = {
    (kind.__module__, kind.__name__): kind for kind in (UNet, UNet2DAdapter, PixelClassifier)
}
SHOWN = 3  # weights named one by one
SUPER_RESOLUTION = "SuperResolutionPipeline"  # what model_index.json calls a run that enlarges images


def load_unet(source: str, wanted: dict[str, Any]) -> UNet:
    """Builds or loads a network.

    Args:
        source: name of a preset; path of a JSON file of config values; or a folder that a run or `save_pretrained`
            wrote, whose weights are loaded. A `UNet2DModel` of diffusers becomes a `UNet2DAdapter`.
        wanted: config values that the run needs. They override a preset's or a file's; saved weights must agree with
            them, but for `sample_size`, which any padded network can change.

    Raises:
        ValueError: nothing of that name, an unknown config value, or weights made for something else, such as those of
            a super-resolution run where not twice as many channels are wanted in as out.
    """
    path = Path(source)
    if path.is_dir():
        sees_one_image = "in_channels" in wanted and wanted.get("out_channels") in (None, wanted["in_channels"])
        if sees_one_image and saved_kind(path) == SUPER_RESOLUTION:
            raise ValueError(
                f"model is {source}, a super-resolution run, whose network sees a small image beside the noisy one; "
                "start from a generation run, or from a preset."
            )
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
        values = {key: value for key, value in read_object(path).items() if not key.startswith("_")}
        check_keys(values, UNet._get_init_keys(UNet) - {"self"})
        return UNet(**{**values, **wanted})
    return UNet.from_preset(source, **wanted)


def load_saved(folder: Path) -> UNet:
    """The network in a folder with its weights and `config.json`, of the class that this file names.

    Raises:
        ValueError: a class that is neither ours nor a `UNet2DModel`, or what `load_weights` refuses.
    """
    name = read_object(folder / "config.json").get("_class_name")
    if name == UNet2DModel.__name__:
        return UNet2DAdapter.from_stock(load_weights(UNet2DModel, folder))
    for network in (UNet, UNet2DAdapter):
        if name == network.__name__:
            return load_weights(network, folder)
    raise ValueError(f"the network in {folder} is a {name}, but must be a UNet, or a UNet2DModel of diffusers.")


def load_weights(kind: type[T], folder: Path) -> T:
    """A network with all of its weights, from safetensors alone: no pickle is read in their place.

    Raises:
        ValueError: a config or weights that are missing, damaged, or belong to another network, or are not finite.
    """
    anew = "get it anew, or give the folder of another run."
    read_object(folder / "config.json")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is no safetensors file that can be read: {error}; {anew}") from error
    options = {"use_safetensors": True, "output_loading_info": True}
    listed = {
        "ignore_mismatched_sizes": True,
        "low_cpu_mem_usage": False,
    }  # what does not fit is told, and refused below
    try:
        network, info = kind.from_pretrained(folder, **options, **listed)  # type: ignore[attr-defined]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        cause = str(error).rstrip(".")
        raise ValueError(
            f"the network in {folder} cannot be loaded, from safetensors alone: {cause}; {anew}"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = ", ".join(map(str, sorted(info[problem], key=str)[:SHOWN]))
            raise ValueError(
                f"the weights in {folder} are those of another network: {len(info[problem])} "
                f"{problem.replace('_', ' ')}, such as {names}; {anew}"
            )
    check_finite(network, folder)
    return network


def check_finite(network: Any, place: Path) -> None:
    """Raises a ValueError for a network, read from a place, with weights that are NaN or infinite."""
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} in {place} holds values that are NaN or infinite, so that its output would; get it anew, or "
                "give the folder of another run."
            )


def load_pipeline(kind: type[T], run: Path) -> T:
    """The pipeline in the folder of a run: of components that this package or diffusers defines, and of no other code.

    Args:
        kind: class of the pipeline.
        run: its folder.

    Raises:
        ValueError: no run, or one with a component that is damaged, missing or not of the package; components that do
            not make a pipeline of this kind; a super-resolution run for another pipeline, or another run for that one.
    """
    check_run(run)
    saved = saved_kind(run)
    if saved == SUPER_RESOLUTION != kind.__name__:
        raise ValueError(f"{run} is a super-resolution run, which only enlarges images; use it by upscale.")
    if saved != SUPER_RESOLUTION == kind.__name__:
        raise ValueError(
            f"{run} holds a {saved}, which does not enlarge images; train one that does: train-ddpm --task "
            "super-resolution."
        )
    taken = signature(kind).parameters
    networks: dict[str, Any] = {
        name: load_weights(NETWORKS[entry], run / name)
        for name, entry in saved_components(run).items()
        if entry in NETWORKS and name in taken
    }
    try:
        return kind.from_pretrained(run, use_safetensors=True, **networks)  # type: ignore[attr-defined]
    except (OSError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{run} cannot be loaded: {error} Get it anew, or give the folder of another run.") from error


def saved_components(run: Path) -> dict[str, tuple[str, str]]:
    """The module and the class of each component of a saved pipeline, by its name, which is a subfolder's.

    Raises:
        ValueError: no run; a component of other code than this package and diffusers; a name that is none of a folder
            in the run's.
    """
    check_run(run)
    return named_components(read_object(run / "model_index.json"), run)


def named_components(index: Mapping[str, Any], run: Path) -> dict[str, tuple[str, str]]:
    """`saved_components` of a `model_index.json` that is read; `run` is where it is from, for messages."""
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or not name.isidentifier():
            raise ValueError(
                f"model_index.json of {run} has {name!r}: {entry}, which is no component; get the run anew."
            )
        if entry[0].partition(".")[0] not in ("diffusers", "unet_diffusion"):
            raise ValueError(
                f"{name} of {run} is a {'.'.join(entry)}, but only code of diffusers and of this package is run; load "
                "it by DiffusionPipeline.from_pretrained(..., trust_remote_code=True), if you trust it."
            )
        found[name] = (entry[0], entry[1])
    if "unet" not in found:
        raise ValueError(f"model_index.json of {run} names no unet; give the folder of a finished run.")
    return found


def saved_kind(run: Path) -> str | None:
    """The class of a saved pipeline, by its name; None: the folder holds no pipeline."""
    index = run / "model_index.json"
    return read_object(index).get("_class_name") if index.is_file() else None


def check_run(run: Path) -> None:
    """Raises a ValueError unless the folder holds a saved pipeline."""
    if not (run / "model_index.json").is_file():
        raise ValueError(f"run is {run}, but there is no model_index.json; give the folder of a finished run.")


def read_object(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file; ValueError if it holds something else."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}; repair it, or get it anew.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but must hold keys and values; repair it.")
    return values


def saved_unet_folder(run: Path) -> Path:
    """Where the weights of a run or of a saved network are.

    Raises:
        ValueError: there is no network in the folder.
    """
    for folder in (run / "unet", run):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            return folder
    raise ValueError(
        f"{run} holds no trained network: no config.json beside weights as safetensors, the only ones that are read; "
        "give the folder of a finished run."
    )
