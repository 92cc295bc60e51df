"""Enlarges image files with a super-resolution run, and writes the results as files."""

from pathlib import Path

from unet_diffusion.commands.options.upscale import Upscale
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.files import check_absent
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import save_stored
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline


def upscale(options: Upscale) -> Path:
    """Writes `NAME.png` for each image, and returns their folder.

    NAME is the file's name without its suffix, and a number where several files share it. Images have the training
    data's channels and depth. With channels that PNG does not support, or floats, they are `.npy` arrays (H, W, C).

    Raises:
        ValueError: no super-resolution run, an option that does not fit it, no image at all, or an image that would
            be overwritten.
        RuntimeError: after the last image, if some failed; it names them.
    """
    inputs = options.checked_inputs()
    pipe = load_pipeline(SuperResolutionPipeline, options.run).to(best_device(options.device))
    pipe.scheduler = sampler(options.sampler, pipe.scheduler)
    as_png = has_png(pipe.channels, pipe.pixel_range)
    pipe.check_inputs(options.steps, options.condition_noise, "stored")
    Tiling.of(pipe.unet, options.tile_size)  # raises an error for a wrong size, before the first image

    suffix = ".png" if as_png else ".npy"
    targets = {path: options.folder / f"{name}{suffix}" for path, name in inputs.names().items()}
    check_absent(*targets.values(), overwrite=options.overwrite)

    def work(path: Path) -> None:
        ((image,),) = pipe(
            path,
            num_inference_steps=options.steps,
            generator=keyed_generator(options.seed, "upscale", targets[path].stem),
            condition_noise=options.condition_noise,
            tile_size=options.tile_size,
            output_type="stored",
            return_dict=False,
        )
        save_stored(image, targets[path])

    progress = pipe.progress_bar(inputs.paths)
    pipe.set_progress_bar_config(disable=True)  # one bar for all images, rather than one each
    inputs.report(inputs.work_through(progress, work), options.folder)
    return options.folder
