"""A mixin that reads weights from safetensors only, and only those of its own class."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any


class SafeWeights:
    """A mixin for networks, before `ModelMixin`: it never reads a pickle, even if there are no other weights.

    Nor does it read the config of another class: diffusers would only warn, and leave the weights random.
    """

    former_names: tuple[str, ...] = ()  # of the class, in files of earlier versions

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a network as `ModelMixin.from_pretrained` does, but from safetensors only.

        By default, diffusers falls back to `diffusion_pytorch_model.bin`, which is a pickle.

        Raises:
            ValueError: `use_safetensors` is False; the folder is that of a run or a pipeline, whose networks are in
                subfolders; or the network is of another class.
            OSError: there are no weights as safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, but pickles are not read; convert the weights to safetensors.")
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        cls._check_folder(folder)
        load = partial(super().from_pretrained, pretrained_model_name_or_path)  # type: ignore[misc]
        try:
            return load(**{**kwargs, "use_safetensors": True})
        except OSError:
            if not folder.is_dir() or any(folder.glob("*.bin*")):
                raise
            return load(**kwargs)  # there is no pickle: raises the error that users of diffusers know

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Goes on as `ConfigMixin.extract_init_dict`.

        Raises:
            ValueError: the config is that of another class, whose weights have other names and would not load.
        """
        saved = config_dict.get("_class_name")
        if saved is not None and saved not in cls._own_names():
            raise ValueError(
                f"the network was saved as a {saved}, not a {cls.__name__}; load it with {saved}.from_pretrained."
            )
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def _own_names(cls) -> set[str]:
        """Names of the classes whose configs this class reads: itself and those that it derives from."""
        return {kind.__name__ for kind in cls.__mro__ if issubclass(kind, SafeWeights)} | set(cls.former_names)

    @classmethod
    def _check_folder(cls, folder: Path) -> None:
        """Raises a ValueError if the networks are in subfolders, as in a run; it names the subfolder."""
        held = {path.parent: saved_class(path) for path in sorted(folder.glob("*/config.json"))}
        held = {place: name for place, name in held.items() if name}
        if not held or saved_class(folder / "config.json"):
            return
        for place, name in held.items():
            if name in cls._own_names():
                fix = f"load its {place.name} with {cls.__name__}.from_pretrained({str(place)!r})"
                break
        else:
            names = ", ".join(f"{place.name} ({name})" for place, name in held.items())
            fix = f"it holds {names}, but no {cls.__name__}"
        raise ValueError(f"{folder} is the folder of a run or a pipeline, not of a network; {fix}.")


def saved_class(config: Path) -> str | None:
    """The class that the config of a saved network names; None if there is no such config."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("_class_name") if isinstance(values, dict) else None
