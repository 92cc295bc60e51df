"""How good the images of finished runs are, against how often a sampler evaluates the network.

Every case goes through `evaluate-generation`, with the data that the run learnt from:

    python -m scripts.experiments.samplers --runs runs/fashion-mnist runs/fashion-mnist-classic --output runs/samplers

Writes the figures of each case, a grid of its images, `samplers.md` and `samplers.png`. The same command goes on
where it was stopped.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from unet_diffusion.commands.evaluate_generation import EvaluateGeneration, RealImages, evaluate_generation, load_real
from unet_diffusion.commands.sample import GenerationOptions
from unet_diffusion.data.sets import DataConfig
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.files import write_text, written_aside
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.saved_runs import read_object

SHOWN = 36  # images in a grid
DRAWN = ("Frechet distance", "kernel distance")
FIGURES = (*DRAWN, "precision", "recall")


@dataclass
class CompareSamplers:
    """Which runs, samplers and numbers of evaluations are compared."""

    runs: tuple[Path, ...]
    """Folders of DDPM runs."""
    output: Path
    """Folder of the figures and images."""
    samplers: tuple[SamplerName, ...] = ("ddim", "dpm-solver++", "sde-dpm-solver++", "heun")
    """How the noise is removed."""
    evaluations: tuple[int, ...] = (10, 20, 50)
    """Network evaluations of each image. Heun's method takes two a step, but one in the last."""
    count: int = 512
    """Images that each case generates, and as many real ones."""
    features: str = "efficientnet-lite0"
    """Network whose features are compared, as in `evaluate-generation`."""
    seed: int = 0
    """Of the noise; the same for every case."""

    def __post_init__(self) -> None:
        """Checks what `evaluate-generation` would not refuse before others were computed."""
        if not self.runs or len({run.name for run in self.runs}) < len(self.runs):
            raise ValueError(f"runs is {self.runs}, but must be one or more folders of different names.")
        for name in self.samplers:
            if name not in get_args(SamplerName):
                raise ValueError(f"samplers has {name!r}, but each must be one of {', '.join(get_args(SamplerName))}.")
        for number in self.evaluations:
            if number < 3:
                raise ValueError(f"evaluations has {number}, but must be at least 3, two steps of Heun's method.")

    def cases(self) -> "Iterator[Case]":
        """All cases, the cheap ones first."""
        for number in sorted(self.evaluations):
            for run in self.runs:
                for name in self.samplers:
                    yield Case(run, name, (number + 1) // 2 if name == "heun" else number)


@dataclass(frozen=True)
class Case:
    """A run with a sampler and its steps."""

    run: Path
    sampler: SamplerName
    steps: int

    @property
    def evaluations(self) -> int:
        """Of the network, for each image: Heun's last step, which ends without noise, is one of Euler's."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    def __str__(self) -> str:
        """The name of its files."""
        return f"{self.run.name}-{self.sampler}-{self.evaluations}"


def compare_samplers(options: CompareSamplers) -> str:
    """Measures what is not measured yet, and returns the table.

    Raises:
        ValueError: a run without a config, before anything is measured; figures that were measured otherwise.
    """
    for run in options.runs:
        if not (run / "config.json").is_file():
            raise ValueError(f"runs has {run}, but there is no config.json, which says what it learnt from.")
    found: dict[Case, dict[str, Any]] = {}
    real: dict[str, RealImages] = {}  # by the data, which runs of several recipes share
    for case in options.cases():
        path = options.output / f"{case}.json"
        if not path.is_file():
            measure(options, case, path, real)
        found[case] = json.loads(path.read_text(encoding="utf-8"))
        expected = {"count": options.count, "seed": options.seed, "features": options.features}
        differing = {
            key: found[case]["options"][key] for key in expected if found[case]["options"][key] != expected[key]
        }
        if differing:
            raise ValueError(f"{path} was measured with {differing}, not as asked for; choose another output.")
        text = table(found)
        write_text(options.output / "samplers.md", text)
        save_plot(found, options.output / "samplers.png")
    return text


def measure(options: CompareSamplers, case: Case, path: Path, real: dict[str, RealImages]) -> None:
    """Writes the figures of a case, last of all that belongs to it, and a grid of its first images."""
    data = read_object(case.run / "config.json")["data"]
    shared: dict[str, Any] = {"run": case.run, "sampler": case.sampler, "steps": case.steps, "seed": options.seed}
    shown = GenerationOptions(count=SHOWN, **shared)
    pipe = shown.pipeline()
    save_image(grid(shown.generate(pipe, "pil")), path.with_name(f"{case}-samples.png"))
    evaluation = EvaluateGeneration(
        data=DataConfig(**data),
        count=options.count,
        features=options.features,
        output=path,
        overwrite=True,
        **shared,
    )
    key = json.dumps([data, pipe.unet.config.in_channels])
    if key not in real:
        real[key] = load_real(evaluation, evaluation.network(), pipe.unet.config.in_channels)
    evaluate_generation(evaluation, real[key])


def table(found: dict[Case, dict[str, Any]]) -> str:
    """A line for each case, as Markdown, with standard errors."""
    first = next(iter(found.values()))
    options, used = first["options"], first["figures"]["kernel distance"]["generated_count"]
    title = f"{options['count']} images each ({used} for the kernel distance), seed {options['seed']}, features of"
    lines = [f"{title} {first['features']}.", ""]
    lines += ["| run | sampler | evaluations | " + " | ".join(FIGURES) + " | nearer than held-out images |"]
    lines += ["| --- " * (len(FIGURES) + 4) + "|"]
    for case, results in sorted(found.items(), key=lambda item: (item[0].run.name, item[0].sampler, item[0].steps)):
        figures = (results["figures"][name] for name in FIGURES)
        near, error = (results["memorisation"][key] for key in ("near", "near_error"))
        cells = [case.run.name, case.sampler, str(case.evaluations)]
        cells += [f"{figure['value']:.3g} ± {figure['error']:.2g}" for figure in figures]
        cells += ["" if near is None else f"{near:.1%}" if error is None else f"{near:.1%} ± {error:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    flags = dict.fromkeys(
        figure["flag"]
        for results in found.values()
        for figure in (*results["figures"].values(), results["memorisation"])
    )
    return "\n".join([*lines, "", *filter(None, flags)]).strip() + "\n"


def save_plot(found: dict[Case, dict[str, Any]], path: Path) -> None:
    """Draws the distances against the evaluations, a row for each run and a line for each sampler."""
    runs = list(dict.fromkeys(case.run for case in found))
    samplers = list(dict.fromkeys(case.sampler for case in found))
    figure = Figure(figsize=(5 * len(DRAWN), 3.4 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(DRAWN), squeeze=False, sharey="col")
    lines = {}
    for run, row in zip(runs, panels):
        for name, axes in zip(DRAWN, row):
            for sampler in samplers:
                cases = [case for case in found if (case.run, case.sampler) == (run, sampler)]
                figures = [found[case]["figures"][name] for case in cases]
                values, errors = ([figure[key] for figure in figures] for key in ("value", "error"))
                spent = [case.evaluations for case in cases]
                lines[sampler] = axes.errorbar(spent, values, errors, marker=".", capsize=2)
            axes.set_xscale("log")
            axes.set_yscale("log")
            numbers = sorted({case.evaluations for case in found})  # Heun's lie beside the others'
            apart = [one for one, after in zip(numbers, [*numbers[1:], math.inf]) if after >= 1.2 * one]
            axes.xaxis.set_major_locator(FixedLocator(apart))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            for axis in (axes.xaxis, axes.yaxis):  # plain text, as in figures.py
                axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
                axis.set_minor_locator(NullLocator())
            axes.set(title=run.name, xlabel="network evaluations", ylabel=name)
            axes.grid(alpha=0.3, which="both")
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=5, fontsize="small")
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=100)


if __name__ == "__main__":
    print(compare_samplers(tyro.cli(CompareSamplers, description=__doc__)))
