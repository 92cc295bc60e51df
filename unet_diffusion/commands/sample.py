"""Generates images with a finished run, and writes them as files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unet_diffusion.commands.options.generation import GenerationOptions
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.files import written_aside
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import best_device, load_pipeline


def sample(options: Sample) -> Path:
    """Writes `00000.png`, ... and `grid.png`, and returns their folder.

    Images have the training data's channels and depth. With channels that PNG does not support they are `.npy` arrays
    (C, H, W) of stored values.

    Raises:
        ValueError: an option that does not fit the run, or images that would be overwritten.
    """
    options.check_paths()
    pipe = generation_pipeline(options)
    as_png = has_png(pipe.unet.config.in_channels, pipe.pixel_range)
    images = generate(options, pipe, "pil" if as_png else "stored")
    for i, image in enumerate(images):
        with written_aside(options.folder / f"{i:05d}{'.png' if as_png else '.npy'}") as aside:
            image.save(aside) if as_png else np.save(aside, image.cpu().numpy())
    shown = images if as_png else [Image.fromarray(image[0].float().cpu().numpy()) for image in images]
    save_image(grid(shown[:256]), options.folder / "grid.png")
    return options.folder


def generation_pipeline(options: GenerationOptions) -> ImageGenerationPipeline:
    """Loads the run's pipeline with the sampler, on the device."""
    pipe = load_pipeline(ImageGenerationPipeline, options.run).to(best_device(options.device))
    pipe.scheduler = sampler(options.sampling[0], pipe.scheduler)
    return pipe


def generate(options: GenerationOptions, pipe: ImageGenerationPipeline, output_type: str) -> Any:
    """Generates all images, as the pipeline's `output_type`."""
    labels = options.class_labels
    (images,) = pipe(
        batch_size=options.count,
        num_inference_steps=options.sampling[1],
        class_labels=[labels[i % len(labels)] for i in range(options.count)] if labels else None,
        guidance_scale=options.guidance_scale,
        generator=[torch.Generator().manual_seed(keyed_seed(options.seed, "image", i)) for i in range(options.count)],
        max_batch=options.max_batch,
        output_type=output_type,
        return_dict=False,
    )
    return images
