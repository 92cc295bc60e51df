"""A mixin that reads weights from safetensors only."""

import os
from functools import partial
from pathlib import Path
from typing import Any


class SafeWeights:
    """A mixin for networks, before `ModelMixin`: it never reads a pickle, even if there are no other weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a network as `ModelMixin.from_pretrained` does, but from safetensors only.

        By default, diffusers falls back to `diffusion_pytorch_model.bin`, which is a pickle.

        Raises:
            ValueError: `use_safetensors` is False.
            OSError: there are no weights as safetensors.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, but pickles are not read; convert the weights to safetensors.")
        load = partial(super().from_pretrained, pretrained_model_name_or_path)  # type: ignore[misc]
        try:
            return load(**{**kwargs, "use_safetensors": True})
        except OSError:
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if not folder.is_dir() or any(folder.glob("*.bin*")):
                raise
            return load(**kwargs)  # there is no pickle: raises the error that users of diffusers know
