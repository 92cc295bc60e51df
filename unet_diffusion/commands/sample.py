"""Images from a finished run, written as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.files import check_output, written_aside
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_pipeline


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
    """Everything random follows from it."""
    class_labels: tuple[str, ...] = ()
    """Classes to generate, by name or index, in turn; for class-conditional runs."""
    guidance_scale: float = 1.0
    """Strength of classifier-free guidance; 1 is none."""
    max_batch: int = 64
    """Images made at once."""
    device: str = "auto"
    """Where to compute: "auto", "cpu", "cuda", "mps"."""

    def __post_init__(self) -> None:
        """Checks the number of images; the pipeline checks the rest."""
        if self.count < 1:
            raise ValueError(f"count is {self.count}, but must be at least 1.")

    def pipeline(self) -> ImageGenerationPipeline:
        """The run's pipeline with the sampler, on the device.

        Raises:
            ValueError: the folder holds no finished run, or the sampler does not fit it.
        """
        pipe = load_pipeline(ImageGenerationPipeline, self.run).to(best_device(self.device))
        pipe.scheduler = sampler(self.sampler, pipe.scheduler)
        return pipe

    def generate(self, pipe: ImageGenerationPipeline, output_type: str) -> Any:
        """All images, in a form that the pipeline knows.

        Raises:
            ValueError: an option that does not fit the run.
        """
        labels = [int(label) if label.isdigit() else label for label in self.class_labels]
        (images,) = pipe(
            batch_size=self.count,
            num_inference_steps=self.steps,
            class_labels=[labels[i % len(labels)] for i in range(self.count)] if labels else None,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(keyed_seed(self.seed, "image", i)) for i in range(self.count)],
            max_batch=self.max_batch,
            output_type=output_type,
            return_dict=False,
        )
        return images


@dataclass
class Sample(GenerationOptions):
    """Generate images with a trained run. Image i depends on the seed and i alone."""

    output: Path | None = None
    """Folder for the images; by default `samples` in the run's folder."""
    overwrite: bool = False
    """Replace images that are there already."""


def sample(config: Sample) -> Path:
    """Writes `00000.png`, ... and `grid.png`, and returns their folder.

    Images have the training data's channels and depth; with channels that PNG does not know they are `.npy` arrays
    (C, H, W) of stored values.

    Raises:
        ValueError: an option that does not fit the run, or images that would be overwritten.
    """
    output = config.output or config.run / "samples"
    check_output(output)
    if any(output.glob("[0-9]*.*")) and not config.overwrite:
        raise ValueError(f"{output} holds images already; set overwrite, or choose another output.")
    pipe = config.pipeline()
    as_png = has_png(pipe.unet.config.in_channels, pipe.pixel_range)
    images = config.generate(pipe, "pil" if as_png else "stored")
    for i, image in enumerate(images):
        with written_aside(output / f"{i:05d}{'.png' if as_png else '.npy'}") as aside:
            image.save(aside) if as_png else np.save(aside, image.cpu().numpy())
    shown = images if as_png else [Image.fromarray(image[0].float().cpu().numpy()) for image in images]
    save_image(grid(shown[:256]), output / "grid.png")
    return output


def best_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator that PyTorch sees, or else the CPU.

    Raises:
        ValueError: no device, or one that is not here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    known = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in known:
        raise ValueError(f"device is {name!r}, but here are {', '.join(known)} only; choose one of them, or 'auto'.")
    return device
