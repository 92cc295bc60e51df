"""A trained run in another form, for use without this package."""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.commands.export.graphs import FORMS, write_graphs
from unet_diffusion.commands.export.self_contained import write_self_contained
from unet_diffusion.commands.export.single_file import write_single_file
from unet_diffusion.commands.options.export import Export
from unet_diffusion.files import written_aside


@dataclass(frozen=True)
class Exported:
    """The folder or file of an export, and a sentence for each file that was read back and compared."""

    path: Path
    checks: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The path, then the sentences, one per line."""
        return "\n".join([str(self.path), *self.checks])


def export(options: Export) -> Exported:
    """Writes a run in another form; the folder or the file appears when it is complete and compared.

    Raises:
        ValueError: there is no run, the target exists, or the run cannot be written in that form.
        ImportError: the form needs libraries that are not installed.
        RuntimeError: the written form does not compute what the run computes; nothing is left behind.
    """
    options.check_paths()
    checks: list[str] = []
    with written_aside(options.target) as aside:
        if options.format in FORMS:
            checks = write_graphs(options.format, options.run, aside, options.head)
        elif options.format == "safetensors-single":
            checks = [write_single_file(options.run, aside)]
        else:
            write_self_contained(options.run, aside, options.target.name)  # copies, so there is nothing to compare
    return Exported(options.target, tuple(checks))
