"""One evaluation of a noise predictor (G2), and training and use of segmentation networks (S1, S2)."""

import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import Tensor, nn

from scripts.benchmarks.compared_networks import OURS, STOCK, Contender, nine_million, present
from scripts.benchmarks.processes import resident, start
from scripts.benchmarks.result_row import Comparison, Row
from scripts.benchmarks.segmenters import CLASSES, LAYOUT, LEAN, MONAI, PEERS, segmenter
from scripts.benchmarks.timing import Work, alternate, by_name, compute_clock, ratios, timed_precisions
from unet_diffusion.network.attention import SelfAttention
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import PRECISIONS, autocast
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.segmentation.losses import segmentation_loss

EVALUATIONS = {1: 16, 64: 1}  # batch size: evaluations in a row, which take at least a tenth of a second
LARGE = 1024  # pixels of a side
WINDOW = 256  # of MONAI's sliding window; batches of 4 windows that overlap by a quarter are its defaults
TALL = (8192, 2048)


def evaluations(rounds: int) -> Iterator[Comparison]:
    """G2: one evaluation of both networks, without gradients, with fused projections and channels_last maps."""
    for batch, repeats in EVALUATIONS.items():
        works = {}
        for name in (OURS, STOCK):
            contender = nine_million(name, 32)
            network = contender.network.eval().to(memory_format=torch.channels_last)
            fuse(network)
            noisy = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            for precision in timed_precisions(noisy.device):
                works[name, precision] = partial(evaluate, contender.at(precision), noisy, repeats)
        seconds = alternate(works, rounds, clock=compute_clock)
        yield faster("G2", f"one evaluation, 32x32, batch {batch}", STOCK, seconds, 2.0, {"in_a_row": repeats})


@torch.no_grad()
def evaluate(contender: Contender, noisy: Tensor, repeats: int) -> None:
    """Evaluates a network several times in a row."""
    for _ in range(repeats):
        contender.predict(noisy, torch.tensor(500))


def fuse(network: nn.Module) -> None:
    """Computes query, key and value by one product in every attention layer, ours or of diffusers."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())
        elif isinstance(module, SelfAttention):
            module.fuse_projections()


def no_grad(work: Work) -> Work:
    """The same work, run without gradients."""
    return torch.no_grad()(work)


def scores(network: nn.Module, images: Tensor, precision: Precision = "no") -> Tensor:
    """Class scores of images in float32, whether a network returns them in an output of ours or as a tensor."""
    with autocast(images.device, precision):
        output = network(images)
    return (output if isinstance(output, Tensor) else output.logits).float()


class SegmentationStep:
    """Forward, cross-entropy, backward and AdamW, the same for all networks."""

    def __init__(self, network: nn.Module, side: int, batch: int, precision: Precision = "no") -> None:
        self.network, self.precision = network.train(), precision
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        self.images = torch.rand(batch, 1, side, side) * 2 - 1
        self.masks = torch.randint(0, CLASSES, (batch, side, side))

    def __call__(self) -> None:
        """One step."""
        segmentation_loss(scores(self.network, self.images, self.precision), self.masks).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def segmentation(rounds: int) -> Iterator[Comparison]:
    """S1: a training step and the mask of a large image."""
    networks, missing = present(segmenter, (OURS, LEAN, *PEERS))
    for name, why in missing.items():
        yield Comparison("S1", "segmentation", name, missing=why)
    millions = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in networks.items()}
    details = {"parameters_in_millions": millions}
    pairs = [(OURS, name) for name in PEERS if name in networks] + [(LEAN, LAYOUT)]
    cases = [(name, precision) for precision in timed_precisions(torch.device("cpu")) for name in networks]
    steps = {(name, precision): SegmentationStep(networks[name], 128, 8, precision) for name, precision in cases}
    seconds = alternate(steps, rounds, clock=compute_clock)
    for ours, peer in pairs:
        yield faster("S1", "segmentation training step, 128x128, batch 8", peer, seconds, 1.3, details, ours)

    image = np.random.default_rng(0).integers(0, 256, (LARGE, LARGE), dtype=np.uint8)
    works = {(name, precision): large_image(name, networks[name], image, precision) for name, precision in cases}
    seconds = alternate(works, rounds, 1, compute_clock)
    for ours, peer in pairs:
        yield faster("S1", f"mask of {LARGE}x{LARGE} pixels", peer, seconds, 1.5, details, ours)


def faster(
    id: str,
    work: str,
    peer: str,
    seconds: dict[tuple[str, Precision], list[float]],
    target: float,
    details: dict,
    ours: str = OURS,
) -> Comparison:
    """A row that says how many times as fast ours is; the target is for float32."""
    work += ours.removeprefix(OURS)
    details = {**details, "seconds": by_name(seconds)}
    return Comparison(id, work, peer, ratios(seconds, ours, peer), {PRECISIONS["no"]: target}, details=details)


def large_image(name: str, network: nn.Module, image: np.ndarray, precision: Precision = "no") -> Work:
    """The work of computing a mask of class indices.

    Ours uses our pipeline with its defaults. The network with batch norm gets the whole image, as is usual; the others
    use MONAI's sliding window with its defaults.
    """
    network = network.eval()
    if name in (OURS, LEAN):
        pipe = SegmentationPipeline(network)
        pipe.set_progress_bar_config(disable=True)
        return lambda: pipe(image, output_type="np", return_probabilities=False, mixed_precision=precision)
    predictor = partial(scores, network, precision=precision)
    infer = import_module("monai.inferers").sliding_window_inference
    windows = partial(infer, roi_size=(WINDOW, WINDOW), sw_batch_size=4, predictor=predictor)
    predict = predictor if name == LAYOUT else windows
    return no_grad(lambda: predict(torch.from_numpy(image).float()[None, None] / 127.5 - 1).argmax(dim=1))


def memory() -> Iterator[Row]:
    """S2: the peak memory beyond the array of the image, each case in a process of its own."""
    mib = {name: float(start("inference", name)) for name in (OURS, MONAI)}
    share = mib[OURS] / mib[MONAI]
    figure = f"{share:.2f} times, {mib[OURS]:.0f} MiB against {mib[MONAI]:.0f} MiB"
    work = f"memory for the mask of {TALL[0]}x{TALL[1]} pixels"
    yield Row("S2", work, MONAI, figure, share, "0.25x", share <= 0.25, {"mib": mib})


def peak(name: str) -> float:
    """The most memory in MiB that segmenting a tall image adds to this process, beyond the image and the network."""
    image = np.random.default_rng(0).integers(0, 256, TALL, dtype=np.uint8)
    work = large_image(name, segmenter(name), image)
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak(sys.argv[1]))
