"""L1: how the time of our training step grows with the batch, the images, the width and the processes."""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping

import torch
from torch.nn.parallel import DistributedDataParallel

from scripts import NETWORKS
from scripts.benchmarks.compared_networks import OURS, nine_million, stock
from scripts.benchmarks.processes import start
from scripts.benchmarks.result_row import Row
from scripts.benchmarks.timing import alternate
from scripts.benchmarks.training_step import TrainingStep
from unet_diffusion import UNet
from unet_diffusion.saved_runs import load_unet

BATCHES = (4, 8, 16, 32)
SIDES = (16, 32, 64)  # of the images, in pixels
WIDTHS = (0.5, 1.0, 2.0)  # factors of the channels of all stages
PROCESSES = (1, 2)
GLOBAL_BATCH = 16  # images per step of all processes together
HEAD_CHANNELS = 32  # at width 1


def growth(rounds: int) -> Iterator[Row]:
    """The exponent of each quantity in the time of a step."""
    steps = {batch: TrainingStep(nine_million(OURS, 32), 32, batch) for batch in BATCHES}
    yield power("batch", alternate(steps, rounds))
    steps = {side: TrainingStep(nine_million(OURS, side), side, 4) for side in SIDES}
    yield power("side of the images", alternate(steps, rounds))
    networks = [widened(width) for width in WIDTHS]
    steps = {network.channels_out: TrainingStep(stock(network), 32, 4) for network in networks}
    yield power("channels of the finest stage", alternate(steps, rounds))
    yield power("processes", {processes: launched(processes, rounds) for processes in PROCESSES})


def widened(width: float) -> UNet:
    """Our network with `width` times the channels in every stage and the same number of attention heads."""
    file = NETWORKS / "cifar-9m.json"
    channels = [int(width * each) for each in json.loads(file.read_text())["channels"]]
    return load_unet(str(file), {"channels": channels, "head_channels": int(width * HEAD_CHANNELS)})


def power(what: str, seconds: Mapping[int, list[float]]) -> Row:
    """A row with the median exponent of the rounds.

    Args:
        what: the quantity.
        seconds: times of each round, by the value of the quantity; at least two values with the same number of rounds.
    """
    slopes = [exponent(dict(zip(seconds, times))) for times in zip(*seconds.values(), strict=True)]
    low, slope, high = statistics.quantiles(slopes, n=4, method="inclusive")
    medians = {size: statistics.median(times) for size, times in seconds.items()}
    return Row(
        "L1",
        f"step time against {what}",
        "itself",
        f"power {slope:.2f} ({low:.2f} to {high:.2f})",
        slope,
        details={"seconds": medians},
        quartiles=(low, high),
    )


def exponent(values: Mapping[int, float]) -> float:
    """The slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(x) for x in values], [math.log(y) for y in values.values()]).slope


def launched(processes: int, rounds: int) -> list[float]:
    """Seconds of each step in processes of one thread that share `GLOBAL_BATCH` images.

    Raises:
        RuntimeError: a process failed.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    return json.loads(start("growth", rounds, launcher=torchrun, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""))


def share_of_steps(rounds: int) -> list[float]:
    """Takes steps on the images of one of the processes and returns the seconds of each."""
    processes = torch.distributed.get_world_size()
    network = nine_million(OURS, 32).network
    if processes > 1:
        network = DistributedDataParallel(network)
    step = TrainingStep(stock(network), 32, GLOBAL_BATCH // processes)
    return alternate({"step": step}, rounds)["step"]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    seconds = share_of_steps(int(sys.argv[1]))
    if torch.distributed.get_rank() == 0:
        print(json.dumps(seconds))
    torch.distributed.destroy_process_group()
