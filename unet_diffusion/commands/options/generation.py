"""The options that commands share which generate images."""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.checks import is_count, require_each, set_plain
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.network.config import Precision
from unet_diffusion.unused_options import check_used


@dataclass
class GenerationOptions:
    """Which images to generate. Image i depends on the seed and i alone."""

    run: Path = Path("runs/ddpm")
    """Folder of the run, or of any saved pipeline with a UNet."""
    count: int = 16
    """Number of images."""
    sampler: SamplerName = "dpm-solver++"
    """How the noise is removed; "ddpm" is the original, with --steps 1000."""
    steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """Seed of everything random."""
    class_labels: tuple[str, ...] = ()
    """Classes to generate, in turn, by name, or by index where the run has no names; for class-conditional runs."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 turns it off."""
    max_batch: int = 64
    """Images generated at once."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    mixed_precision: Precision = "auto"
    """"no" (float32), "bf16" or "fp16", in which the network computes; "auto" is bf16 where the device has it."""

    def __post_init__(self) -> None:
        set_plain(self)
        counts = ("count", "steps", "max_batch")
        require_each(self, counts, is_count, "must be an integer of at least 1")
        check_used(self)
