"""The batches of a run, in an order that depends on the seed and the step alone."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from unet_diffusion.checks import is_count, require, require_each
from unet_diffusion.data.dataset import ImageDataset, to_batch
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.streaming import StreamingImages
from unet_diffusion.randomness import keyed_permutation, keyed_seed
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.stopping import outlive_signals

Batches = Generator[dict[str, Tensor], None, None]  # its `close` ends the data workers
TrainingImages = ImageDataset | MaskedDataset | StreamingImages


@dataclass(eq=False)
class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """An endless batch sampler: lists of (epoch, index), one list per forward pass of one process.

    The draws of a run are one stream: the permutation of the data set in epoch 0, then in epoch 1, and so on. Optimizer
    step s takes the next `batch_size * num_processes * accumulate` draws. So every image is seen once an epoch, and a
    run resumes at any step without saved state. The images of a step do not depend on how they are divided among
    processes, batches and accumulation.

    Attributes:
        length: number of images.
        batch_size: images per forward pass and process.
        process_index: this process, counted from 0.
        num_processes: number of processes.
        accumulate: forward passes per optimizer step.
        seed: the seed of the run.
        start_step: optimizer step at which the stream starts.
    """

    length: int
    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    accumulate: int = 1
    seed: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        counts = ("length", "batch_size", "num_processes", "accumulate")
        require_each(self, counts, is_count, "must be an integer of at least 1")
        valid = 0 <= self.process_index < self.num_processes
        require(valid, "process_index", self.process_index, f"{self.num_processes} processes count from 0")
        require(is_count(self.start_step, 0), "start_step", self.start_step, "must be an integer of at least 0")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, order = -1, []
        stride = self.batch_size * self.num_processes
        first = self.start_step * stride * self.accumulate + self.process_index * self.batch_size
        while True:
            batch = []
            for draw in range(first, first + self.batch_size):
                epoch, place = divmod(draw, self.length)
                if epoch != current:
                    current, order = epoch, keyed_permutation(self.length, self.seed, "order", epoch).tolist()
                batch.append((epoch, order[place]))
            yield batch
            first += stride


def training_batches(dataset: TrainingImages, context: RunContext, start_step: int, num_workers: int = 0) -> Batches:
    """Yields the micro-batches of this process endlessly, on its device, starting at an optimizer step.

    The order depends on the seed and the step alone. So a run resumes where it stopped, and several processes share the
    images. Accelerate's own sharding and skipping are not used.

    Args:
        dataset: `StreamingImages`, or a data set with items `dataset[epoch, index]`.
        context: the run and the process.
        start_step: the optimizer step, counted from 0.
        num_workers: processes that load batches ahead.
    """
    config, device = context.config, context.accelerator.device
    loading: dict[str, Any] = {
        "collate_fn": to_batch,
        "num_workers": num_workers,
        "pin_memory": device.type == "cuda",
        "worker_init_fn": outlive_signals,
    }
    if isinstance(dataset, StreamingImages):
        dataset.start = start_step * context.images_per_step
        dataset.batch_size = config.batch_size
        loader = DataLoader(dataset, batch_size=config.batch_size, **loading)
    else:
        loader = DataLoader(dataset, batch_sampler=global_batches(dataset, context, start_step), **loading)
    for batch in loader:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def global_batches(dataset: ImageDataset | MaskedDataset, context: RunContext, start_step: int) -> GlobalBatches:
    """Returns the order in which this process sees the images of a data set, starting at an optimizer step."""
    config, accelerator = context.config, context.accelerator
    return GlobalBatches(
        len(dataset),
        config.batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        config.accumulate,
        config.seed,
        start_step,
    )


def images_of_step(dataset: TrainingImages, context: RunContext, step: int) -> str:
    """Lists, for a message, the images that this process sees in an optimizer step."""
    if isinstance(dataset, StreamingImages):
        first = step * context.images_per_step
        return f"images among {first} to {first + context.images_per_step - 1} of the stream {dataset.name}"
    batches = islice(global_batches(dataset, context, step), context.config.accumulate)
    indices = ", ".join(str(dataset.rows[index]) for _, index in chain.from_iterable(batches))
    return f"images {indices} of {dataset.name}, counted from 0 among the usable ones"


def other_order(context: RunContext, purpose: str) -> RunContext:
    """Returns the context with another order of images, for a second data set that is read beside the first."""
    return replace(context, config=replace(context.config, seed=keyed_seed(context.config.seed, purpose)))
