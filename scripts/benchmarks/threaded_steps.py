"""Times the training steps of a network in the threads of PyTorch, or in those that our commands choose.

Started by `scripts.benchmarks.threads` as `threaded_steps (default | ours) MODEL STEPS BATCH_SIZE`.
"""

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from unet_diffusion.cli import answers

WARM = 3  # steps that are not timed


def timed(ours: bool, model: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Trains a network on random images of 28 x 28; returns the mean seconds of a step and the number of threads."""
    import torch  # here, so that our way can say before how threads wait

    from unet_diffusion.network.precision import autocast, settled_precision
    from unet_diffusion.network.threads import fastest_threads
    from unet_diffusion.saved_runs import load_unet

    if ours:
        torch.set_num_threads(fastest_threads())
    torch.manual_seed(0)
    unet = load_unet(str(model), {"sample_size": 28, "in_channels": 1, "out_channels": 1})
    optimizer = torch.optim.AdamW(unet.parameters())
    images, timesteps = torch.randn(batch_size, 1, 28, 28), torch.randint(1000, (batch_size,))
    device = torch.device("cpu")
    durations: list[float] = []
    for _ in range(WARM + steps):
        started = time.perf_counter()
        with autocast(device, settled_precision("auto", device)):
            loss = unet(images, timesteps).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        durations.append(time.perf_counter() - started)
    return {"seconds": statistics.mean(durations[WARM:]), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    way, model, steps, batch_size = sys.argv[1:]
    ours = way == "ours"
    with answers("threaded_steps") if ours else nullcontext():  # which says how threads wait
        print(json.dumps(timed(ours, Path(model), int(steps), int(batch_size))))
