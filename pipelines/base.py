"""What our pipelines save beside their components: how images are stored, names, colours."""

import inspect
import json
from collections.abc import Sequence
from typing import Any

from unet_diffusion.images.pixel_range import PixelRange


class PrivateArguments:
    """A mixin for pipelines whose plain arguments are saved under private keys (`_pixel_range` for `pixel_range`).

    Stock pipelines pass over private keys of `model_index.json`; public ones that they do not know make them warn.
    Lists are saved as `{"list": [...]}`, since diffusers, loading from the Hub, takes every list for a component.
    """

    config: Any

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Gives the arguments of `__init__` that are saved under private keys their public names.

        Components that only another pipeline of ours has, such as a classifier, are passed over.
        """
        arguments = inspect.signature(cls.__init__).parameters
        private = {f"_{name}": name for name in arguments}
        renamed = {private.get(key, key): from_index(value) for key, value in config_dict.items()}
        known = {key: value for key, value in renamed.items() if key in arguments or key.startswith("_")}
        return super().extract_init_dict(known, **kwargs)  # type: ignore[misc]  # of the pipeline beside this mixin

    def to_json_string(self) -> str:
        """What `model_index.json` says: of missing components only the scheduler, which stock pipelines know."""
        index = json.loads(super().to_json_string())  # type: ignore[misc]  # of the pipeline beside this mixin
        named = {key: value for key, value in index.items() if value != [None, None] or key == "scheduler"}
        named = {key: to_index(key, value) for key, value in named.items()}
        return json.dumps(named, indent=2, sort_keys=True) + "\n"

    @property
    def pixel_range(self) -> PixelRange:
        """How stored values map to the network's [-1, 1]."""
        saved = self.config["_pixel_range"]
        return PixelRange.full("uint8") if saved is None else PixelRange.from_dict(saved)


def to_index(key: str, value: Any) -> Any:
    """A value as `model_index.json` holds it."""
    return {"list": value} if key.startswith("_") and isinstance(value, list) else value


def from_index(value: Any) -> Any:
    """The value that `to_index` was given."""
    return value["list"] if isinstance(value, dict) and value.keys() == {"list"} else value


def check_class_details(
    num_classes: int, class_names: Sequence[str] | None, palette: Sequence[Sequence[int]] | None
) -> None:
    """Raises a ValueError unless there is one name and one colour, 0 to 255, per class, or None."""
    for name, values in (("class_names", class_names), ("palette", palette)):
        if values is not None and len(values) != num_classes:
            raise ValueError(
                f"{name} has {len(values)} entries, but the network has {num_classes} classes; give one each."
            )
    if palette is not None and not all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in palette):
        raise ValueError(f"palette is {palette}, but each entry must be red, green and blue from 0 to 255.")
