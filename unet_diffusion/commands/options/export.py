"""The options of `unet-diffusion export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tyro.conf import Positional

from unet_diffusion.checks import require_choice
from unet_diffusion.files import check_output
from unet_diffusion.saved_index import check_run
from unet_diffusion.unused_options import check_used

ExportFormat = Literal["self-contained", "onnx", "torch-export", "safetensors-single"]


GRAPHS = ("onnx", "torch-export")  # formats with a graph of each head, not with weights to train


@dataclass
class Export:
    """Write a trained run in another form, most of them for use without this package."""

    run: Positional[Path]
    """Folder of the run, or of any saved pipeline with a network of this package."""
    target: Positional[Path]
    """Folder to write, which must not exist yet; "safetensors-single" writes a file, such as masks.safetensors."""
    format: ExportFormat = "self-contained"
    """"self-contained": code beside the weights, for diffusers with `trust_remote_code=True`. "onnx" and
    "torch-export": a graph of each head for any batch and size, compared with the network. "safetensors-single": one
    file with all weights and configs, for `load_single_file` of this package."""
    head: Literal["segmentation", "noise"] | None = None
    """The head that "onnx" and "torch-export" write; by default all heads of the run, but no noise head that learning
    masks alone has left behind."""

    def __post_init__(self) -> None:
        require_choice("format", self.format, get_args(ExportFormat))
        check_used(self)
        if self.format == "safetensors-single" and self.target.suffix != ".safetensors":
            raise ValueError(f"target is {self.target}, but must be a file ending in .safetensors; name it so.")

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run, or a target that exists or cannot be written."""
        check_run(self.run)
        check_output(self.target.parent)
        if self.target.exists():
            raise ValueError(f"{self.target} exists already; remove it, or choose another name.")
