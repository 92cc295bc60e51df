"""Checks the promises of tiled segmentation; each job prints a table and writes the same figures as JSON.

exactness: without statistics over space and attention, tiles give the logits of the whole image.
memory: the memory does not grow with the image, as the operating system counts it.
blending: with GroupNorm and attention tiles are not exact; how many labels change, and whether the masks get worse.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from scripts.benchmarks.processes import start
from scripts.reports import circumstances, markdown_table
from unet_diffusion import UNet
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.evaluation.mask_scores import labelled_for
from unet_diffusion.files import write_json
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.network.tiling import Tiling, tiled
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_generator, keyed_seed
from unet_diffusion.saved_index import check_run
from unet_diffusion.segmentation.metrics import SegmentationMetrics

BOUND = 1e-5  # of the largest absolute logit
Rows = list[dict[str, Any]]


@dataclass
class Exactness:
    """Compare the logits of tiles with those of the whole image."""

    output: Path = Path("runs/tiling/exactness.json")
    """File of the figures."""
    sizes: tuple[tuple[int, int], ...] = ((65, 47), (449, 450), (512, 512), (601, 399), (333, 720), (688, 563))
    """Heights and widths of the images."""
    tile_size: int = 128
    """Output pixels a side of a tile."""
    channels: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Widths of the networks; by default an eighth of those of 2015."""
    seed: int = 0
    """Determines images and weights."""


@dataclass
class Memory:
    """Measure the peak memory of `segment_file`, each case in a process of its own."""

    output: Path = Path("runs/tiling/memory.json")
    """File of the figures, written after every case; cases in it are not run again."""
    cases: tuple[tuple[str, int, int], ...] = (
        ("small-32", 2048, 2048),
        ("tiny", 2048, 2048),
        ("tiny", 16384, 2048),
    )
    """Presets, with heights and widths of the 8-bit images."""
    seed: int = 0
    """Determines images and weights."""


@dataclass
class Blending:
    """Compare the masks of blended windows with those of the whole image and with the true ones."""

    data: MaskedOptions
    run: Path = Path("runs/segmentation")
    """Folder of a segmentation run."""
    windows: tuple[int, ...] = (128, 208, 288, 416)
    """Sides of the network's input windows in pixels."""
    output: Path = Path("runs/tiling/blending.json")
    """File of the figures."""


# --- exactness ---


def exact_networks(options: Exactness) -> Iterator[tuple[str, UNet]]:
    """Untrained networks in which each output pixel depends on a bounded part of the image."""
    preset = {"channels": options.channels, "attention": (False,) * len(options.channels)}
    residual = {"block": "residual", "activation": "silu", "downsample": "conv", "padding": "same"}
    for upsample in ("transposed", "nearest"):
        kinds = {"2015, unpadded": {"padding": "valid"}, "2015, padded": {"padding": "same"}, "residual": residual}
        for name, kind in kinds.items():
            torch.manual_seed(keyed_seed(options.seed, "network", name, upsample))
            unet = UNet.from_preset("ronneberger-2015", **preset, **kind, upsample=upsample)
            for module in unet.modules():  # a last convolution at zero would hide its branch
                if isinstance(module, nn.Conv2d) and not module.weight.any():
                    nn.init.kaiming_normal_(module.weight)
            yield f"{name}, {upsample}", unet.eval()


def whole_logits(unet: UNet, image: Tensor) -> Tensor:
    """Logits (1, K, H, W) of an image (1, 1, H, W) in one pass; for an unpadded network NumPy mirrors its borders."""
    if unet.config.padding == "same":
        return unet(channels_last(image)).logits
    height, width = image.shape[2:]
    stride, smallest = 2 ** (len(unet.config.channels) - 1), unet.smallest_side
    margin = (smallest - unet.output_size(smallest, smallest)[0]) // 2
    ends = []
    for side in (height, width):
        missing = max(side + 2 * margin + stride - smallest, 0)  # one more stride, since "nearest" spoils the last rows
        ends.append((margin, smallest + -(-missing // stride) * stride - margin - side))
    mirrored = torch.from_numpy(np.pad(image[0, 0].numpy(), ends, mode="reflect"))
    return unet(channels_last(mirrored[None, None])).logits[..., :height, :width]


def tiled_logits(unet: UNet, image: Tensor, tiling: Tiling) -> Tensor:
    """Logits (1, K, H, W) of an image (1, 1, H, W), put together from tiles."""
    logits = torch.full((1, unet.config.num_classes, *image.shape[2:]), torch.nan)
    size = (image.shape[2], image.shape[3])
    parts = tiled(lambda window: unet(channels_last(window)).logits, lambda r, c: image[..., r, c], size, tiling)
    for rows, columns, part in parts:
        logits[..., rows, columns] = part
    return logits


def off_the_stride(tiling: Tiling) -> Tiling:
    """The same windows, shifted off the multiples of the stride, to show that the comparison finds errors."""
    return replace(tiling, lead=tiling.lead + 1) if tiling.smallest else replace(tiling, stride=1)


@torch.no_grad()
def measure_exactness(options: Exactness) -> Rows:
    """One row per network and size; differences are relative to the largest absolute logit."""
    rows = []
    for name, unet in exact_networks(options):
        tiling = Tiling.of(unet, options.tile_size)
        for height, width in options.sizes:
            generator = keyed_generator(options.seed, "image", height, width)
            image = torch.rand(1, 1, height, width, generator=generator) * 2 - 1
            whole = whole_logits(unet, image)
            right, wrong = (
                float((tiled_logits(unet, image, each) - whole).abs().max() / whole.abs().max())
                for each in (tiling, off_the_stride(tiling))
            )
            size = {"height": height, "width": width, "windows": tiling.count(height, width)}
            rows.append({"network": name, **size, "difference": right, "off_the_stride": wrong})
    write_json(options.output, {**circumstances(), "seed": options.seed, "cases": rows})
    return rows


def largest(rows: Rows) -> Rows:
    """The largest figures of each network over all sizes, and the number of sizes."""
    names = dict.fromkeys(row["network"] for row in rows)
    groups = {name: [row for row in rows if row["network"] == name] for name in names}
    keys = ("windows", "difference", "off_the_stride")
    return [
        {"network": name, "sizes": len(group), **{key: max(row[key] for row in group) for key in keys}}
        for name, group in groups.items()
    ]


# --- memory ---


def measure_memory(options: Memory) -> Rows:
    """One row per case, memory in MiB; the cases of an earlier run come from its file."""
    rows: Rows = json.loads(options.output.read_text())["cases"] if options.output.exists() else []
    for preset, height, width in options.cases:
        case = {"preset": preset, "height": height, "width": width, "seed": options.seed}
        if any(case.items() <= row.items() for row in rows):
            continue
        words = [word for name, value in case.items() for word in (f"--{name}", value)]
        rows.append({**case, **json.loads(start("tiling_memory", *words)), **circumstances()})
        write_json(options.output, {"cases": rows})
    return rows


# --- blending ---


def measure_blending(options: Blending) -> Rows:
    """One row for whole images and one for each window; shares are of the pixels of all images.

    Raises:
        ValueError: the folder is not a run, the data do not fit it, or the windows are too small for its network.
    """
    check_run(options.run)
    pipe = SegmentationPipeline.from_pretrained(options.run)
    pipe.set_progress_bar_config(disable=True)
    tiles: dict[str, int | None] = {"whole": None}
    tiles |= {str(window): tile_for(pipe.unet, window) for window in options.windows}
    dataset = labelled_for(
        pipe,
        options.data,
    )
    items = [dataset.fetch(index) for index in range(len(dataset))]
    images, masks = [item["image"] for item in items], [item["mask"] for item in items]

    rows: Rows = []
    whole: list[Tensor] = []
    for window, tile in tiles.items():
        predicted, windows = segmented(pipe, images, tile)
        whole = whole or predicted
        metrics = SegmentationMetrics(pipe.num_classes)
        for labels, mask in zip(predicted, masks):
            metrics.update(labels[None], mask[None])
        scores = metrics.compute()
        rows.append(
            {
                "window": window,
                "windows_per_image": windows / len(images),
                "changed": sum(int((a != b).sum()) for a, b in zip(predicted, whole)) / sum(a.numel() for a in whole),
                "accuracy": scores["pooled/accuracy"],
                "mean_iou": scores["pooled/mean_iou"],
            }
        )
    origin = {"run": str(options.run), "data": asdict(options.data), "images": len(images)}
    write_json(options.output, {**circumstances(), **origin, "cases": rows})
    return rows


def segmented(pipe: SegmentationPipeline, images: list[Tensor], tile: int | None) -> tuple[list[Tensor], int]:
    """Labels int64 (H, W) of each image (C, H, W), and the total number of windows; one per image if tile is None."""
    labels: list[Tensor] = []
    windows = 0
    for image in images:
        height, width = image.shape[1:]
        size = tile or max(height, width)
        labels += pipe(image, size, output_type="pt", return_probabilities=False, return_dict=False)[0]
        windows += Tiling.of(pipe.unet, size).count(height, width)
    return labels, windows


def tile_for(unet: UNet, window: int) -> int:
    """The largest tile whose input window has at most `window` pixels a side, for sides that the stride divides.

    Raises:
        ValueError: not even the smallest fits.
    """
    for tile in range(window, 0, -1):
        tiling = Tiling.of(unet, tile)
        if tiling.tile + tiling.shared + tiling.lead + tiling.trail <= window:
            return tile
    raise ValueError(f"windows has {window}, but windows of this network share more pixels; give larger ones.")


# --- the program ---


JOBS: dict[type, Callable[[Any], Rows]] = {
    Exactness: measure_exactness,
    Memory: measure_memory,
    Blending: measure_blending,
}
COLUMNS: dict[type, dict[str, str]] = {
    Exactness: {"network": "", "sizes": "", "windows": "", "difference": ".1e", "off_the_stride": ".1e"},
    Memory: dict.fromkeys(
        ("preset", "height", "width", "image_mib", "before_mib", "peak_mib", "anonymous_mib", "cpu_seconds"), ""
    ),
    Blending: {"window": "", "windows_per_image": "g", "changed": ".3%", "accuracy": ".4f", "mean_iou": ".4f"},
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one job and prints its table; ends with an error if tiles were not exact."""
    options = tyro.cli(
        Exactness | Memory | Blending, description=__doc__, args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )
    try:
        rows = JOBS[type(options)](options)
    except ValueError as error:
        raise SystemExit(f"tiling: {error}") from error
    if isinstance(options, Exactness):
        rows = largest(rows)
    columns = COLUMNS[type(options)]
    lines = ([format(row[name], form) for name, form in columns.items()] for row in rows)
    print(markdown_table((name.replace("_", " ") for name in columns), lines))
    print(f"The same figures are in {options.output}.")
    if not all(row.get("difference", 0) <= BOUND for row in rows):
        raise SystemExit(f"tiling: tiles differ from the whole by more than {BOUND} of the largest logit.")


if __name__ == "__main__":
    main()
