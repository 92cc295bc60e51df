"""Folders, metadata, tables and labels as people have them: what is taken for images, masks and classes."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.sample import sample
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.data.columns import class_names
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.data.masked.sources import open_masked_source
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.sources import open_with_notes
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.config import TrainingConfig

datasets.disable_progress_bars()


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


@pytest.fixture
def options(tmp_path, cache) -> TrainDDPM:
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    training = TrainingConfig(steps=2, batch_size=4, validate_every=2, checkpoint_every=2, trackers=())
    diffusion = DiffusionConfig(class_conditional=True)
    return TrainDDPM(tmp_path / "run", str(network), DataConfig(cache_dir=cache), diffusion, training)


def share_of_objects(sets: MaskedSets) -> float:
    masks = [part[i]["mask"].numpy().ravel() for part in (sets.train, sets.validation) for i in range(len(part))]
    return float((np.concatenate(masks) == 1).mean())


def mean_greys(source: Path, cache: str) -> dict[str, float]:
    train = load_images(DataConfig(data=str(source), validation_fraction=0, cache_dir=cache)).train
    items = [train[i] for i in range(len(train))]
    return {
        name: float(np.mean([item["image"].numpy().mean() for item in items if item["label"] == label]))
        for label, name in enumerate(train.class_names)
    }


# folders


def test_files_that_are_not_read_are_counted(field):
    folder, right = field("folder_mostly_of_formats_not_read")
    opened = open_with_notes(folder / "phone")
    assert len(opened.rows) == right["read"]
    assert opened.notes == (f"{right['left_out']} files were left out: {right['left_out']} .heic",)
    for kind in ("dicom", "npz"):
        with pytest.raises(ValueError, match=r"no image that can be read, only 40 \.(dcm|npz)\. Convert them to PNG"):
            open_with_notes(folder / kind)


@pytest.mark.parametrize("home", ["pictures", "classes"])
def test_runs_among_the_images_are_no_data(field, home):
    folder, right = field("twelve_pictures_for_a_growing_folder")
    finished, stopped = folder / home / "runs" / "a", folder / home / "stopped"
    for run in (finished / "samples", stopped / "checkpoints", stopped / "previews"):
        run.mkdir(parents=True)
        Image.new("L", (90, 90)).save(run / "00000.png")
    (finished / "model_index.json").write_text("{}")
    opened = open_with_notes(folder / home)
    assert len(opened.rows) == right["pictures"]
    assert class_names(opened.rows) == (("flowers",) if home == "classes" else None)
    assert opened.notes[0] == "images of runs were left out, in runs/a, stopped"
    assert len(open_with_notes(finished / "samples").rows) == 1
    for run in (finished, finished.parent):
        with pytest.raises(ValueError, match="of a run|those of runs"):
            open_with_notes(run)


def test_a_class_is_named_by_its_folder_not_by_its_place(field, options, tmp_path):
    folder, right = field("class_folders_named_by_numbers")
    assert {name: round(grey) for name, grey in mean_greys(folder, options.data.cache_dir).items()} == right[
        "mean_grey"
    ]
    options.data = replace(options.data, data=str(folder))
    run = train_ddpm(options)
    output = sample(Sample(run, count=3, steps=1, class_labels=("1", "2", "10"), output=tmp_path / "samples"))
    assert len(list(output.glob("0*.png"))) == 3
    with pytest.raises(ValueError, match="class_labels is '0', but the classes are 1, 10, 2"):
        sample(Sample(run, count=1, steps=1, class_labels=("0",), output=tmp_path / "none"))


def test_names_of_classes_for_a_network_without_any_are_refused_with_the_fix(field, options):
    folder, _ = field("parquet_with_plain_labels")
    options.data = replace(options.data, data=str(folder / "strings.parquet"), label_column="label")
    options.diffusion = DiffusionConfig()
    run = train_ddpm(options)
    for label in ("owl", "0"):
        with pytest.raises(ValueError, match="the network has no classes.*Leave them out, or train.*class_conditional"):
            sample(Sample(run, count=1, steps=1, class_labels=(label,)))


# metadata


def test_metadata_name_masks(field, cache):
    folder, right = field("imagefolder_with_metadata")
    sets = load_masked(MaskedDataConfig(data=str(folder / "masks"), cache_dir=cache))
    assert share_of_objects(sets) == pytest.approx(right["shares"][1], abs=5e-5)
    opened = open_with_notes(folder / "masks")
    assert len(opened.rows) == right["rows"] and class_names(opened.rows) is None
    assert "columns that are not used: mask" in opened.notes


@pytest.mark.parametrize("name", ["train", "Train"])
def test_metadata_of_a_split_name_masks(tmp_path, cache, name):
    for split in (name, "Test"):
        (tmp_path / split).mkdir()
        for file in ("1.png", "mask.png"):
            Image.new("L", (4, 4)).save(tmp_path / split / file)
        (tmp_path / split / "metadata.csv").write_text("file_name,mask_file_name\n1.png,mask.png\n")
    for split in ("train", "test"):
        assert set(open_masked_source(tmp_path, split, cache_dir=cache).rows.features) == {"image", "mask"}


@pytest.mark.parametrize("kind", ["labels_jsonl", "labels_csv"])
def test_metadata_name_labels_as_datasets_reads_them(field, kind, cache):
    folder, right = field("imagefolder_with_metadata")
    opened = open_with_notes(folder / kind)
    assert len(opened.rows) == right["rows"]
    assert class_names(opened.rows) == tuple(right["class_names"])
    assert opened.notes[-1] == "the classes are in the column label: healthy (6 images), ill (6)"
    others = datasets.load_dataset("imagefolder", data_dir=str(folder / kind), split="train", cache_dir=cache)
    others = others.cast_column("image", datasets.Image(decode=False))
    theirs = {Path(row["image"]["path"]).name: row["label"] for row in others}
    ours = {Path(row["image"]["path"]).name: right["class_names"][row["label"]] for row in opened.rows}
    assert ours == theirs


# tables


def test_plain_labels_are_classes_with_their_own_names(field, options):
    folder, right = field("parquet_with_plain_labels")
    for name, values in right["classes"].items():
        greys = mean_greys(folder / f"{name}.parquet", options.data.cache_dir)
        assert list(greys) == [str(value) for value in values]
        assert list(greys.values()) == pytest.approx(right["mean_grey"], abs=2)
    options.data = replace(options.data, data=str(folder / "gaps.parquet"))
    run = train_ddpm(options)
    with pytest.raises(ValueError, match="class_labels is '5', but the classes are 3, 7, 11"):
        sample(Sample(run, count=1, steps=1, class_labels=("5",)))


def test_plain_labels_while_streaming_are_said_to_be_unknown(field, options):
    folder, _ = field("parquet_with_plain_labels")
    source = folder / "gaps.parquet"
    opened = open_with_notes(source, streaming=True, cache_dir=options.data.cache_dir)
    assert opened.notes == (
        "the column label is not taken for labels: it holds int64, whose classes are not known before all rows are "
        "read; leave out streaming",
    )
    options.data = replace(options.data, data=str(source), streaming=True, image_size=16)
    with pytest.raises(ValueError, match="while streaming only a label column of type ClassLabel"):
        train_ddpm(options)
    options.data = replace(options.data, label_column="label")
    with pytest.raises(ValueError, match="label_column is 'label', but it holds int64.*leave out streaming"):
        train_ddpm(options)


@pytest.mark.parametrize("name", ["pixel_values", "annotation"])
def test_two_columns_of_images_are_an_image_and_its_mask(field, name, cache):
    folder, right = field("parquet_with_two_picture_columns")
    source = str(folder / f"{name}.parquet")
    sets = load_masked(MaskedDataConfig(data=source, cache_dir=cache))
    assert share_of_objects(sets) == pytest.approx(right["shares"][1], abs=5e-5)
    opened = open_with_notes(source, cache_dir=cache)
    assert len(opened.rows) == right["rows"]
    assert f"columns that are not used: {'label' if name == 'pixel_values' else 'annotation'}" in opened.notes


def test_labels_and_masks_of_webdataset_files_are_found(field, cache):
    folder, right = field("webdataset_shards")
    for kind in ("cls", "json"):
        opened = open_with_notes(folder / kind / "train-0000.tar", cache_dir=cache)
        assert class_names(opened.rows) == ("0", "1", "2")
        assert np.bincount(opened.rows["label"][:]).tolist() == [right["samples"] // 3] * 3
        stream = open_with_notes(folder / kind / "train-0000.tar", streaming=True, cache_dir=cache)
        assert "leave out streaming" in stream.notes[-1]
    stated = open_with_notes(folder / "json" / "train-0000.tar", label_column="json.label", cache_dir=cache)
    assert class_names(stated.rows) == ("0", "1", "2")
    with pytest.raises(ValueError, match="label_column is 'json', but it holds dict.*such as 'json.label'"):
        open_with_notes(folder / "json" / "train-0000.tar", label_column="json", cache_dir=cache)
    with pytest.raises(ValueError, match=r"label_column is 'json.kind', but .* has no such column. Columns: .*json"):
        open_with_notes(folder / "json" / "train-0000.tar", label_column="json.kind", cache_dir=cache)
    sets = load_masked(MaskedDataConfig(data=str(folder / "seg" / "train-0000.tar"), cache_dir=cache))
    assert share_of_objects(sets) == pytest.approx(right["shares"][1], abs=5e-5)
