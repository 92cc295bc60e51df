"""A mixin that builds a network from a config of its own class only."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOREIGN = "down_block_types"  # a key of diffusers' U-Nets; they show its value when they refuse it
OWN = "own_down_block_types"  # the key for its value in classes that have FOREIGN themselves
STOCK = "block_out_channels"  # a key that all U-Nets of diffusers have, and most of ours do not
ADDED = ("segmentation_head.", "instance_head.")  # weights that a network may get later
ADDED_BY = ("num_classes", "instances")  # the config values that add them
FIXES = {
    "UNet2DModel": "make a UNet of it: UNet2DAdapter.from_stock(UNet2DModel.from_pretrained(...)), with "
    "`from unet_diffusion.adapters import UNet2DAdapter`",
    "UNet2DAdapter": "use UNet2DAdapter, from unet_diffusion.adapters",
}


class OwnConfig:
    """A mixin for networks, before `ModelMixin`: it refuses the configs of other classes, and they refuse its own.

    From a foreign config, diffusers would take the keys that it knows and return a network without the saved weights,
    since their names differ. So saved configs hold one key of a `UNet2DModel` with an invalid value: a sentence that
    names the class to use.

    Attributes:
        former_names: earlier names of the class, which saved configs may hold.
    """

    former_names: tuple[str, ...] = ()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Checks the class that the config names, then calls `ConfigMixin.extract_init_dict`.

        A subclass also takes the configs of a base class if it has the same arguments.

        Raises:
            ValueError: the config names another class.
        """
        known = cls._get_init_keys(cls)  # type: ignore[attr-defined]  # of ConfigMixin
        unnamed = "UNet2DModel" if STOCK in config_dict and STOCK not in known else cls.__name__
        name = config_dict.get("_class_name", unnamed)
        if name not in cls._own_names():
            fix = FIXES.get(name, "load it with that class")
            raise ValueError(f"this is the config of a {name}, but must be that of a {cls.__name__}; {fix}.")
        own = dict(config_dict)
        if OWN in own:
            own[FOREIGN] = own.pop(OWN)
        elif FOREIGN not in known:
            own.pop(FOREIGN, None)
        return super().extract_init_dict(own, **kwargs)  # type: ignore[misc]  # of the class beside this mixin

    def to_json_string(self) -> str:
        """Returns the content of `config.json`, which the classes of diffusers refuse."""
        values = json.loads(super().to_json_string())  # type: ignore[misc]  # of the class beside this mixin
        if FOREIGN in values:
            values[OWN] = values[FOREIGN]
        values[FOREIGN] = [f"these weights are loaded with {type(self).__name__}.from_pretrained, of unet_diffusion"]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a network as `ModelMixin.from_pretrained` does.

        Raises:
            ValueError: the config names another class, the folder is that of a pipeline, or weights are missing, unless
                `ignore_mismatched_sizes` or `output_loading_info` is set.
        """
        cls._check_folder(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        told = {**kwargs, "output_loading_info": True}
        network, info = super().from_pretrained(pretrained_model_name_or_path, **told)  # type: ignore[misc]
        with_info = kwargs.get("output_loading_info")
        if info["missing_keys"] and not with_info and not kwargs.get("ignore_mismatched_sizes"):
            names = sorted(map(str, info["missing_keys"]))
            fix = "get the folder again, or save the network without adapters (unet.unload_lora())"
            asked = [f"{name}={kwargs[name]}" for name in ADDED_BY if name in kwargs]
            if asked and all(name.startswith(ADDED) for name in names):
                fix = f"load it as it is, and add the head by unet.to_segmentation({', '.join(asked)})"
            raise ValueError(
                f"{len(names)} weights of the network are not in {pretrained_model_name_or_path}, such as {names[0]}, "
                f"and would be random; {fix}."
            )
        return (network, info) if with_info else network

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Builds a network as `ConfigMixin.from_config` does; raises the errors of `extract_init_dict`."""
        if isinstance(config, (str, os.PathLike)):
            cls._check_folder(Path(config, kwargs.get("subfolder") or ""))
        return super().from_config(config, **kwargs)  # type: ignore[misc]  # of the class beside this mixin

    @classmethod
    def _check_folder(cls, folder: Path) -> None:
        """Raises a ValueError if the networks are in subfolders, as in a run; it names the subfolder."""
        held = {path.parent: saved_class(path) for path in sorted(folder.glob("*/config.json"))}
        held = {place: name for place, name in held.items() if name}
        if not held or saved_class(folder / "config.json"):
            return
        own = next((place for place, name in held.items() if name in cls._own_names()), None)
        names = ", ".join(f"{place.name} ({name})" for place, name in held.items())
        fix = f"it holds {names}, but no {cls.__name__}"
        if own is not None:
            fix = f"load its {own.name} with {cls.__name__}.from_pretrained({str(own)!r})"
        raise ValueError(f"{folder} is the folder of a run or a pipeline, not of a network; {fix}.")

    @classmethod
    def _own_names(cls) -> set[str]:
        """Names of the classes whose configs this class reads: those with its arguments, and former names."""
        same = [kind for kind in cls.__mro__ if kind.__init__ is cls.__init__]  # type: ignore[misc]  # of classes
        return {*cls.former_names, *(kind.__name__ for kind in same)}


def saved_class(config: Path) -> str | None:
    """The class that the config of a saved network names; None if there is no such config."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("_class_name") if isinstance(values, dict) else None
