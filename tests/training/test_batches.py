"""The order of training images: the same however a step is divided among processes and micro-batches."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_diffusion.training.batches import GlobalBatches


def draws(steps: int, **options) -> list[list[tuple[int, int]]]:
    """Returns the draws of each optimizer step, over all processes, in the order of the stream."""
    processes, accumulate = options.get("num_processes", 1), options.get("accumulate", 1)
    streams = [iter(GlobalBatches(process_index=process, **options)) for process in range(processes)]
    return [sum((next(stream) for _ in range(accumulate) for stream in streams), []) for _ in range(steps)]


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 30),
    batch=st.integers(1, 5),
    processes=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 4),
    seed=st.integers(0, 3),
)
def test_a_step_sees_the_same_images_however_they_are_divided(length, batch, processes, accumulate, start, seed):
    together = draws(7, length=length, batch_size=batch * processes * accumulate, seed=seed)
    divided = draws(
        7 - start,
        length=length,
        batch_size=batch,
        num_processes=processes,
        accumulate=accumulate,
        seed=seed,
        start_step=start,
    )
    assert divided == together[start:]
    stream = sum(together, [])
    epochs = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    assert all(sorted(seen) == [(epoch, index) for index in range(length)] for epoch, seen in enumerate(epochs))


def test_order_changes_with_epoch_and_seed():
    first, second = draws(2, length=50, batch_size=50)
    other = draws(1, length=50, batch_size=50, seed=1)[0]
    orders = [[index for _, index in batch] for batch in (first, second, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_wrong_counts_are_refused():
    for options in ({"length": 0}, {"batch_size": 0}, {"process_index": 2}, {"accumulate": 0}, {"start_step": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GlobalBatches(**{"length": 4, "batch_size": 2, "num_processes": 2, **options})
