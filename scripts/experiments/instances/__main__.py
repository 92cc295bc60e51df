r"""Compares ways to find objects: ours with and without maps of objects, StarDist 2D and Cellpose 3.

All methods have the same labelled images (the first rows of `train.parquet`), squares, processor time of training on
one thread, and about as many parameters. Each starts from untrained weights, has the augmentation, learning rate and
normalisation of its authors, and chooses weights and thresholds on `validation.parquet`. `test.parquet` is used once.

    OMP_NUM_THREADS=1 python -m scripts.experiments.instances --data shared/data/dsb2018 --output runs/instances \
        --stardist-python stardist/bin/python --cellpose-python cellpose/bin/python

A peer works in a Python of its own; without one it is reported as not run. Writes a `case.json` for each case, and
`instances.md`, `instances.json` and, with `--worst`, `worst-SET-LABELS.png` for the cases of the given options. The
same command resumes a stopped comparison; a peer that was stopped before its end starts again.
"""

import json
from typing import Any

import torch
import tyro

from scripts.experiments.exchange import FOUND, load_arrays, save_arrays
from scripts.experiments.instances.experiment import CASE, PEERS, Case, Instances, labelled
from scripts.experiments.instances.ours import run_ours
from scripts.experiments.instances.peers import run_peer
from scripts.experiments.instances.summary import Row, summary, worst_figure
from scripts.experiments.workers import NotRun
from scripts.reports import circumstances
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.evaluation.mask_scores import score_masks
from unet_diffusion.files import write_json, write_text
from unet_diffusion.images.figures import save_image

NAMES = {"stardist": "StarDist 2D", "cellpose": "Cellpose 3"}


def compare(options: Instances) -> str:
    """Runs the cases that are not finished, and returns the table, which is written after each."""
    torch.set_num_threads(1)
    cases, left_out = options.cases(), []
    for case in cases:
        path = options.output / case.folder / CASE
        if not path.is_file():
            try:
                write_json(path, run(options, case))
            except NotRun as reason:
                left_out.append((case.data, NAMES[case.method], case.labels, str(reason)))
            write_summary(options, cases, left_out)
    return write_summary(options, cases, left_out)


def run(options: Instances, case: Case) -> Row:
    """Trains and tests a case, keeps the objects it found, and returns its row.

    Raises:
        NotRun: a peer cannot be run.
    """
    test = labelled(options, case.data, "test")
    if case.method in PEERS:
        facts, objects, seconds = run_peer(options, case, test)
        found = {NAMES[case.method]: (objects, seconds)}
    else:
        facts, found = run_ours(options, case, test)
    folder = options.output / case.folder
    save_arrays(folder / FOUND, **{way: objects for way, (objects, _) in found.items()})
    ways = {
        way: {"predict_seconds": seconds, "scores": scores_of(objects, test)}
        for way, (objects, seconds) in found.items()
    }
    names = ("data", "method", "labels", "seed", "config")
    return {**{name: getattr(case, name) for name in names}, **facts, "ways": ways, "circumstances": circumstances()}


def scores_of(objects: list[Any], test: MaskedDataset) -> dict[str, Any]:
    """Scores objects (H, W) of all test images by the library's own matching."""
    following = iter(objects)

    def predict(image: torch.Tensor) -> tuple[torch.Tensor, Any]:
        found = next(following)
        return torch.from_numpy(found > 0).long(), found

    return score_masks(predict, test).to_dict()


def write_summary(options: Instances, cases: list[Case], left_out: list[tuple[str, str, int, str]]) -> str:
    """Writes the table, the rows and the figures of the finished cases, and returns the table."""
    paths = [options.output / case.folder / CASE for case in cases]
    finished = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in paths if path.is_file()]
    text = summary([row for row, _ in finished], left_out)
    write_text(options.output / "instances.md", text)
    write_json(options.output / "instances.json", [row for row, _ in finished])
    groups = dict.fromkeys((row["data"], row["labels"]) for row, _ in finished) if options.worst else ()
    for name, count in groups:
        ways: dict[str, Any] = {}
        for row, folder in finished:
            if (row["data"], row["labels"]) == (name, count):
                objects = load_arrays(folder / FOUND)
                for way, values in row["ways"].items():  # of several seeds the first
                    precision = [image["object_ap_50"] for image in values["scores"]["images"]]
                    ways.setdefault(way, (objects[way], precision))
        figure = worst_figure(labelled(options, name, "test"), ways, options.worst)
        save_image(figure, options.output / f"worst-{name}-{count}.png")
    return text


if __name__ == "__main__":
    print(compare(tyro.cli(Instances, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))))
