"""The order in which a training run sees the images, whatever the number of processes."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from unet_diffusion.randomness import keyed_permutation


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """An endless batch sampler: lists of (epoch, index), one list per forward pass of one process.

    The draws of a run are one stream: the permutation of the data set in epoch 0, then in epoch 1, and so on. Optimizer
    step s takes the next `batch_size * num_processes * accumulate` draws, so every image is seen once an epoch, a run
    resumes at any step without saved state, and processes, batch size and accumulation can be traded against each
    other without a change of what a step sees.

    Args:
        length: number of images.
        batch_size: images per forward pass and process.
        process_index: this process, counted from 0.
        num_processes: number of processes.
        accumulate: forward passes per optimizer step.
        seed: of the run.
        start_step: optimizer step at which the stream starts.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        counts = {"length": length, "batch_size": batch_size, "num_processes": num_processes, "accumulate": accumulate}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; at least 1 is needed.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}; {num_processes} processes count from 0.")
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; steps count from 0.")
        self.length = length
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self.accumulate = accumulate
        self.seed = seed
        self.start_step = start_step

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
