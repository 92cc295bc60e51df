"""What our pipelines save beside their components: how pictures are stored, names, colours."""

import inspect
from typing import Any

from unet_diffusion.pixels import PixelRange


class PrivateArguments:
    """A mixin for pipelines whose plain arguments are saved under private keys (`_pixel_range` for `pixel_range`).

    Stock pipelines pass over private keys of `model_index.json`; public ones that they do not know make them warn.
    """

    config: Any

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Gives the arguments of `__init__` that are saved under private keys their public names."""
        arguments = inspect.signature(cls.__init__).parameters
        private = {f"_{name}": name for name in arguments}
        renamed = {private.get(key, key): value for key, value in config_dict.items()}
        return super().extract_init_dict(renamed, **kwargs)  # type: ignore[misc]  # of the pipeline beside this mixin

    @property
    def pixel_range(self) -> PixelRange:
        """How stored values map to the network's [-1, 1]."""
        saved = self.config["_pixel_range"]
        return PixelRange.full("uint8") if saved is None else PixelRange.from_dict(saved)
