"""The options of `unet-diffusion demo`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from unet_diffusion.checks import require
from unet_diffusion.saved_index import check_run


@dataclass
class Demo:
    """Open a page to try a run in a browser: generate, segment or enlarge, as the run was trained."""

    run: Positional[Path]
    """Folder of the run, or of any saved pipeline with a UNet."""
    examples: Path | None = None
    """Folder whose first 24 images visitors can pick, for runs that segment or enlarge."""
    host: str = "127.0.0.1"
    """Address to serve on; by default only this machine can open the page; with "0.0.0.0", all machines in its network
    can."""
    port: int | None = None
    """Port to serve on; by default the first free one from 7860."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""

    def __post_init__(self) -> None:
        rule = "must be from 1 to 65535; leave it out for a free one"
        require(self.port is None or 1 <= self.port <= 65535, "port", self.port, rule)

    def check_paths(self) -> None:
        """Raises a ValueError for a missing run or folder of examples."""
        check_run(self.run)
        if self.examples is not None and not self.examples.is_dir():
            raise ValueError(f"examples is {self.examples}, but there is no such folder; give one with images.")
