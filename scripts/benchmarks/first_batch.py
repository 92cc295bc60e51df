"""The start of a training program until it holds a batch of images, which D1 times in a process of its own.

    python -m scripts.benchmarks.first_batch ours images.parquet CACHE

The imports are inside the functions, since they take most of the time.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 64


def ours(data: str, cache: str, imported: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """The batches of `unet-diffusion train-ddpm`, uint8 (B, C, H, W) with their classes, endlessly."""
    from accelerate import Accelerator

    from unet_diffusion.commands.options.train_ddpm import TrainDDPM
    from unet_diffusion.data.config import DataConfig
    from unet_diffusion.data.sets import load_images
    from unet_diffusion.training.accelerator import RunContext
    from unet_diffusion.training.batches import training_batches

    imported()
    config = TrainDDPM(data=DataConfig(data=data, cache_dir=cache))
    config.training.batch_size = BATCH
    return training_batches(load_images(config.data).train, RunContext(config.training, Accelerator()), 0)


def example(data: str, cache: str, imported: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """The batches of diffusers' example for unconditional training, float32 (B, 3, H, W) in [-1, 1]; one epoch.

    As in the example, each image is decoded when it is asked for, converted to RGB, made a tensor and normalised. The
    example uses torchvision, whose operators the CPU build of PyTorch lacks; NumPy stands in for its transforms, and
    the time of its import is not counted.
    """
    import accelerate  # noqa: F401
    import datasets
    import numpy as np
    import torch
    import torch.utils.data
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: F401
    from diffusers.optimization import get_scheduler  # noqa: F401
    from diffusers.training_utils import EMAModel  # noqa: F401

    imported()

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        arrays = [np.array(image.convert("RGB")) for image in rows["image"]]
        tensors = [torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 255 for array in arrays]
        return {"input": [(tensor - 0.5) / 0.5 for tensor in tensors]}

    dataset = datasets.load_dataset("parquet", data_files={"train": data}, split="train", cache_dir=cache)
    return iter(torch.utils.data.DataLoader(dataset.with_transform(transform), batch_size=BATCH, shuffle=True))


def main() -> None:
    """Prints the wall-clock and processor seconds that this process took until its first batch."""
    name, data, cache, started = sys.argv[1:]
    marks = []
    batches = {"ours": ours, "example": example}[name](data, cache, lambda: marks.append(time.process_time()))
    next(batches)
    report = {"seconds": time.time() - float(started), "processor": time.process_time(), "imports": marks[0]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
