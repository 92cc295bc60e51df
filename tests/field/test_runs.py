"""What runs know of their data: few images, resuming, one cache for several projects, and what was held out."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_diffusion import cli
from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.commands.evaluate import evaluate
from unet_diffusion.commands.evaluate_generation import evaluate_generation
from unet_diffusion.commands.options.evaluate import Evaluate, EvaluationData
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration, RealData
from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_classifier import train_classifier
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.masked.unlabelled import load_unlabelled
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import load_images, place_of
from unet_diffusion.randomness import keyed_permutation
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig, SuperResolutionConfig
from unet_diffusion.training.config import TrainingConfig


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))


def training(steps: int = 2, held_out: float = 1, **options) -> TrainingConfig:
    """Without a share that is held out there is nothing to validate."""
    often = {"validate_every": 1} if held_out else {}
    return TrainingConfig(
        steps=steps, batch_size=2, warmup_steps=1, checkpoint_every=1, trackers=(), **often, **options
    )


def ddpm(data: object, output: str = "run", steps: int = 2, allow: bool = False, **options) -> TrainDDPM:
    return TrainDDPM(
        output=Path(output),
        model="network.json",
        data=DataConfig(data=str(data), cache_dir="cache", **options),
        diffusion=DiffusionConfig(preview_images=2),
        training=training(
            steps, not options.get("streaming") and options.get("validation_fraction", 1), allow_changed_data=allow
        ),
    )


def segmentation(steps: int = 2, output: str = "run", **options) -> TrainSegmentation:
    return TrainSegmentation(
        data=MaskedDataConfig(cache_dir="cache", **options),
        output=Path(output),
        model="network.json",
        augmentation=AugmentationConfig(elastic=1.0),
        training=training(steps, options.get("validation_fraction", 1)),
    )


def draw(folder: str, count: int, first: int = 0, size: int = 8) -> None:
    """Images that all differ."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(Path(folder, f"{number:03d}.png"))


def label(folder: str, masks: str) -> None:
    """Binary masks, of which a part of each image is the object."""
    Path(masks).mkdir(parents=True, exist_ok=True)
    for file in Path(folder).iterdir():
        mask = np.zeros(Image.open(file).size[::-1], np.uint8)
        mask[: 1 + len(mask) // 2] = 255
        Image.fromarray(mask).save(Path(masks, file.name))


def before_data_json(run: Path) -> None:
    """Makes a run one of a version that had neither the record nor the option that came with it."""
    (run / "data.json").unlink()
    config = json.loads((run / "config.json").read_text())
    del config["training"]["allow_changed_data"]
    (run / "config.json").write_text(json.dumps(config))


def held_out_names(data: str, **options) -> set[str]:
    files = sorted(path for path in Path(data).rglob("*.png"))
    sets = load_images(DataConfig(data=data, cache_dir="cache", **options))
    return {str(files[row].relative_to(data)) for row in sets.validation.rows} if sets.validation else set()


# few images


def test_one_image_trains_and_nothing_is_held_out(field, caplog):
    folder, right = field("one_two_or_three_pictures")
    for name, held_out in (("one", 0), ("three", 1)):
        sets = load_images(DataConfig(data=str(folder / name), cache_dir="cache"))
        assert len(sets.train) + held_out == right["pictures"][name]
        assert (0 if sets.validation is None else len(sets.validation)) == held_out
    assert "has one image, so nothing is held out, and the last weights are saved" in caplog.text
    assert (train_ddpm(ddpm(folder / "one")) / "samples.png").is_file()


@pytest.mark.parametrize("fraction", [0.1, 0.0])
def test_one_label_trains_and_the_card_says_that_nothing_was_held_out(field, fraction, caplog):
    folder, _ = field("one_two_or_three_pictures")
    data = {"data": str(folder / "images_1"), "masks": str(folder / "masks_1"), "validation_fraction": fraction}
    run = train_segmentation(segmentation(**data))
    card = (run / "README.md").read_text()
    assert "These are the last weights; nothing was held out." in card
    assert "Training images, their masks and the predictions; nothing was held out" in card
    assert (run / "masks.png").is_file() and (run / "previews" / "step-00000002.png").is_file()
    assert ("has one image" in caplog.text) == (fraction > 0)
    with pytest.raises(ValueError, match="held out no image; give data"):
        evaluate(Evaluate(run=run))
    options = segmentation(9, **data, output="patient")
    with pytest.raises(ValueError, match="patience is 2, but no image is held out"):
        train_segmentation(replace(options, segmentation=SegmentationConfig(patience=2)))


def test_of_two_labels_one_is_held_out(field):
    folder, _ = field("one_two_or_three_pictures")
    for fraction in (0.1, 0.9):
        config = MaskedDataConfig(
            data=str(folder / "images_2"),
            masks=str(folder / "masks_2"),
            validation_fraction=fraction,
            cache_dir="cache",
        )
        sets = load_masked(config)
        assert (len(sets.train), len(sets.validation)) == (1, 1)


@pytest.mark.parametrize("weights", [{"self_training_weight": 1.0}, {"denoising_weight": 0.5}])
def test_one_label_among_many_images_trains(field, weights):
    folder, _ = field("one_label_among_many_pictures")
    options = segmentation(data=str(folder / "labelled"), masks=str(folder / "masks"))
    run = train_segmentation(replace(options, joint=JointConfig(unlabelled=str(folder / "pictures"), **weights)))
    assert (run / "model_index.json").is_file()
    assert "nothing was held out" in (run / "README.md").read_text()


def test_one_label_of_a_folder_trains_by_max_labels(field):
    """Images without a mask are then images without labels, not broken ones."""
    folder, _ = field("one_label_among_many_pictures")
    options = segmentation(data=str(folder / "pictures"), masks=str(folder / "masks"), max_labels=1)
    run = train_segmentation(replace(options, joint=JointConfig(self_training_weight=1.0)))
    record = DataRecord.read(run)
    assert (len(record.trained), len(record.held_out)) == (1, 0)


def test_max_labels_are_trained_on_beside_those_held_out():
    draw("in", 40)
    label("in", "masks")
    config = MaskedDataConfig(data="in", masks="masks", validation_fraction=0.2, cache_dir="cache")
    everything, few = load_masked(config), load_masked(replace(config, max_labels=10))
    assert len(few.train) == 10
    assert few.train.rows.tolist() == everything.train.rows[:10].tolist()
    assert few.validation.rows.tolist() == everything.validation.rows.tolist()


def test_a_classifier_and_an_enlarger_train_without_held_out_images():
    for name in ("a", "b"):
        draw(f"in/{name}", 4, first=ord(name))
    classifier = TrainClassifier(
        output=Path("classifier"), data=DataConfig(data="in", validation_fraction=0.0), training=training(held_out=0)
    )
    run = train_classifier(classifier)
    assert "nothing was held out" in (run / "README.md").read_text() and (run / "hardest.png").is_file()
    assert DataRecord.read(run).class_names == ("a", "b")
    options = ddpm("in", "enlarger", validation_fraction=0.0)
    enlarger = replace(options, task="super-resolution", super_resolution=SuperResolutionConfig(scale=2))
    assert "Training images: small" in (train_ddpm(enlarger) / "README.md").read_text()


# what is held out


def test_an_image_is_held_out_by_its_content_alone():
    draw("in", 60)
    before = held_out_names("in", validation_fraction=0.2)
    assert len(before) == sum(place_of(name) < 0.2 for name in load_ids("in"))  # about 12, by the rule
    draw("in", 20, first=60)
    after = held_out_names("in", validation_fraction=0.2)
    assert after & {f"{number:03d}.png" for number in range(60)} == before  # adding images moves none
    Path("other").mkdir()
    for number, file in enumerate(sorted(Path("in").iterdir(), reverse=True)):  # other names, order and format
        Image.open(file).save(f"other/{number:03d}.png", compress_level=0)
    renamed = {f"{79 - int(name[:3]):03d}.png" for name in after}
    assert held_out_names("other", validation_fraction=0.2) == renamed


def load_ids(data: str) -> list[str]:
    sets = load_images(DataConfig(data=data, cache_dir="cache", validation_fraction=0.0))
    return sets.train.ids()


def test_images_that_are_all_equal_train_without_held_out_ones(caplog):
    draw("in", 1)
    shutil.copy("in/000.png", "in/001.png")
    sets = load_images(DataConfig(data="in", cache_dir="cache"))
    assert (len(sets.train), sets.validation) == (2, None)
    assert "all 2 images of in are equal, so nothing is held out" in caplog.text


def test_equal_images_are_on_one_side():
    draw("in", 12)
    for file in sorted(Path("in").iterdir()):
        shutil.copy(file, file.with_stem(f"copy-{file.stem}"))
    held_out = held_out_names("in", validation_fraction=0.3)
    assert {name for name in held_out if not name.startswith("copy")} == {
        name.removeprefix("copy-") for name in held_out if name.startswith("copy")
    }
    assert 0 < len(held_out) < 24


def test_images_of_a_group_are_on_one_side(caplog):
    for patient in range(8):
        draw(f"in/slides/{patient}", 3, first=3 * patient)
    held_out = held_out_names("in", validation_fraction=0.3, group_column="folder")
    groups = {name.rpartition("/")[0] for name in held_out}
    assert len(held_out) == 3 * len(groups)
    assert groups == {f"slides/{patient}" for patient in range(8) if place_of(f"slides/{patient}") < 0.3}

    label("in/slides/0", "masks/slides/0")
    label("in/slides/1", "masks/slides/1")
    config = MaskedDataConfig(data="in", masks="masks", group_column="folder", max_labels=9, cache_dir="cache")
    sets = load_masked(config)
    assert (len(sets.train), len(sets.validation)) == (3, 3)
    with pytest.raises(
        ValueError, match="all 3 .* belong to the group '.', so none can be held out; leave group_column"
    ):
        load_images(DataConfig(data="in/slides/0", group_column="folder", cache_dir="cache"))


def test_groups_of_a_column_of_text_or_numbers(tmp_path):
    from datasets import Array2D, Dataset, Features, Value

    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8))
    features = Features(image=Array2D((8, 8), "uint8"), mask=Array2D((8, 8), "uint8"), patient=Value("int64"))
    patients = [row // 3 for row in range(12)]
    rows = {"image": pixels, "mask": pixels % 2, "patient": patients}
    Dataset.from_dict(rows, features=features).save_to_disk("set")
    options = {"data": "set", "cache_dir": "cache", "group_column": "patient", "validation_fraction": 0.3}
    plain = load_images(DataConfig(image_column="image", **options))
    masked = load_masked(MaskedDataConfig(image_column="image", mask_column="mask", **options))
    for config in (
        DataConfig(image_column="image", **options),
        MaskedDataConfig(mask_column="mask", image_column="image", **options),
    ):
        lines = "\n".join(examine(config).summary.lines())
        assert "the images are grouped by patient: 4 groups of 3 images" in lines
        assert "about 30% of the groups are held out" in lines and "not used: patient" not in lines
    for sets in (plain, masked):
        held_out = {patients[row] for row in sets.validation.rows}
        assert len(sets.validation) == 3 * len(held_out)
        assert not held_out & {patients[row] for row in sets.train.rows}
    for column, message in (("absent", "no such column"), ("folder", "is not a folder of images; name a column")):
        with pytest.raises(ValueError, match=f"group_column is '{column}', but .*{message}"):
            load_images(DataConfig(image_column="image", **{**options, "group_column": column}))
    with pytest.raises(ValueError, match="group_column is 'mask', of type uint8, but must hold text, numbers or dates"):
        load_images(DataConfig(image_column="image", **{**options, "group_column": "mask"}))


def test_a_group_column_that_decides_nothing_is_refused():
    for options in ({"validation_fraction": 0.0}, {"validation_split": "test"}):
        with pytest.raises(ValueError, match="group_column is 'patient', but .*; leave group_column out"):
            DataConfig(group_column="patient", **options)


# resuming


@pytest.mark.parametrize("name", ["./in", "in/", "{here}/in", "~/in", "moved"])
def test_the_same_images_under_another_path_resume(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    draw("in", 6)
    train_ddpm(ddpm("in"))
    if name == "moved":
        Path("in").rename("moved")
    run = train_ddpm(ddpm(name.format(here=tmp_path), steps=3))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 3 and steps.count(2) <= 2  # it went on, rather than starting again


def test_changed_images_are_said_and_need_a_flag():
    draw("in", 30)
    options = {"validation_fraction": 0.2}
    run = train_ddpm(ddpm("in", **options))
    before = DataRecord.read(run)
    draw("in", 2, first=30)
    Path("in/000.png").unlink()
    with pytest.raises(ValueError, match="since the run in run was started: 2 images added, 1 removed; set allow_chan"):
        train_ddpm(ddpm("in", steps=3, **options))
    train_ddpm(ddpm("in", steps=3, allow=True, **options))
    after = DataRecord.read(run)
    assert set(before.held_out) <= set(after.held_out) and set(before.trained) <= set(after.trained)
    assert not set(after.held_out) & set(after.trained)
    assert len(after.held_out) + len(after.trained) == 32  # what is gone was still learnt from
    train_ddpm(ddpm("in", steps=4, **options))  # as it was at the last start
    Path("in").rename("moved")
    draw("in", 30, first=100)
    with pytest.raises(ValueError, match="in run was started: 30 images added, 32 removed"):
        train_ddpm(ddpm("in", steps=5, **options))
    with pytest.raises(ValueError, match="image_size is 4, but the run in run was started with None; use the same"):
        train_ddpm(ddpm("moved", steps=5, image_size=4, **options))


def test_the_only_image_held_out_stays_so_when_images_are_added():
    """The lowest hash is held out although it is above the share, until one below the share is added."""
    draw("in", 3)
    ids = load_ids("in")
    fraction = min(map(place_of, ids)) / 2
    run = train_ddpm(ddpm("in", validation_fraction=fraction))
    held_out = DataRecord.read(run).held_out
    assert held_out == (min(ids, key=place_of),)
    added = 100
    while True:
        draw("new", 1, first=added)
        if place_of(load_ids("new")[0]) < fraction:
            break
        added += 1
        shutil.rmtree("new")
    draw("in", 1, first=added)
    train_ddpm(ddpm("in", steps=3, allow=True, validation_fraction=fraction))
    assert set(DataRecord.read(run).held_out) == {*held_out, *load_ids("new")}


def test_changed_masks_are_noticed():
    draw("in", 6)
    label("in", "masks")
    options = {"data": "in", "masks": "masks"}
    train_segmentation(segmentation(**options))
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("masks/003.png")
    with pytest.raises(ValueError, match="the images are the same, but copies of them, masks, labels"):
        train_segmentation(segmentation(steps=3, **options))


def test_a_run_from_before_data_json_resumes_with_a_warning(caplog):
    draw("in", 6)
    run = train_ddpm(ddpm("in"))
    before_data_json(run)
    train_ddpm(ddpm("./in", steps=3))
    assert caplog.text.count("has no data.json") == 1
    caplog.clear()
    train_ddpm(ddpm("in", steps=4))
    assert "data.json" not in caplog.text


@pytest.mark.parametrize("kind", ["generation", "masks"])
def test_a_run_from_before_data_json_keeps_the_images_that_it_held_out(kind):
    """Its division, a permutation of the places of images, is not that by content."""
    draw("in", 20)
    label("in", "masks")
    chosen = np.sort(keyed_permutation(20, 0, "validation").numpy()[-4:])  # a fifth
    ids = load_images(DataConfig(data="in", cache_dir="cache", validation_fraction=0)).train.ids()
    for steps in (2, 3, 4):
        if kind == "generation":
            run = train_ddpm(ddpm("in", steps=steps, validation_fraction=0.2))
        else:
            run = train_segmentation(segmentation(steps, data="in", masks="masks", validation_fraction=0.2))
        if steps == 2:
            assert set(DataRecord.read(run).held_out) != {ids[row] for row in chosen}
            before_data_json(run)
        else:
            record = DataRecord.read(run)
            assert set(record.held_out) == {ids[row] for row in chosen}
            assert {*record.held_out, *record.trained} == set(ids)


def test_equal_images_on_both_sides_of_a_run_from_before_data_json_are_trained_on():
    draw("in", 19)
    first = keyed_permutation(20, 0, "validation").tolist()
    copied, copy = sorted((first[-1], first[0]))  # the last is held out, the first is not
    names = [f"{number:03d}.png" for number in range(20)]
    for number in range(18, copy - 1, -1):
        Path("in", names[number]).rename(Path("in", names[number + 1]))
    shutil.copy(Path("in", names[copied]), Path("in", names[copy]))
    run = train_ddpm(ddpm("in", validation_fraction=0.2))
    before_data_json(run)
    for steps in (3, 4):
        train_ddpm(ddpm("in", steps=steps, validation_fraction=0.2))
        record = DataRecord.read(run)
        assert len(record.held_out) == 3 and not {*record.held_out} & {*record.trained}


@pytest.mark.parametrize(
    "text", ['{"trained": 5}', '{"held_out": null}', '{"summary": "text"}', '{"fingerprint": 3}', '{"trained": [1]}']
)
def test_a_damaged_record_is_refused(text):
    Path("data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data.json has \w+ .*, which no run writes; get the file again."):
        DataRecord.read(Path())


def test_labels_of_a_resumed_run_are_those_that_it_learnt_from_though_files_are_renamed():
    draw("in", 12)
    label("in", "masks")
    options = {"data": "in", "masks": "masks", "validation_fraction": 0.3, "max_labels": 4}
    run = train_segmentation(segmentation(**options))
    trained = DataRecord.read(run).trained
    for folder in ("in", "masks"):
        for number in range(12):
            Path(folder, f"{number:03d}.png").rename(Path(folder, f"{'abcdefghijkl'[-number]}.png"))
    train_segmentation(segmentation(steps=3, **options))
    assert set(DataRecord.read(run).trained) == set(trained)


def test_a_run_that_has_lost_its_record_divides_the_images_as_before():
    draw("in", 20)
    run = train_ddpm(ddpm("in", validation_fraction=0.2))
    held_out = DataRecord.read(run).held_out
    (run / "data.json").unlink()
    train_ddpm(ddpm("in", steps=3, validation_fraction=0.2))
    assert DataRecord.read(run).held_out == held_out


def test_a_run_that_learns_classes_goes_on_with_the_same_ones():
    for name in ("a", "b"):
        draw(f"in/{name}", 4, first=ord(name))
    plain, options = ddpm("in", "plain", allow=True), ddpm("in", allow=True)
    options = replace(options, diffusion=DiffusionConfig(preview_images=2, class_conditional=True))
    train_ddpm(plain)
    assert DataRecord.read(train_ddpm(options)).class_names == ("a", "b")
    Path("in/a").rename("in/c")  # so that b would become the first class
    with pytest.raises(ValueError, match="class 0 of .* is 'b', but the run has learnt 'a', and the classes of a run"):
        train_ddpm(replace(options, training=training(3, allow_changed_data=True)))
    train_ddpm(replace(plain, training=training(3, allow_changed_data=True)))  # it has learnt no classes


def test_how_the_same_masks_are_found_may_change():
    draw("in", 12)
    label("in", "masks")
    run = train_segmentation(segmentation(data="in", masks="masks"))
    for mask in list(Path("masks").iterdir()):
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    train_segmentation(segmentation(steps=3, data="in", masks="masks", mask_suffix="_mask"))
    assert json.loads((run / "config.json").read_text())["data"]["mask_suffix"] == "_mask"
    next(iter(sorted(Path("masks").iterdir()))).unlink()
    with pytest.raises(ValueError, match="the data have changed since .*0 images added, 1 removed"):
        train_segmentation(segmentation(steps=4, data="in", masks="masks", mask_suffix="_mask", max_broken=0.2))


def test_a_stream_resumes_wherever_its_files_lie_but_not_with_others(tmp_path):
    draw("in", 6)
    options = {"streaming": True, "image_size": 8}
    train_ddpm(ddpm("in", **options))
    train_ddpm(ddpm(tmp_path / "in", steps=3, **options))
    Path("in").rename("moved")
    train_ddpm(ddpm("moved", steps=4, **options))
    draw("other", 5)
    changed = "data is 'other' instead of 'moved', the files of the stream have changed, or .*; set allow_changed_data"
    with pytest.raises(ValueError, match=changed):
        train_ddpm(ddpm("other", steps=5, **options))


# one cache


def test_projects_whose_files_have_equal_names_sizes_and_times_do_not_share_images(tmp_path, monkeypatch):
    for value, project in ((10, "a"), (200, "b")):
        folder = tmp_path / project / "data"
        folder.mkdir(parents=True)
        Image.new("L", (8, 8), value).save(folder / "0.bmp")
        os.utime(folder / "0.bmp", ns=(10**18, 10**18))
    values = []
    for project in ("a", "b"):
        monkeypatch.chdir(tmp_path / project)
        config = DataConfig(data="data", cache_dir=str(tmp_path / "cache"), validation_fraction=0.0)
        values.append(int(load_images(config).train[0]["image"].max()))
    assert values == [10, 200]


@pytest.mark.parametrize("glob", ["data/*.parquet", "data", "data/train.parquet"])
def test_tables_whose_files_have_equal_names_sizes_and_times_do_not_share_images(tmp_path, monkeypatch, glob):
    from datasets import Array2D, Dataset, Features

    values = []
    for value, project in ((10, "a"), (200, "b")):
        folder = tmp_path / project
        (folder / "data").mkdir(parents=True)
        monkeypatch.chdir(folder)
        rows = Dataset.from_dict({"image": [np.full((8, 8), value)]}, features=Features(image=Array2D((8, 8), "uint8")))
        rows.to_parquet("data/train.parquet")
        os.utime("data/train.parquet", ns=(10**18, 10**18))
        config = DataConfig(data=glob, image_column="image", cache_dir=str(tmp_path / "cache"), validation_fraction=0.0)
        values.append(int(load_images(config).train[0]["image"].max()))
    assert values == [10, 200]
    # the same path again, rewritten with equal size and time
    shutil.copyfile(tmp_path / "a" / "data" / "train.parquet", "data/train.parquet")
    os.utime("data/train.parquet", ns=(10**18, 10**18))
    assert int(load_images(config).train[0]["image"].max()) == 10


def test_tables_of_paths_follow_the_files_that_they_name(tmp_path):
    import pyarrow
    from pyarrow import parquet

    Image.new("L", (8, 8), 10).save("0.bmp")
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = pyarrow.array([{"bytes": None, "path": str(tmp_path / "0.bmp")}], kind)
    parquet.write_table(pyarrow.table({"image": images}), "set.parquet")
    config = DataConfig(data="set.parquet", image_column="image", cache_dir="cache", validation_fraction=0.0)
    assert load_images(config).train[0]["image"].max() == 10
    state = os.stat("0.bmp")
    Image.new("L", (8, 8), 200).save("0.bmp")
    os.utime("0.bmp", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert load_images(config).train[0]["image"].max() == 200


# measuring


def test_evaluate_scores_the_images_that_the_run_held_out_and_counts_those_it_learnt_from(caplog, capsys):
    draw("in", 12)
    label("in", "masks")
    run = train_segmentation(segmentation(data="in", masks="masks", validation_fraction=0.3))
    record = DataRecord.read(run)
    count, trained = len(record.held_out), len(record.trained)
    cli.run("evaluate", ["--run", str(run)])
    text = capsys.readouterr().out
    assert f"The {count} images that the run held out." in text
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["count"], written["held_out"], written["trained_on"]) == (count, True, 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(row["mean_iou"] for row in rows if "mean_iou" in row)
    assert written["masks"]["pooled"]["mean_iou"] == pytest.approx(best, abs=1e-6)

    shutil.copytree("in", "elsewhere")  # other paths, the same content
    text = evaluate(
        Evaluate(MaskedOptions(data="elsewhere", masks="masks", cache_dir="cache"), run=run, output=Path("all"))
    )
    assert f"{trained} of the 12 images were trained on" in text and "held out" not in text
    assert f"{trained} of the 12 images were trained on" in caplog.text
    assert json.loads(Path("all/evaluation.json").read_text())["trained_on"] == trained

    (run / "data.json").unlink()
    with pytest.raises(ValueError, match="data is not given, and run has no data.json"):
        evaluate(Evaluate(run=run, overwrite=True))
    with pytest.raises(ValueError, match="split is 'test', but data is not given"):
        EvaluationData(split="test")


@pytest.mark.slow
def test_evaluate_generation_compares_with_the_images_of_the_run():
    draw("in", 160)
    run = train_ddpm(ddpm("in", validation_fraction=0.2))
    record = DataRecord.read(run)
    options = EvaluateGeneration(run=run, count=64, steps=1)
    evaluate_generation(options)
    found = json.loads((run / "generation.json").read_text())["memorisation"]
    assert (found["training_count"], found["held_out_count"]) == (len(record.trained), len(record.held_out))

    config = RealData(data="in", cache_dir="cache", validation_fraction=0.5)  # holds out more than the run did
    theirs = load_images(DataConfig(data="in", cache_dir="cache", validation_fraction=0.5)).validation
    text = evaluate_generation(replace(options, data=config, output=Path("other.json")))
    found = json.loads(Path("other.json").read_text())["memorisation"]
    assert found["held_out_count"] == len(record.held_out)
    assert f"on {len(theirs) - len(record.held_out)} of the {len(theirs)} images that these data hold out" in text


@pytest.mark.slow
def test_a_run_that_also_learnt_masks_is_compared_with_all_images_that_it_did_not_hold_out():
    draw("in", 90)
    draw("labelled", 20)
    label("labelled", "masks")
    options = segmentation(data="in", masks="masks", max_labels=10, validation_fraction=0.2)
    run = train_segmentation(replace(options, joint=JointConfig(denoising_weight=0.5)))
    record = DataRecord.read(run)
    evaluate_generation(EvaluateGeneration(run=run, count=64, steps=1))
    found = json.loads((run / "generation.json").read_text())["memorisation"]
    assert (len(record.trained), found["held_out_count"]) == (10, len(record.held_out))
    assert found["training_count"] == 90 - len(record.held_out)
    (run / "config.json").write_text((run / "config.json").read_text().replace('"masks": "masks"', '"masks": null'))
    (run / "config.json").write_text(
        (run / "config.json").read_text().replace('"mask_suffix": null', '"mask_suffix": "x"')
    )
    with pytest.raises(ValueError, match="lie beside their masks; give data"):
        evaluate_generation(EvaluateGeneration(run=run, count=64, steps=1, overwrite=True))


@pytest.mark.slow
def test_images_that_were_learnt_from_without_masks_are_not_new(caplog):
    draw("in", 20)
    draw("pool", 80, first=10)
    label("in", "masks")
    label("pool", "masks_of_pool")
    options = segmentation(data="in", masks="masks", validation_fraction=0.2)
    run = train_segmentation(replace(options, joint=JointConfig(unlabelled="pool", denoising_weight=0.5)))
    record = DataRecord.read(run)
    common = len({*record.held_out} & {*load_ids("pool")})
    assert len(record.unlabelled) == 80 - common

    generation = EvaluateGeneration(run=run, count=64, steps=1)
    evaluate_generation(generation)  # its images are those that the noise head learnt from
    found = json.loads((run / "generation.json").read_text())["memorisation"]
    assert (found["training_count"], found["held_out_count"]) == (80 - common, len(record.held_out))

    pool = RealData(data="pool", cache_dir="cache", validation_fraction=0.2)
    evaluate_generation(replace(generation, data=pool, output=Path("pool.json")))
    found = json.loads(Path("pool.json").read_text())["memorisation"]
    assert (found["held_out_count"] or 0) <= common

    masked = MaskedOptions(data="pool", masks="masks_of_pool", cache_dir="cache")
    text = evaluate(Evaluate(masked, run=run, output=Path("scores")))
    both = len({*record.trained} & {*load_ids("pool")})
    expected = f"{both} of the 80 images were trained on, and {80 - common - both} more were learnt from without their"
    assert expected in text and expected in caplog.text


def test_unlabelled_images_of_held_out_groups_are_not_learnt_from(caplog):
    for patient in range(8):
        draw(f"in/{patient}", 2, first=2 * patient)
        draw(f"pool/{patient + 4}", 3, first=100 + 3 * patient)
    for folder in sorted(Path("in").iterdir()):
        label(str(folder), f"masks/{folder.name}")
    draw("flat", 5, first=200)
    config = MaskedDataConfig(
        data="in", masks="masks", group_column="folder", cache_dir="cache", validation_fraction=0.3
    )
    data = load_masked(config)
    groups = data.validation.cache.images.groups
    held_out = {groups[row] for row in data.validation.rows}
    draw("pool/copy", 2, first=300)
    shutil.copy(next(Path("in", min(held_out)).iterdir()), "pool/copy")  # so that this group is a held-out one too
    images = load_unlabelled("pool", config, data).train
    assert {images.cache.groups[row] for row in images.rows} == {str(each) for each in range(4, 12)} - held_out
    assert held_out & {"4", "5", "6", "7"} and not caplog.text
    load_unlabelled("flat", config, data)
    assert "no group of unlabelled images of flat, by group_column 'folder', is one of the images with" in caplog.text
