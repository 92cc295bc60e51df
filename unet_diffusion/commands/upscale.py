"""Large versions of many image files with a super-resolution run, written as files."""

import logging
from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.commands.sample import best_device
from unet_diffusion.commands.segment import find_images, output_names
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.files import check_output, readable
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import save_stored
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import load_pipeline

logger = logging.getLogger(__name__)


@dataclass
class Upscale:
    """Enlarge image files with a super-resolution run. A file that fails is reported, and the others go on."""

    run: Path = Path("runs/super-resolution")
    """Folder of the run, or of any saved SuperResolutionPipeline."""
    inputs: tuple[str, ...] = ()
    """Image files, folders (with their subfolders) and globs."""
    output: Path | None = None
    """Folder for the large images; by default `upscaled` in the run's folder."""
    sampler: SamplerName = "dpm-solver++"
    """How the noise is removed; "ddpm" is the original, with --steps 1000."""
    steps: int = 20
    """Steps of the sampler."""
    seed: int = 0
    """The noise of an image follows from it and from the name of its output."""
    condition_noise: float = 0.0
    """Deviation of noise that the enlarged image gets, where values lie in [-1, 1]; for images that are worse than
    those of the training, such as compressed ones."""
    tile_size: int | None = None
    """Pixels a side of a tile of large images; by default so that one takes about 64 MiB."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""
    overwrite: bool = False
    """Replace images that are there already."""

    def __post_init__(self) -> None:
        """Checks what the pipeline does not check before the first image."""
        if not self.inputs:
            raise ValueError("inputs is empty; give image files, folders or globs.")


def upscale(config: Upscale) -> Path:
    """Writes `NAME.png` for each image, and returns their folder.

    NAME is the file's name without its suffix, and a number where several files have it. Images have the training
    data's channels and depth; with channels that PNG does not know, or floats, they are `.npy` arrays (H, W, C).

    Raises:
        ValueError: no super-resolution run, an option that does not fit it, no image at all, or an image that would
            be overwritten.
        RuntimeError: after the last image, if some failed; it names them.
    """
    output = config.output or config.run / "upscaled"
    check_output(output)
    pipe = load_pipeline(SuperResolutionPipeline, config.run).to(best_device(config.device))
    pipe.scheduler = sampler(config.sampler, pipe.scheduler)
    as_png = has_png(pipe.channels, pipe.pixel_range)
    pipe.check_inputs(config.steps, config.condition_noise, "stored")
    Tiling.of(pipe.unet, config.tile_size)  # which refuses a wrong size

    found = find_images(config.inputs, output)
    if not any(found.values()):
        raise ValueError(f"inputs are {', '.join(config.inputs)}, but there is no image outside of {output}.")
    failures = [f"{given}: no such file, and no image in it" for given, paths in found.items() if not paths]
    paths = list(dict.fromkeys(path for matches in found.values() for path in matches))
    names = output_names(paths)
    targets = {path: output / f"{names[path]}{'.png' if as_png else '.npy'}" for path in paths}
    for target in targets.values():
        if target.exists() and not config.overwrite:
            raise ValueError(f"{target} exists already; set overwrite, or choose another output.")

    progress = pipe.progress_bar(paths)
    pipe.set_progress_bar_config(disable=True)  # one for all images, rather than one each
    for path in progress:
        try:
            _upscale_image(pipe, config, path, targets[path])
        except (ValueError, OSError, ImportError, MemoryError) as error:
            failures.append(readable(f"{path}: {error}"))
            logger.warning("%s", failures[-1])
    if failures:
        listed = "\n".join(failures)
        raise RuntimeError(f"{len(failures)} of {len(paths)} inputs failed, the others are in {output}:\n{listed}")
    return output


def _upscale_image(pipe: SuperResolutionPipeline, config: Upscale, path: Path, target: Path) -> None:
    """Writes the large version of one image, as the suffix of its target says."""
    ((image,),) = pipe(
        path,
        num_inference_steps=config.steps,
        generator=keyed_generator(config.seed, "upscale", target.stem),
        condition_noise=config.condition_noise,
        tile_size=config.tile_size,
        output_type="stored",
        return_dict=False,
    )
    save_stored(image, target)
