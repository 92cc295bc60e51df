"""The options that are shared by commands that generate images."""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.checks import is_count, is_number, require, require_each, set_plain
from unet_diffusion.commands.options.sampling import sampling_of
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.network.config import Precision
from unet_diffusion.unused_options import check_used


@dataclass
class GenerationOptions:
    """Which images to generate. Image i depends only on the seed and i, up to rounding."""

    run: Path = Path("runs/ddpm")
    """Folder of the run, or of any saved pipeline with a UNet."""
    count: int = 16
    """Number of images."""
    sampler: SamplerName | None = None
    """Sampler that removes the noise. The default suits the run: "dpm-solver++", "sde-dpm-solver++" if the run predicts
    noise (--recipe ddpm), or "lcm" if it is from tune-few-steps. "ddpm" is the original, with --steps 1000."""
    steps: int | None = None
    """Steps of the sampler, by default 20, or 2 for a run of tune-few-steps; at most the timesteps of its training."""
    seed: int = 0
    """Seed of everything random."""
    class_labels: tuple[str, ...] = ()
    """Classes to generate in turn, by name, or by index if the run has no names; for class-conditional runs."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 turns it off."""
    max_batch: int = 64
    """Images generated at once."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    mixed_precision: Precision = "auto"
    """Precision of the network: "no" (float32), "bf16" or "fp16"; "auto" is bf16 where the device has it."""

    def __post_init__(self) -> None:
        set_plain(self)
        if isinstance(self.class_labels, (str, int)):  # in Python, where an integer is an index
            self.class_labels = (self.class_labels,)
        require(is_number(self.guidance_scale), "guidance_scale", self.guidance_scale, "must be a number; 1 is none")
        counts = ("count", "steps", "max_batch")
        require_each(self, counts, is_count, "must be an integer of at least 1")
        check_used(self)

    @property
    def batches(self) -> list[range]:
        """The images that are generated at once."""
        starts = range(0, self.count, self.max_batch)
        return [range(start, min(start + self.max_batch, self.count)) for start in starts]

    @property
    def sampling(self) -> tuple[SamplerName, int]:
        """The sampler and its steps, with the defaults for the run."""
        return sampling_of(self.run, self.sampler, self.steps)
