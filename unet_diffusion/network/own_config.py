"""A mixin that builds a network from a config of its own class only."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIXES = {
    "UNet2DModel": "make a UNet of it: UNet2DAdapter.from_stock(UNet2DModel.from_pretrained(...)), with "
    "`from unet_diffusion.adapters import UNet2DAdapter`",
    "UNet2DAdapter": "use UNet2DAdapter, from unet_diffusion.adapters",
}


class OwnConfig:
    """A mixin for networks, before `ModelMixin`: it refuses the configs of other classes.

    Diffusers takes from them what has a known name, and returns a network without the weights, which have other names.

    Attributes:
        former_names: of the class in saved configs.
    """

    former_names: tuple[str, ...] = ()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Goes on as `ConfigMixin.extract_init_dict`; a subclass takes the configs of the class whose arguments it has.

        Raises:
            ValueError: the config names another class.
        """
        same = [kind for kind in cls.__mro__ if kind.__init__ is cls.__init__]  # type: ignore[misc]  # of classes
        name = config_dict.get("_class_name", cls.__name__)
        if name not in {*cls.former_names, *(kind.__name__ for kind in same)}:
            fix = FIXES.get(name, "load it with that class")
            raise ValueError(f"this is the config of a {name}, but must be that of a {cls.__name__}; {fix}.")
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]  # of the class beside this mixin

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a network as `ModelMixin.from_pretrained` does.

        Raises:
            ValueError: the config names another class, or the folder is that of a pipeline.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / "model_index.json").is_file() and not kwargs.get("subfolder"):
            parts = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.json")))
            raise ValueError(
                f"{folder} holds a pipeline, but {cls.__name__} loads one network; name its subfolder ({parts}), as in "
                f"{cls.__name__}.from_pretrained(..., subfolder='unet')."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
