r"""The quality of images of finished runs against the number of network evaluations, for several samplers.

Every case goes through `evaluate-generation` with the training images of the run. Runs that `tune-few-steps` has made
are measured with `lcm` and the few evaluations that they are tuned for, all others with the other samplers:

    python -m scripts.experiments.samplers --runs runs/fashion-mnist runs/fashion-mnist-tuned --output runs/samplers \
        --samplers dpm-solver++ lcm --evaluations 1 2 5 10 20 50

Writes the figures of each case, a grid of its first images, `samplers.md` and `samplers.png`. The same command
resumes a stopped comparison.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator

from scripts.reports import content_hash, label_ticks, markdown_table, save_figure
from unet_diffusion.checks import require, require_choice
from unet_diffusion.commands.evaluate_generation import (
    RealImages,
    evaluate_generation,
    generated_batches,
    load_real,
)
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.sample import generation_pipeline
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.files import INDEX, write_text
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.saved_index import read_object

GRID = 36  # images
DRAWN = ("Frechet distance", "kernel distance")
FIGURES = (*DRAWN, "precision", "recall")


@dataclass
class CompareSamplers:
    """Compare samplers and their numbers of steps on finished runs."""

    runs: tuple[Path, ...]
    """Folders of DDPM runs."""
    output: Path
    """Folder of the figures and images."""
    samplers: tuple[SamplerName, ...] = ("ddim", "dpm-solver++", "sde-dpm-solver++", "heun")
    """How the noise is removed."""
    evaluations: tuple[int, ...] = (10, 20, 50)
    """Network evaluations of each image. Heun's method takes two in each step, and one in the last."""
    count: int = 512
    """Number of images that each case generates, and of real ones."""
    features: str = "efficientnet-lite0"
    """Network whose features are compared, as in `evaluate-generation`."""
    seed: int = 0
    """Determines the noise, which is the same for every case."""

    def __post_init__(self) -> None:
        """Checks the values that `evaluate-generation` would check only when it reaches their case."""
        names = {run.name for run in self.runs}
        valid = self.runs and len(names) == len(self.runs)
        require(valid, "runs", self.runs, "must be one or more folders of different names")
        for name in self.samplers:
            require_choice("samplers", name, get_args(SamplerName))
        for number in self.evaluations:
            rule = "each must be at least 3, two steps of Heun's method; take fewer without heun"
            require(number >= (3 if "heun" in self.samplers else 1), "evaluations", number, rule)

    def cases(self) -> "Iterator[Case]":
        """All cases, those of few evaluations first: `lcm` in few steps for tuned runs, other samplers for others."""
        most = {run: read_object(run / INDEX).get("_few_steps") for run in self.runs}
        for number in sorted(self.evaluations):
            for run in self.runs:
                for name in self.samplers:
                    if (name == "lcm") == (most[run] is not None) and number <= (most[run] or number):
                        yield Case(run, name, (number + 1) // 2 if name == "heun" else number)


@dataclass(frozen=True)
class Case:
    """A run with a sampler and a number of steps."""

    run: Path
    sampler: SamplerName
    steps: int

    @property
    def evaluations(self) -> int:
        """Network evaluations of each image; the last step of Heun's method is one of Euler's, which takes one."""
        return 2 * self.steps - 1 if self.sampler == "heun" else self.steps

    def __str__(self) -> str:
        """The beginning of the names of its files."""
        return f"{self.run.name}-{self.sampler}-{self.evaluations}"


def compare_samplers(options: CompareSamplers) -> str:
    """Measures the cases that are not on disk and returns the table of all.

    Raises:
        ValueError: a run has no config, no run has any of the samplers (both are checked before anything is measured),
            or figures on disk have other options.
    """
    for run in options.runs:
        if not (run / "config.json").is_file():
            raise ValueError(f"runs has {run}, but there is no config.json in it; give finished runs.")
    contents = {run: content_hash([run / "config.json", *sorted(run.glob("unet/*"))]) for run in options.runs}
    found: dict[Case, dict[str, Any]] = {}
    real: dict[str, RealImages] = {}  # by the data, which runs of several recipes share
    cases = [*options.cases()]
    rule = "runs that tune-few-steps has made take lcm in at most 4 evaluations, all others the other samplers"
    require(cases, "samplers", options.samplers, f"must fit one of the runs: {rule}")
    for case in cases:
        path = options.output / f"{case}-{contents[case.run]}.json"  # another run of that name has other figures
        if not path.is_file():
            measure(options, case, path, real)
        found[case] = json.loads(path.read_text(encoding="utf-8"))
        expected = {"count": options.count, "seed": options.seed, "features": options.features}
        differing = {
            key: found[case]["options"][key] for key in expected if found[case]["options"][key] != expected[key]
        }
        if differing:
            raise ValueError(f"{path} was measured with {differing}; choose another output, or the same options.")
        text = table(found)
        write_text(options.output / "samplers.md", text)
        save_plot(found, options.output / "samplers.png")
    return text


def measure(options: CompareSamplers, case: Case, path: Path, real: dict[str, RealImages]) -> None:
    """Writes the figures of a case, after all other files that belong to it."""
    data = read_object(case.run / "config.json")["data"]
    evaluation = EvaluateGeneration(
        run=case.run,
        sampler=case.sampler,
        steps=case.steps,
        seed=options.seed,
        count=options.count,
        features=options.features,
        output=path,
        overwrite=True,
    )
    pipe = generation_pipeline(evaluation)
    key = json.dumps([data, pipe.unet.config.in_channels, pipe.unet.config.sample_size])
    if key not in real:
        real[key] = load_real(evaluation, pipe.unet)
    batches = [*generated_batches(evaluation, pipe)]
    first = array_images(torch.cat(batches)[:GRID].permute(0, 2, 3, 1).cpu().numpy())
    save_image(grid(first), path.with_name(f"{path.stem}-samples.png"))
    evaluate_generation(evaluation, real[key], batches)


def table(found: dict[Case, dict[str, Any]]) -> str:
    """A line for each case with standard errors, as Markdown."""
    first = next(iter(found.values()))
    options, used = first["options"], first["figures"]["kernel distance"]["generated_count"]
    title = f"{options['count']} images each ({used} for the kernel distance), seed {options['seed']}, features of"
    lines = []
    for case, results in sorted(found.items(), key=lambda item: (item[0].run.name, item[0].sampler, item[0].steps)):
        figures = (results["figures"][name] for name in FIGURES)
        near, error = (results["memorisation"][key] for key in ("near", "near_error"))
        cells = [case.run.name, case.sampler, str(case.evaluations)]
        cells += [f"{figure['value']:.3g} ± {figure['error']:.2g}" for figure in figures]
        cells += ["" if near is None else f"{near:.1%}" if error is None else f"{near:.1%} ± {error:.1%}"]
        lines.append(cells)
    head = ("run", "sampler", "evaluations", *FIGURES, "nearer than held-out images")
    flags = dict.fromkeys(
        figure["flag"]
        for results in found.values()
        for figure in (*results["figures"].values(), results["memorisation"])
    )
    parts = [f"{title} {first['features']}.\n", markdown_table(head, lines), *filter(None, flags)]
    return "\n".join(parts).strip() + "\n"


def save_plot(found: dict[Case, dict[str, Any]], path: Path) -> None:
    """Draws distances against evaluations: a row of panels for each data set, a line for each run and sampler."""
    sets: dict[str, list[Case]] = {}
    for case in found:
        sets.setdefault(read_object(case.run / "config.json")["data"]["data"], []).append(case)
    figure = Figure(figsize=(5 * len(DRAWN), 4 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), len(DRAWN), squeeze=False, sharey="col")
    for cases, row in zip(sets.values(), panels):
        for name, axes in zip(DRAWN, row):
            for line, points in lines_of(cases).items():
                figures = [found[case]["figures"][name] for case in points]
                values, errors = ([figure[key] for figure in figures] for key in ("value", "error"))
                axes.errorbar([case.evaluations for case in points], values, errors, marker=".", capsize=2, label=line)
            axes.set_xscale("log")
            axes.set_yscale("log")
            numbers = sorted({case.evaluations for case in found})  # Heun's lie beside the others'
            apart = [one for one, after in zip(numbers, [*numbers[1:], math.inf]) if after >= 1.2 * one]
            label_ticks(axes.xaxis, FixedLocator(apart))
            label_ticks(axes.yaxis, LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.set(xlabel="network evaluations", ylabel=name)
            axes.grid(alpha=0.3, which="both")
        row[0].legend(fontsize="small")
    save_figure(figure, path)


def lines_of(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """The cases of each line of the plot, by its name."""
    lines: dict[str, list[Case]] = {}
    for case in cases:
        lines.setdefault(f"{case.run.name}, {case.sampler}", []).append(case)
    return lines


if __name__ == "__main__":
    print(compare_samplers(tyro.cli(CompareSamplers, description=__doc__)))
