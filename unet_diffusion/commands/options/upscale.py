"""The options of `unet-diffusion upscale`."""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.checks import is_count, require_each
from unet_diffusion.commands.inputs import Inputs, find_inputs
from unet_diffusion.commands.options.files import FileOptions, check_results
from unet_diffusion.commands.options.sampling import sampling_of
from unet_diffusion.diffusion.config import SamplerName


@dataclass
class Upscale(FileOptions):
    """Enlarge image files with a super-resolution run. A file that fails is reported; the others are enlarged."""

    run: Path = Path("runs/super-resolution")
    """Folder of the run, or of any saved SuperResolutionPipeline."""
    output: Path | None = None
    """Folder for the large images; by default `upscaled` in the run's folder."""
    sampler: SamplerName | None = None
    """Sampler that removes the noise. The default suits the run: "dpm-solver++", "sde-dpm-solver++" if the run predicts
    noise (--recipe ddpm), or "lcm" if it is from tune-few-steps. "ddpm" is the original, with --steps 1000."""
    steps: int | None = None
    """Steps of the sampler, by default 20, or 2 for a run of tune-few-steps; at most the timesteps of its training."""
    seed: int = 0
    """Seed of the noise, together with the path of each image below the folder that was named."""
    condition_noise: float = 0.0
    """Standard deviation of noise that is added to the enlarged image (values from -1 to 1); for images of lower
    quality than the training images, such as compressed ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_each(self, ("steps",), is_count, "must be an integer of at least 1")

    @property
    def sampling(self) -> tuple[SamplerName, int]:
        """The sampler and its steps, with the defaults for the run."""
        return sampling_of(self.run, self.sampler, self.steps)

    @property
    def folder(self) -> Path:
        """The folder for the large images."""
        return self.output or self.run / "upscaled"

    def checked_inputs(self) -> Inputs:
        """Returns the images; a ValueError for a missing run, no image at all, or an output that is not writable."""
        check_results(self.run, "SuperResolutionPipeline", self.folder)
        return find_inputs(self.inputs, self.folder)
