"""Ways to find objects: ours end to end on drawn disks, the exchange with a peer's environment, and the arithmetic."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from scripts.experiments import exchange
from scripts.experiments.instances import __main__ as script
from scripts.experiments.instances import cellpose_worker, stardist_worker, summary
from scripts.experiments.instances.experiment import labelled, source
from scripts.experiments.instances.ours import COMPONENTS, MAPS, TURNED, WATERSHED, least_area, ways_of
from scripts.experiments.pace import steps_within
from scripts.experiments.workers import WORK, NotRun
from unet_diffusion import UNet
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.training import run_folder

TINY = {"channels": [8, 16], "attention": [False, False]}
STAND_IN = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from scripts.experiments.instances import cellpose_worker, stardist_worker
from scripts.experiments.exchange import load_arrays, save_arrays, save_json

assert not {{"torch", "unet_diffusion", "stardist", "cellpose"}} & {{*sys.modules}}
assert sys.argv[1:3] == ["-m", "scripts.experiments.instances.stardist_worker"]
folder = Path(sys.argv[-1])
options, train, test = json.loads((folder / "options.json").read_text()), *(
    load_arrays(folder / name) for name in ("train.npz", "test.npz")
)
assert list(test) == ["images"]
save_arrays(folder / "found.npz", instances=[(image > 100).astype(np.int32) for image in test["images"]])
facts = {{"parameters": 7, "steps": len(train["images"]), "batch_size": 4, "seconds": options["seconds"]}}
save_json(folder / "report.json", {{**facts, "seed": options["seed"], "predict_seconds": 0.5}})
"""


def disks(folder, name: str, count: int) -> None:
    """Dark images of two bright disks that touch, and one that is alone; the first image is of another modality."""
    random = np.random.default_rng(len(name))
    rows, columns = np.mgrid[:48, :48]
    table: dict[str, list] = {"image": [], "mask": [], "instances": [], "modality": []}
    for index in range(count):
        instances = np.zeros((48, 48), dtype=np.uint8)
        for label, (y, x) in enumerate(((14, 14), (14, 28), (36, 30)), start=1):
            instances[(rows - y) ** 2 + (columns - x) ** 2 < 50] = label
        grey = (random.integers(0, 60, (48, 48)) + 150 * (instances > 0)).astype(np.uint8)
        table["image"].append(np.repeat(grey[:, :, None], 3, axis=2))
        table["mask"].append((instances > 0).astype(np.uint8))
        table["instances"].append(instances)
        table["modality"].append("fluorescence" if index else "color")
    kinds = {key: Value("string") if key == "modality" else ImageFeature() for key in table}
    Dataset.from_dict(table, features=Features(kinds)).to_parquet(folder / f"{name}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    for name, count in (("train", 4), ("validation", 3), ("test", 3)):
        disks(folder, name, count)
    return folder


@pytest.fixture
def options(data, tmp_path):
    network = tmp_path / "network.json"
    network.write_text(json.dumps(TINY))
    return script.Instances(
        data,
        tmp_path / "out",
        sets=("fluorescence",),
        labels=(2,),
        minutes=1e-6,
        crop_size=32,
        batch_size=2,
        validations=1,
        network=network,
        worst=1,
    )


@pytest.mark.slow
def test_our_ways_are_trained_and_scored_once_and_peers_that_are_missing_are_named(options, monkeypatch):
    text = script.compare(options)
    rows = json.loads((options.output / "instances.json").read_text())
    assert [(row["method"], row["labels"], [*row["ways"]]) for row in rows] == [
        ("ours", 2, [MAPS, TURNED]),
        ("ours-masks", 2, [COMPONENTS, WATERSHED]),
    ]
    for row in rows:
        assert row["steps"] == 1 and row["seconds"] > 0 and row["masks_seconds"] > 0
        for way in row["ways"].values():
            scores = way["scores"]
            assert len(scores["images"]) == 2 and scores["pooled"]["object_count_error"] is not None
    for peer in ("stardist", "cellpose"):
        assert f"not run: no --{peer}-python" in text
    with Image.open(options.output / "worst-fluorescence-2.png") as figure:
        assert figure.width > 6 * 2 * 48  # the image, the truth and four ways
    monkeypatch.setattr(script, "run_ours", None)
    assert script.compare(options) == text


def test_the_least_area_is_that_of_the_labelled_objects_for_masks_too(options):
    train = labelled(options, "fluorescence", "train")
    first = np.bincount(np.asarray(train.cache.instances[train.rows[0]]).ravel())[1:]
    assert least_area(train, 1) == max(1, int(0.1 * np.median(first[first > 0])))
    pipe = SegmentationPipeline(UNet(in_channels=1, out_channels=None, channels=[4, 8], num_classes=2, head_channels=4))
    image = train[0]["image"].numpy()
    for method in ("ours-masks", "ours"):
        for way, find in ways_of(pipe, method, 10**6)[1].items():
            assert find(image).any() == (way in (MAPS, TURNED))  # which takes what its network has learnt: nothing here


def test_a_peer_works_in_its_own_python_and_gets_no_instance_map_of_the_test(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options.methods, options.stardist_python = ("stardist",), Path("python")  # the worker starts in another folder
    options.stardist_python.write_text(STAND_IN.format(python=sys.executable))
    options.stardist_python.chmod(0o755)
    text = script.compare(options)
    (row,) = json.loads((options.output / "instances.json").read_text())
    assert (row["steps"], row["seconds"], row["seed"]) == (2, pytest.approx(6e-5), 0)
    pooled = row["ways"]["StarDist 2D"]["scores"]["pooled"]
    # of three disks it found one object, the two that touch and the third together
    assert pooled["object_ap_50"] == 0 and pooled["object_count_error"] == pytest.approx(2 / 3)
    assert "StarDist 2D" in text and "not run" not in text


def test_what_a_peer_has_found_is_kept_until_its_options_change(options, tmp_path):
    options.methods, options.stardist_python = ("stardist",), tmp_path / "python"
    options.stardist_python.write_text(STAND_IN.format(python=sys.executable))
    options.stardist_python.chmod(0o755)
    (case,) = options.cases()
    row = script.run(options, case)  # stopped before it has a case.json
    options.stardist_python.write_text("#!/bin/sh\nexit 3\n")
    assert script.run(options, case)["ways"] == row["ways"]
    path = options.output / case.folder / WORK / "options.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 9}))
    with pytest.raises(NotRun, match="code 3"):
        script.run(options, case)
    assert not (path.parent / "report.json").exists()


def test_a_peer_of_another_command_is_left_alone(options, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "WORKERS_END", 0.1)
    options.methods, options.stardist_python = ("stardist",), Path(sys.executable)
    (case,) = options.cases()
    work = options.output / case.folder / WORK
    work.mkdir(parents=True)
    (work / "snapshot").touch()
    with run_folder.only_run_in(work.parent), pytest.raises(RuntimeError, match="another process is training in"):
        script.run(options, case)
    assert (work / "snapshot").exists()


@pytest.mark.slow
def test_a_worker_ends_with_the_command_that_started_it(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $$ > aside; mv aside pid\nexec sleep 60\n")
    python.chmod(0o755)
    program = "import sys; from pathlib import Path; from scripts.experiments.workers import run_worker\n"
    program += "run_worker(Path(sys.argv[1]), 'worker', Path(sys.argv[2]))"
    command = [sys.executable, "-c", program, str(python), str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3]) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_peer_that_fails_is_not_run_and_its_last_words_are_shown(options, tmp_path):
    options.methods, options.cellpose_python = ("cellpose",), tmp_path / "python"
    options.cellpose_python.write_text("#!/bin/sh\necho first\necho 'no such module'\nexit 3\n")
    options.cellpose_python.chmod(0o755)
    (case,) = options.cases()
    with pytest.raises(NotRun, match=r"code 3: no such module \(.*log.txt\)"):
        script.run(options, case)
    options.cellpose_python = tmp_path / "nothing"
    assert f"not run: there is no {tmp_path / 'nothing'}" in script.compare(options)


def test_a_subset_has_the_rows_of_its_modality_with_one_channel(options):
    assert len(labelled(options, "fluorescence", "train")) == 3
    assert labelled(options, "fluorescence", "test").channels == 1
    assert labelled(options, "all", "test").channels == 3 and len(labelled(options, "all", "test")) == 3
    with pytest.raises(ValueError, match="sets names 'brightfield'.*no such row"):
        source(options, "brightfield", "train")


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_nothing_is_taken_over_from_other_files_under_the_same_path(options, tmp_path, part):
    options.data = Path(shutil.copytree(options.data, tmp_path / "disks"))
    before = [case.folder for case in options.cases()]
    assert len(labelled(options, "fluorescence", part)) < 5
    disks(options.data, part, 6)
    assert not {*before} & {case.folder for case in options.cases()}
    assert len(labelled(options, "fluorescence", part)) == 5


def test_ours_in_another_precision_is_another_case(options, monkeypatch):
    cases = {}
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        cases[precision] = {case.method: case.folder for case in options.cases()}
    differing = {method for method in cases["no"] if cases["no"][method] != cases["bf16"][method]}
    assert differing == {"ours", "ours-masks"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("omnipose",)}, "methods is 'omnipose'"),
        ({"labels": (0,)}, "labels is 0"),
        ({"crop_size": 40}, "crop_size is 40, but must be a multiple of 16"),
        ({"minutes": 0}, "minutes is 0"),
        ({"seeds": (1, 1)}, "each once"),
        ({"worst": -1}, "worst is -1"),
    ],
)
def test_wrong_options_are_refused(data, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        script.Instances(data, tmp_path, **values)


def test_more_labels_than_images_are_refused(options):
    options.labels = (9,)
    with pytest.raises(ValueError, match="fluorescence has 3 training images"):
        options.cases()


def test_arrays_of_several_sizes_come_back_in_order(tmp_path):
    arrays = [np.full((index % 3 + 1, 2), index, dtype=np.uint8) for index in range(12)]
    exchange.save_arrays(tmp_path / "some.npz", images=arrays, one_more=[np.ones(3)])
    found = exchange.load_arrays(tmp_path / "some.npz")
    assert [*found] == ["images", "one_more"] and [each.tolist() for each in found["images"]] == [
        each.tolist() for each in arrays
    ]


def test_steps_follow_from_the_median_of_the_later_ones():
    assert steps_within(60, [9] * 10 + [0.5, 0.5, 2]) == 60
    assert steps_within(0.1, [9]) == 1


def test_images_and_instances_of_stardist_are_turned_alike():
    instances = np.arange(12).reshape(3, 4)
    np.random.seed(0)
    for _ in range(8):
        image, turned = stardist_worker.augmented(1000.0 * instances, instances)
        slope, shift = np.polyfit(turned.ravel(), image.ravel(), 1)
        assert 600 <= slope <= 2000 and abs(shift) < 1
        assert np.abs(image - slope * turned - shift).max() < 0.2  # noise of a deviation of at most 0.02


@pytest.mark.parametrize(("steps", "expected"), [(4000, (40, 100)), (200, (20, 10)), (3, (1, 3))])
def test_epochs_of_stardist(steps, expected):
    assert stardist_worker.schedule(steps) == expected


@pytest.mark.parametrize(("steps", "expected"), [(1600, (320, 40)), (600, (600, 8)), (8, (8, 8))])
def test_epochs_of_cellpose(steps, expected):
    assert cellpose_worker.schedule(steps) == expected


def test_the_size_model_of_cellpose_finds_diameters_that_follow_from_styles():
    random = np.random.default_rng(0)
    styles, weights = 100 * random.normal(size=(200, 3)), np.array([0.001, -0.002, 0.003])
    diameters = 17 * np.exp(styles @ weights)
    fit = cellpose_worker.size_parameters(styles, diameters, 17.0)
    estimated = np.exp(fit["A"] @ (styles - fit["smean"]).T + np.log(fit["diam_mean"]) + fit["ymean"])  # as SizeModel
    assert estimated == pytest.approx(diameters, rel=1e-3)


def test_precision_is_pooled_over_images():
    hits, false, missed = np.array([[3, 1], [1, 1]]), np.array([[1, 3], [0, 0]]), np.array([[0, 2], [0, 0]])
    assert cellpose_worker.pooled_precision(hits, false, missed) == pytest.approx((4 / 5 + 2 / 7) / 2)


def test_images_of_cellpose_have_their_channels_first():
    assert cellpose_worker.channels_first(np.ones((4, 5), np.uint8)).sum(axis=(1, 2)).tolist() == [20, 0]
    assert cellpose_worker.channels_first(np.zeros((4, 5, 3), np.uint8)).shape == (3, 4, 5)


def test_the_worst_images_have_the_lowest_precision_over_the_ways():
    ways = {"a": ([], [0.9, 0.2, None, 0.5]), "b": ([], [0.1, 0.4, None, 0.9])}
    assert summary.worst_images(ways, 2) == [1, 0]
    assert summary.worst_images(ways, 9) == [1, 0, 3]


def test_outlines_are_drawn_around_each_object():
    objects = np.zeros((10, 12), dtype=int)
    objects[2:6, 2:6], objects[2:6, 6:10] = 1, 2
    shown = np.asarray(summary.panel(np.zeros((10, 12, 1), np.uint8), objects, "two"))
    line = (shown == summary.LINE).all(axis=2)[-20:]  # below the caption, twice as large
    assert line.sum() == 2 * (8 * 8 - 6 * 6)
