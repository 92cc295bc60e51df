r"""Compares several ways to learn from few labels by their mean IoU on the test images.

All methods have the same labelled images (the first rows of `train.parquet`), steps or processor time, squares,
augmentation of these, optimizer, and validation images, which choose the best weights. All learn from masks by
cross-entropy, and "unimatch", as its authors, also by Dice. `test.parquet` is scored once. Noise predictors learn from
all images of `train.parquet`, and from no others.

    OMP_NUM_THREADS=1 python -m scripts.experiments.label_efficiency --data shared/data \
        --output runs/label-efficiency --sets wbc

Writes `label_efficiency.json`, a list of all runs, and `label_efficiency.md` and `label_efficiency.png` for the runs of
the given options. The same command resumes a stopped experiment. Several commands can share a results file.
"""

import tyro

from scripts.experiments.label_efficiency.experiment import LabelEfficiency, Run
from scripts.experiments.label_efficiency.summary import add_row, read_rows, row_of, save_plot, summary
from scripts.experiments.label_efficiency.training import train_and_test
from unet_diffusion.files import remove_at_once, write_text


def label_efficiency(options: LabelEfficiency) -> str:
    """Trains and tests the runs that are not in the results, and returns the tables, which are written after each."""
    assert options.results is not None
    runs = options.runs()
    for run in runs:
        if row_of(read_rows(options.results), run) is None:
            add_row(options.results, train_and_test(options, run))
            checkpoints = options.output / run.folder / "checkpoints"
            if checkpoints.exists():  # nnU-Net has none
                remove_at_once(checkpoints)  # the weights are kept
            write_summary(options, runs)
    return write_summary(options, runs)


def write_summary(options: LabelEfficiency, runs: list[Run]) -> str:
    """Writes the tables and the plot of the finished runs and returns the tables."""
    assert options.results is not None
    kept = read_rows(options.results)
    rows = [row for run in runs if (row := row_of(kept, run)) is not None]
    text = summary(rows)
    write_text(options.output / "label_efficiency.md", text)
    save_plot(rows, options.output / "label_efficiency.png")
    return text


if __name__ == "__main__":
    print(label_efficiency(tyro.cli(LabelEfficiency, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))))
