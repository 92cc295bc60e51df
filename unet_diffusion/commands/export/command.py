"""A trained run in another form, for use without this package."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tyro.conf import Positional

from unet_diffusion.checks import require_choice
from unet_diffusion.commands.export.graphs import FORMS, write_graphs
from unet_diffusion.commands.export.self_contained import write_self_contained
from unet_diffusion.commands.export.single_file import write_single_file
from unet_diffusion.files import written_aside
from unet_diffusion.output_folder import check_output
from unet_diffusion.saved_index import check_run

Format = Literal["self-contained", "onnx", "torch-export", "safetensors-single"]


@dataclass
class Export:
    """Write a trained run in another form, for use without this package."""

    run: Positional[Path]
    """Folder of the run, or of any saved pipeline with a network of this package."""
    target: Positional[Path]
    """Folder to write, which must not exist yet; "safetensors-single" writes a file, such as masks.safetensors."""
    format: Format = "self-contained"
    """"self-contained": the code beside the weights, for diffusers with `trust_remote_code=True`. "onnx" and
    "torch-export": a graph of each head for any batch and size, compared with the network. "safetensors-single": one
    file of all weights and configs, for `load_single_file` of this package."""
    head: Literal["segmentation", "noise"] | None = None
    """The head that "onnx" and "torch-export" write; by default all heads of the run."""


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        path: the folder or the file.
        checks: a sentence for each file that was read again and compared with the run.
    """

    path: Path
    checks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The path, then the sentences, one per line."""
        return "\n".join([str(self.path), *self.checks])


def export(config: Export) -> Exported:
    """Writes a run in another form; the folder or the file appears when it is complete and compared.

    Raises:
        ValueError: there is no run, the target exists, or the run cannot be written in that form.
        ImportError: the form needs libraries that are not installed.
        RuntimeError: what was written is not what the run computes; nothing is left behind.
    """
    require_choice("format", config.format, get_args(Format))
    if config.head is not None and config.format not in FORMS:
        raise ValueError(f"head is {config.head!r}, but {config.format!r} writes all of a run; leave head out.")
    if config.format == "safetensors-single" and config.target.suffix != ".safetensors":
        raise ValueError(f"target is {config.target}, but must be a file ending in .safetensors; name it so.")
    check_run(config.run)
    check_output(config.target.parent)
    if config.target.exists():
        raise ValueError(f"{config.target} exists already; remove it, or choose another name.")
    checks: list[str] = []
    with written_aside(config.target) as aside:
        if config.format in FORMS:
            checks = write_graphs(config.format, config.run, aside, config.head)
        elif config.format == "safetensors-single":
            checks = [write_single_file(config.run, aside)]
        else:
            write_self_contained(config.run, aside, config.target.name)  # copies, so there is nothing to compare
    return Exported(config.target, tuple(checks))
