"""The training step of a noise predictor: its time (T1, T2), its share of the machine (T3) and its memory (T4)."""

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.compared_networks import CONTENDERS, OURS, STOCK, Contender, ddpm_32, nine_million, present
from scripts.benchmarks.processes import resident, start
from scripts.benchmarks.result_row import Comparison, Row
from scripts.benchmarks.timing import Work, alternate, by_name, compute_clock, ratio, ratios, timed_precisions
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import HALF, PRECISIONS
from unet_diffusion.saved_runs import best_device
from unet_diffusion.training.config import OptimizerName
from unet_diffusion.training.optimizer import make_optimizer

SCHEDULER = DDPMScheduler()
MUON = f"{OURS}, Muon"
PRODUCTS = ("matrix product", "convolution")
MATRIX_SIDE = 2048
CONVOLUTION = (64, 256, 16, 16)  # shape of the maps of the 3x3 convolution that shows the rate of the machine
MATRIX_SHARE = 0.75  # target of T3, in float32
MEMORY_SHARE = 0.7  # target of T4
MEMORY_STEPS = 3  # the optimizer's state exists from the second one on
Make = Callable[[str], Contender]


class TrainingStep:
    """Forward, backward, clipping, optimizer and moving average, the same for every network.

    Args:
        contender: the network that learns.
        side: side of the images in pixels.
        batch: number of images.
        precision: "no" for float32, or "bf16"; the loss, weights and optimizer are in float32 either way.
        optimizer: "adamw", or "muon", the default of our training.
    """

    def __init__(
        self,
        contender: Contender,
        side: int,
        batch: int,
        precision: Precision = "no",
        optimizer: OptimizerName = "adamw",
    ) -> None:
        device = best_device("auto")
        self.network, self.predict = contender.network.to(device).train(), contender.at(precision).predict
        groups = [(list(self.network.parameters()), 1.0)]
        products = torch.bfloat16 if precision == "bf16" else torch.float32
        self.optimizer = make_optimizer(optimizer, self.network, groups, 1e-4, 0.0, products)
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
    id: str,
    work: str,
    make: Make,
    side: int,
    batch: int,
    rounds: int,
    targets: dict[str, dict[str, float]],
    muon: bool = False,
) -> Iterator[Comparison]:
    """T1 and T2: the steps a second of ours against those of each peer, all with AdamW.

    Args:
        id: the benchmark.
        work: description of the steps.
        make: returns the contender with a name.
        side: side of the images in pixels.
        batch: number of images.
        rounds: how many times each step is timed.
        targets: for each peer, the ratios that ours should reach, by column.
        muon: also ours with Muon, against the first peer and against ours with AdamW.
    """
    contenders, missing = present(make, (OURS, *targets))
    steps: dict[tuple[str, Precision], Work] = {}
    for precision in timed_precisions(best_device("auto")):
        for name, contender in contenders.items():
            steps[name, precision] = TrainingStep(contender, side, batch, precision)
        if muon:
            steps[MUON, precision] = TrainingStep(contenders[OURS], side, batch, precision, "muon")
    seconds = alternate(steps, rounds, 1, compute_clock)
    details = {
        "parameters_in_millions": {name: contender.parameters / 1e6 for name, contender in contenders.items()},
        "seconds": by_name(seconds),
    }
    for name, target in targets.items():
        found = {} if name in missing else ratios(seconds, OURS, name)
        yield Comparison(id, work, name, found, target, missing.get(name, ""), details)
    if muon:
        peer = next(iter(targets))
        yield Comparison(id, f"{work}, ours with Muon", peer, ratios(seconds, MUON, peer), details=details)
        found = ratios(seconds, MUON, OURS, peer_comes_in=None)
        yield Comparison(id, f"{work}, ours with Muon", "ours with AdamW", found, details=details)


def share(make: Make, side: int, batch: int, rounds: int) -> Iterator[Row]:
    """T3: the share of the machine's rate that the step of T1 reaches, ours and that of `UNet2DModel`."""
    steps: dict[tuple[str, Precision], Work] = {}
    for precision in timed_precisions(best_device("auto")):
        for name in (OURS, STOCK):
            steps[name, precision] = TrainingStep(make(name), side, batch, precision)
        for name, product in products(best_device("auto"), precision).items():
            steps[name, precision] = product
    flops = {key: count_flops(step) for key, step in steps.items()}
    seconds = alternate(steps, rounds, 1, compute_clock)
    rates = {key: [flops[key] / each for each in times] for key, times in seconds.items()}  # FLOP/s
    details = {"flops": {name: flops[name, "no"] for name, _ in flops}, "seconds": by_name(seconds)}
    for name in (OURS, STOCK):
        found = {}
        for precision in timed_precisions(best_device("auto")):
            machine = [max(each) for each in zip(*(rates[product, precision] for product in PRODUCTS))]
            found[PRECISIONS[precision]] = ratio(rates[name, precision], machine)
        work = "share of the machine's rate in a training step, 32x32, batch 16"
        figure = "; ".join(f"{precision} {reached}" for precision, reached in found.items())
        reached = found[PRECISIONS["no"]]
        target, met = (f"{MATRIX_SHARE:.0%}", reached.median >= MATRIX_SHARE) if name == OURS else ("", None)
        quartiles = (reached.low, reached.high)
        yield Row("T3", work, f"itself: {name}", figure, reached.median, target, met, details, quartiles)


def products(device: torch.device, precision: Precision) -> dict[str, Work]:
    """Two products; the faster one is taken as the full rate of the machine.

    One is of matrices, one a 3x3 convolution, since libraries differ: oneDNN convolves at about twice the rate of MKL's
    product on a processor that MKL does not favour.
    """
    dtype = HALF.get(precision, torch.float32)
    matrices = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, device=device).to(dtype).unbind()
    x = torch.randn(CONVOLUTION, device=device).to(dtype)
    weight = torch.randn(x.shape[1], x.shape[1], 3, 3, device=device).to(dtype)
    works = (partial(torch.matmul, *matrices), partial(nn.functional.conv2d, x, weight, padding=1))
    return dict(zip(PRODUCTS, works))


def larger(rounds: int) -> Iterator[Comparison]:
    """T2: the same networks on images of 64 pixels, and the networks of the CIFAR-10 experiments."""
    faster = {STOCK: {PRECISIONS["no"]: 1.5}}
    yield from speed("T2", "training step, 64x64, batch 8", partial(nine_million, side=64), 64, 8, rounds, faster)
    work = "training step, ddpm-32 against google/ddpm-cifar10-32, 32x32, batch 8"
    yield from speed("T2", work, ddpm_32, 32, 8, rounds, faster)


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
