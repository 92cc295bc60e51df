"""Enlarges image files with a super-resolution run, and writes the results as files."""

from pathlib import Path
from typing import Any

from torch import Tensor

from unet_diffusion.commands.options.upscale import Upscale
from unet_diffusion.commands.runner import Rows, Work, digest, work_through
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import encoded_stored
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.saved_runs import best_device, load_pipeline


def upscale(options: Upscale) -> Path:
    """Writes `NAME.png` for each image, and returns their folder.

    NAME is the place of the image below the named folder, without its suffix. Images that would share a name keep their
    suffix. Large images have the training data's channels and depth. With channels that PNG does not support, or
    floats, they are `.npy` arrays (H, W, C). Outputs from earlier calls, recorded in `upscale.jsonl` in the folder, are
    not made again unless the image, the run or an option has changed.

    Raises:
        ValueError: there is no super-resolution run, an option does not fit it, or there is no image at all.
        RuntimeError: after the last image, if some failed; it names them. An output that would be overwritten is a
            failure.
    """
    inputs = options.take_inputs()
    pipe = load_pipeline(SuperResolutionPipeline, options.run).to(best_device(options.device))
    precision = settled_precision(options.mixed_precision, pipe.device)
    name, steps = options.sampling
    pipe.scheduler = sampler(name, pipe.scheduler)
    suffix = ".png" if has_png(pipe.channels, pipe.pixel_range) else ".npy"
    pipe.check_inputs(steps, options.condition_noise, "stored")
    Tiling.of(pipe.unet, options.tile_size)  # raises an error for a wrong size, before the first image

    def compute(image: Tensor, key: str) -> Tensor:
        return pipe(
            image,
            num_inference_steps=steps,
            generator=keyed_generator(options.seed, "upscale", key),
            condition_noise=options.condition_noise,
            tile_size=options.tile_size,
            output_type="stored",
            return_dict=False,
            mixed_precision=precision,
        )[0][0].cpu()

    def encode(image: Tensor, large: Tensor) -> tuple[list[bytes], Rows]:
        return [encoded_stored(large, suffix)], ()

    def progress_bar(total: int) -> Any:
        bar = pipe.progress_bar(total=total)
        pipe.set_progress_bar_config(disable=True)  # one bar for all images, rather than one each
        return bar

    made_by = digest(
        options.run,
        sampler=name,
        steps=steps,
        seed=options.seed,
        condition_noise=options.condition_noise,
        tile_size=options.tile_size,
        mixed_precision=precision,
    )
    work = Work("upscale", made_by, (suffix,), (suffix,), pipe.read_images, compute, encode)
    work_through(inputs, options.folder, work, options.overwrite, progress_bar)
    return options.folder
