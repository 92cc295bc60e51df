"""Times the exported graphs of a segmentation network against the network itself, side by side in one process.

The network is untrained and segments one image at a time. PyTorch (with the memory layout of our pipelines), ONNX
Runtime and the program of `torch.export` take turns with equal numbers of threads. A figure is the median of the ratios
of the rounds, with their quartiles:

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.export --output runs/benchmark-export
"""

import re
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import tyro

from scripts import NETWORKS
from scripts.benchmarks.timing import alternate, ratio
from scripts.reports import circumstances, markdown_table
from unet_diffusion.checks import require
from unet_diffusion.commands.export.command import export
from unet_diffusion.commands.export.graphs import FORMS
from unet_diffusion.commands.export.head_function import HeadFunction
from unet_diffusion.commands.options.export import Export
from unet_diffusion.files import write_json, write_text
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.saved_runs import load_unet

TORCH = "torch"


@dataclass
class BenchmarkExport:
    """Time exported graphs beside the network."""

    output: Path
    """Folder for `benchmark_export.json` and `benchmark_export.md`."""
    model: str = str(NETWORKS / "half-width.json")
    """A preset, or a JSON file of config values."""
    classes: int = 3
    """Classes of its segmentation head."""
    sizes: tuple[str, ...] = ("128x128", "129x97")
    """Heights and widths of the images."""
    rounds: int = 15
    """How many times each form is timed."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for size in self.sizes:
            valid = re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is not None
            require(valid, "sizes", size, "each must be height x width, such as 128x128")
        require(self.rounds >= 3, "rounds", self.rounds, "must be at least 3, since quartiles are reported")


@dataclass(frozen=True)
class Row:
    """An exported form at an image size.

    Attributes:
        form: the form of the export.
        size: height x width of the image.
        milliseconds: medians of PyTorch and of the form.
        times_as_fast: how many times faster than PyTorch the form is, the median of the ratios.
        low: their lower quartile.
        high: their upper quartile.
    """

    form: str
    size: str
    milliseconds: dict[str, float]
    times_as_fast: float
    low: float
    high: float

    @property
    def cells(self) -> list[str]:
        """The cells of a table."""
        times = [f"{self.milliseconds[name]:.1f} ms" for name in (TORCH, self.form)]
        return [self.form, self.size, *times, f"{self.times_as_fast:.2f} ({self.low:.2f} to {self.high:.2f})"]


def run(config: BenchmarkExport) -> list[Row]:
    """Exports the graphs and times them; prints and writes the table."""
    torch.manual_seed(0)
    unet = load_unet(config.model, {"num_classes": config.classes}).eval()
    function = HeadFunction(unet, "segmentation")
    graphs = {TORCH: torch.no_grad()(function)}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "run")
        SegmentationPipeline(unet).save_pretrained(saved)
        for form, (suffix, _, load) in FORMS.items():
            done = export(Export(saved, Path(folder, form), form, "segmentation"))
            print(*done.checks, sep="\n")
            graphs[form] = load(done.path / f"segmentation.{suffix}")
    rows = []
    for size in config.sizes:
        (image,) = function.example(1, *map(int, size.split("x")))
        layouts = {name: image if name == "onnx" else channels_last(image) for name in graphs}  # each form's own
        seconds = alternate({name: partial(graph, layouts[name]) for name, graph in graphs.items()}, config.rounds)
        medians = {name: 1000 * sorted(times)[len(times) // 2] for name, times in seconds.items()}
        for form in FORMS:
            faster = ratio(seconds[TORCH], seconds[form])
            milliseconds = {name: medians[name] for name in (TORCH, form)}
            rows.append(Row(form, size, milliseconds, faster.median, faster.low, faster.high))
    facts = {
        **circumstances(),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")},
        "options": {**asdict(config), "output": str(config.output)},
        "parameters": unet.num_parameters(),
    }
    table = markdown_table(("form", "size", "torch", "the form", "times as fast"), (row.cells for row in rows))
    print(table)
    write_json(config.output / "benchmark_export.json", {**facts, "rows": [asdict(row) for row in rows]})
    write_text(config.output / "benchmark_export.md", table)
    return rows


if __name__ == "__main__":
    run(tyro.cli(BenchmarkExport, description=__doc__))
