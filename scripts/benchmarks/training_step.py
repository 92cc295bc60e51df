"""The training step of a noise predictor: its time (T1, T2), its share of the machine (T3) and its memory (T4)."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.compared_networks import CONTENDERS, OURS, Contender, ddpm_32, nine_million, present
from scripts.benchmarks.processes import resident, start
from scripts.benchmarks.result_row import Row
from scripts.benchmarks.timing import Work, alternate, ratio

SCHEDULER = DDPMScheduler()
MATRIX_SIDE = 2048
CONVOLUTION = (64, 256, 16, 16)  # shape of the maps of the 3x3 convolution that shows the rate of the machine
MATRIX_SHARE = 0.75  # target of T3
MEMORY_SHARE = 0.7  # target of T4
MEMORY_STEPS = 3  # the optimizer's state exists from the second one on
Make = Callable[[str], Contender]


class TrainingStep:
    """Forward, backward, clipping, AdamW and moving average, the same for every network.

    Args:
        contender: the network that learns.
        side: side of the images in pixels.
        batch: number of images.
    """

    def __init__(self, contender: Contender, side: int, batch: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network, self.predict = contender.network.to(device).train(), contender.predict
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)
        self.ema = EMAModel(self.network.parameters(), decay=0.999, foreach=True)
        self.clean = torch.rand(batch, 3, side, side, device=device) * 2 - 1

    def __call__(self) -> None:
        """One step on fresh noise."""
        noise = torch.randn_like(self.clean)
        timesteps = torch.randint(0, SCHEDULER.config.num_train_timesteps, noise.shape[:1], device=noise.device)
        predicted = self.predict(SCHEDULER.add_noise(self.clean, noise, timesteps), timesteps)
        nn.functional.mse_loss(predicted, noise).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())


def speed(
    id: str, work: str, make: Make, side: int, batch: int, rounds: int, targets: dict[str, float]
) -> Iterator[Row]:
    """T1, T2 and T3: steps a second against each peer, and the share of the matrix-product rate that each reaches.

    Args:
        id: the benchmark.
        work: description of the steps.
        make: returns the contender with a name.
        side: side of the images in pixels.
        batch: number of images.
        rounds: how many times each step is timed.
        targets: for each peer, the ratio of steps per second that ours should reach.
    """
    contenders, missing = present(make, (OURS, *targets))
    steps = {name: TrainingStep(contender, side, batch) for name, contender in contenders.items()}
    products = matrix_products(steps[OURS].clean.device)
    works: dict[str, Work] = {**steps, **products}
    flops = {name: count_flops(work) for name, work in works.items()}
    seconds = alternate(works, rounds)
    rates = [max(flops[name] / times[name] for name in products) for times in by_round(seconds)]  # FLOP/s
    millions = {name: contender.parameters / 1e6 for name, contender in contenders.items()}
    details = {"parameters_in_millions": millions, "flops": flops, "seconds": seconds}
    for name, target in targets.items():
        if name in missing:
            yield Row(id, work, name, missing[name], target=f"{target}x")
            continue
        faster = ratio(seconds[name], seconds[OURS])
        figure = f"{faster} times the steps per second, {millions[OURS]:.2f}M against {millions[name]:.2f}M parameters"
        met = faster.median >= target
        yield Row(id, work, name, figure, faster.median, f"{target}x", met, details, (faster.low, faster.high))
    for name in contenders:
        share = ratio([flops[name] / each for each in seconds[name]], rates)
        figure = f"{share} of the machine's rate, {flops[name] / 1e9:.0f} GFLOP a step"
        aimed = name == OURS and id == "T1"
        met = share.median >= MATRIX_SHARE if aimed else None
        target = f"{MATRIX_SHARE:.0%}" if aimed else ""
        yield Row("T3", work, name, figure, share.median, target, met, details, (share.low, share.high))


def matrix_products(device: torch.device) -> dict[str, Work]:
    """Two matrix products; the faster one is taken as the full rate of the machine.

    One is a plain product, one a 3x3 convolution, since libraries differ: oneDNN convolves at about twice the rate of
    MKL's product on a processor that MKL does not favour.
    """
    matrices = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).unbind()
    x = torch.randn(CONVOLUTION, device=device)
    weight = torch.randn(x.shape[1], x.shape[1], 3, 3, device=device)
    return {
        "matrix product": partial(torch.matmul, *matrices),
        "convolution": partial(nn.functional.conv2d, x, weight, padding=1),
    }


def by_round(seconds: dict[str, list[float]]) -> Iterator[dict[str, float]]:
    """The times of each round, by name."""
    for times in zip(*seconds.values(), strict=True):
        yield dict(zip(seconds, times))


def larger(rounds: int) -> Iterator[Row]:
    """T2: the same networks on images of 64 pixels, and the networks of the CIFAR-10 experiments."""
    faster = dict.fromkeys(CONTENDERS[1:], 1.5)
    yield from speed("T2", "training step, 64x64, batch 8", partial(nine_million, side=64), 64, 8, rounds, faster)
    work = "training step, ddpm-32 against google/ddpm-cifar10-32, 32x32, batch 8"
    yield from speed("T2", work, ddpm_32, 32, 8, rounds, {CONTENDERS[1]: 1.5})


def count_flops(step: Work) -> int:
    """Floating-point operations of the matrix products and convolutions of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def memory(side: int = 32, batch: int = 16) -> Iterator[Row]:
    """T4: the peak memory that training adds to the imports, each case in a process of its own."""
    for checkpointing in (False, True):
        work = "peak memory of T1" + ", with gradient checkpointing" * checkpointing
        peaks = {}
        for name in CONTENDERS:
            try:
                peaks[name] = float(start("training_step", name, side, batch, "checkpointing" * checkpointing))
            except RuntimeError as error:
                figure = f"not run: {str(error).splitlines()[-1]}"
                yield Row("T4", work, name, figure, target=f"{MEMORY_SHARE}x")
        for name in set(peaks) - {OURS}:
            share = peaks[OURS] / peaks[name]
            figure = f"{share:.2f} times, {peaks[OURS]:.0f} MiB against {peaks[name]:.0f} MiB"
            yield Row("T4", work, name, figure, share, f"{MEMORY_SHARE}x", share <= MEMORY_SHARE, {"mib": peaks})


def peak(name: str, side: int, batch: int, checkpointing: bool) -> float:
    """The most memory in MiB that a contender and three of its steps add to this process."""
    before = resident("VmRSS")
    contender = nine_million(name, side)
    if checkpointing:
        contender.network.enable_gradient_checkpointing()  # type: ignore[operator]
    step = TrainingStep(contender, side, batch)
    for _ in range(MEMORY_STEPS):
        step()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bool(sys.argv[4])))
