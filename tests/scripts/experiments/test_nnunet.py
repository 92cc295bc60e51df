"""nnU-Net as a method with few labels: what its worker gets, its row, and, where it is installed, the worker itself."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from skimage.io import imread

from scripts.experiments.exchange import load_arrays
from scripts.experiments.label_efficiency import __main__ as script
from scripts.experiments.label_efficiency import nnunet_worker
from scripts.experiments.workers import WORK, NotRun
from tests.support.blobs import blobs
from unet_diffusion.segmentation.metrics import SegmentationMetrics

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from scripts.experiments.exchange import load_arrays, save_arrays, save_json
from scripts.experiments.label_efficiency import nnunet_worker

assert not {{"torch", "unet_diffusion", "nnunetv2"}} & {{*sys.modules}}
folder = Path(sys.argv[-1])
train, validation, test = (load_arrays(folder / f"{{part}}.npz") for part in ("train", "validation", "test"))
assert [*test] == ["images"] and [*train] == [*validation] == ["images", "masks"]
save_arrays(folder / "found.npz", masks=[(image[..., 0] > 100).astype(np.uint8) for image in test["images"]])
save_arrays(folder / "seen.npz", **train)
report = {{"validation_mean_iou": 0.5, "steps": 7, "best_step": 6, "seconds": 1.5, "parameters": 9, "more": [1]}}
save_json(folder / "report.json", report)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    (folder / "squares").mkdir()
    for name, count in (("train", 4), ("validation", 2), ("test", 3)):
        blobs(folder / "squares", name, count)
    return folder


@pytest.fixture
def options(data, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    return script.LabelEfficiency(
        data,
        tmp_path / "out",
        sets=("squares",),
        methods=("nnunet",),
        labels=(2,),
        seeds=(0,),
        steps=7,
        nnunet_python=python,
        nnunet_patch=32,
        nnunet_features=4,
    )


def test_the_method_without_its_python_is_refused(data, tmp_path):
    message = "nnunet_python is {}, but the method nnunet needs .*; give --nnunet-python, or leave nnunet out"
    for python in (None, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=message.format(python)):
            script.LabelEfficiency(data, tmp_path, sets=("squares",), methods=("nnunet",), nnunet_python=python)


def test_only_its_name_asks_for_the_method(data, tmp_path):
    for python in (None, Path(sys.executable)):
        options = script.LabelEfficiency(data, tmp_path, sets=("squares",), nnunet_python=python)
        assert "nnunet" not in options.methods


def test_a_run_reads_what_the_method_uses(options):
    (run,) = options.runs()
    sizes = ({"nnunet_patch": 40}, {"nnunet_batch": 3}, {"nnunet_features": 8})
    for values in ({"steps": 8}, {"minutes": 1.0}, {"inverted_sets": ("squares",)}, *sizes):
        (other,) = replace(options, **values).runs()
        assert other.config != run.config
    for values in (
        {"learning_rate": 1e-2},
        {"crop_size": 40},
        {"batch_size": 3},
        {"patience": 2},
        {"validate_every": 9},
    ):
        (other,) = replace(options, **values).runs()
        assert other.config == run.config


def test_the_masks_of_the_worker_are_scored_like_those_of_other_methods(options, monkeypatch):
    text = script.label_efficiency(options)
    (row,) = json.loads(options.results.read_text())
    (run,) = options.runs()
    assert row == {
        **{"data": "squares", "method": "nnunet", "labels": 2, "draw": 0, "seed": 0},
        **{"mean_iou": 1.0, "images": [1.0] * 3, "pretraining_seconds": 0.0},
        **{"validation_mean_iou": 0.5, "steps": 7, "best_step": 6, "seconds": 1.5, "parameters": 9},
        "config": run.config,
    }
    assert "| nnunet | 1.000 |" in text
    monkeypatch.setattr(script, "train_and_test", None)
    assert script.label_efficiency(options) == text


@pytest.mark.parametrize("inverted", [False, True])
def test_the_worker_gets_the_labelled_images_and_inverted_copies_of_them(options, inverted):
    options = replace(options, draws=(3,), inverted_sets=("squares",) if inverted else ())
    (run,) = options.runs()
    script.train_and_test(options, run)
    seen = load_arrays(options.output / run.folder / WORK / "seen.npz")
    rows = load_dataset("parquet", data_files=str(options.drawn("squares", 3)), split="train")
    images, masks = ([np.asarray(rows[index][name]) for index in range(2)] for name in ("image", "mask"))
    copies = [255 - image for image in images] if inverted else []
    assert np.array_equal(seen["images"], images + copies) and np.array_equal(seen["masks"], masks * (1 + inverted))


def test_the_worker_gets_steps_or_seconds(options):
    for minutes, expected in ((None, (7, None)), (0.5, (None, 30))):
        options = replace(options, minutes=minutes)
        (run,) = options.runs()
        script.train_and_test(options, run)
        values = json.loads((options.output / run.folder / WORK / "options.json").read_text())
        assert (values["steps"], values["seconds"]) == expected
        assert (values["features"], values["patch"], values["batch_size"]) == (4, 32, 2)


def test_a_worker_that_fails_ends_the_command(options):
    options.nnunet_python.write_text("#!/bin/sh\necho 'no such module'\nexit 3\n")
    with pytest.raises(NotRun, match="code 3: no such module"):
        script.label_efficiency(options)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(12, 5, [2, 4, 7, 9, 12]), (3, 50, [1, 2, 3])])
def test_epochs_add_up_to_the_steps(steps, epochs, expected):
    assert nnunet_worker.ends_of_epochs(steps, epochs) == expected


def test_its_validation_score_is_that_of_the_library():
    random = np.random.default_rng(0)
    found, true = random.integers(0, 3, (2, 4, 20, 30))  # class 3 occurs nowhere
    true[0, :5] = 255
    metrics = SegmentationMetrics(4)
    metrics.update(torch.from_numpy(found), torch.from_numpy(true))
    score = nnunet_worker.mean_iou([*found], [*true], 4)
    assert score == pytest.approx(metrics.compute()["pooled/mean_iou"])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_masks_are_written_in_its_layout(tmp_path, channels):
    shape = (5, 6) if channels == 1 else (5, 6, 3)
    images = [np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) + index for index in range(3)]
    masks = [np.full((5, 6), label, dtype=np.uint8) for label in (0, 1, 255)]
    part = {"images": images[:2], "masks": masks[:2]}
    nnunet_worker.write_dataset(tmp_path, {"train": part, "validation": {"images": images[2:], "masks": masks[2:]}}, 2)
    raw, prepared = (tmp_path / name / nnunet_worker.DATASET for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    description = json.loads((raw / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "class 1": 1, "ignore": 2}
    assert len(description["channel_names"]) == channels and description["numTraining"] == 3
    (split,) = json.loads((prepared / "splits_final.json").read_text())
    assert split == {"train": ["train000000", "train000001"], "val": ["validation000000"]}
    for name, image, label in zip([*split["train"], *split["val"]], images, (0, 1, 2)):
        assert np.array_equal(imread(raw / "imagesTr" / f"{name}_0000.png"), image)
        assert (imread(raw / "labelsTr" / f"{name}.png") == label).all()


@pytest.mark.slow
def test_nnunet_itself_learns_squares(options):
    """With `python -m pytest` of an environment that has nnU-Net."""
    pytest.importorskip("nnunetv2", reason="nnU-Net 2 is not installed in this environment")
    options = replace(options, nnunet_python=Path(sys.executable), steps=60)
    (run,) = options.runs()
    row = script.train_and_test(options, run)
    assert row["steps"] == 60 and 0 < row["best_step"] <= 60 and row["seconds"] > 0
    report = json.loads((options.output / run.folder / WORK / "report.json").read_text())
    assert (report["plan"]["patch_size"], report["plan"]["batch_size"]) == ([32, 32], 2)
    assert report["plan"]["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16, 32]
    assert row["mean_iou"] > 0.6
