"""Batches of a run, from any step on."""

from collections.abc import Generator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.global_batches import GlobalBatches
from unet_diffusion.training.stopping import outlive_sigterm

Batches = Generator[dict[str, Tensor], None, None]  # its `close` ends the data workers


def training_batches(
    dataset: Any, accelerator: Accelerator, config: TrainingConfig, start_step: int, num_workers: int = 0
) -> Batches:
    """The micro-batches of this process for ever, on its device, from the first of optimizer step `start_step` on.

    The order is a function of the seed and the step; so a run goes on where it stopped, and several processes share the
    images. Accelerate's own sharding and skipping are not used.

    Args:
        dataset: `StreamingImages`, or a data set whose items are asked for as `dataset[epoch, index]`.
        accelerator: tells the process and the device.
        config: batch size, accumulation and seed.
        start_step: optimizer steps that are done.
        num_workers: processes that load ahead.
    """
    loading: dict[str, Any] = {
        "num_workers": num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "worker_init_fn": outlive_sigterm,
    }
    if isinstance(dataset, StreamingImages):
        dataset.start = start_step * config.batch_size * config.accumulate * accelerator.num_processes
        dataset.batch_size = config.batch_size
        loader = DataLoader(dataset, batch_size=config.batch_size, collate_fn=to_batch, **loading)
    else:
        order = global_batches(dataset, accelerator, config, start_step)
        loader = DataLoader(dataset, batch_sampler=order, collate_fn=to_batch, **loading)
    for batch in loader:
        yield {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}


def global_batches(dataset: Any, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> GlobalBatches:
    """The order in which this process sees the images, from an optimizer step on."""
    return GlobalBatches(
        len(dataset),
        config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        config.accumulate,
        config.seed,
        start_step,
    )


def images_of_step(dataset: Any, accelerator: Accelerator, config: TrainingConfig, step: int) -> str:
    """The images that this process sees in an optimizer step, for a message; arguments as `training_batches`."""
    if isinstance(dataset, StreamingImages):
        count = config.batch_size * config.accumulate * accelerator.num_processes
        return f"images among {step * count} to {(step + 1) * count - 1} of the stream {dataset.name}"
    batches = islice(global_batches(dataset, accelerator, config, step), config.accumulate)
    indices = ", ".join(str(dataset.rows[index]) for _, index in chain.from_iterable(batches))
    return f"images {indices} of {dataset.name}, counted from 0 among the usable ones"


def other_order(config: TrainingConfig, purpose: str) -> TrainingConfig:
    """The configuration with an order of the images for another purpose.

    Two sets that are gone through side by side would otherwise go in step.
    """
    return replace(config, seed=keyed_seed(config.seed, purpose))
