"""What the subfolders and files of a folder are taken for, and what is asked."""

from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from unet_diffusion.data.columns import class_names
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_sources, is_hub_name
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.sources import open_source, open_with_notes

datasets.disable_progress_bars()


def fill(folder: Path, names: str) -> Path:
    """Writes files, named in one text; those that end in .png are images."""
    for position, name in enumerate(names.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            Image.new("L", (4, 4), position).save(path, "PNG")
        else:
            path.write_text("x")
    return folder


@pytest.mark.parametrize(
    ("names", "split", "count", "classes"),
    [
        ("train/1.png truck/1.png car/1.png", "train", 3, ("car", "train", "truck")),
        ("train/1.png truck/1.png test/1.png", "test", 1, None),
        ("Train/a/1.png Train/b/1.png Test/1.png", "train", 2, ("a", "b")),
        ("Train/1.png Test/1.png", "test", 1, None),
        ("train/1.png notes/1.txt", "train", 1, None),
        ("cells/1.png other/1.png other/2.png", "other", 2, None),
        ("mask/1.png no_mask/1.png", "train", 2, ("mask", "no_mask")),
        ("labels/1.png", "train", 1, ("labels",)),
        ("images/1.png", "train", 1, None),
        ("flowers/1.png", "train", 1, ("flowers",)),
        ("cat/1.png dog/1.png 3.png", "train", 3, None),
        ("cat/1.png 1_mask.png", "train", 2, None),
    ],
)
def test_subfolders_are_splits_or_classes(tmp_path, names, split, count, classes):
    rows = open_source(fill(tmp_path, names), split)
    assert (len(rows), class_names(rows)) == (count, classes)


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ("train/1.png", "test", "split is 'test', but .* has the subfolders train"),
        ("train/1.png valid/1.png", "validation", "has the subfolders train, valid"),
        ("train/1.png test/1.png cat/1.png", "train", r"Are test and train splits\? .* give label_column 'label'"),
        ("images/1.png masks/1.png", "train", r"/masks looks like .*Give data \S*/images, .* masks \S*/masks"),
        ("train/1.png train_masks/1.png", "train", "/train_masks looks like masks of .*/train. Give data"),
        (
            "JPEGImages/1.png SegmentationClass/1.png SegmentationObject/1.png",
            "train",
            "/SegmentationClass looks like masks .*/JPEGImages",
        ),
        ("imagesTr/1.png labelsTr/1.png", "train", "/labelsTr looks like masks .*/imagesTr"),
        ("train/images/1.png train/masks/1.png", "train", r"Give data \S*/train/images"),
        ("1.png 2.png masks/1.png masks/2.png", "train", "/masks looks like .* Move masks out of that folder"),
        ("zip/images/1.png zip/masks/1.png", "train", r"Give data \S*/zip/images, and for segmentation also masks"),
        (
            "a/images/1.png a/masks/1.png b/images/1.png b/masks/1.png",
            "train",
            "Copy the images into a folder of their",
        ),
        ("cat/1.png cat/mask/1.png dog/1.png", "train", "/cat/mask looks like .* Move mask out"),
        ("1.png 1_mask.png 2.png 2_mask.png", "train", "2 of 4 images look like .* give mask_suffix '_mask'"),
        (
            "old/train/1.png old/test/1.png",
            "train",
            r"splits test, train lie in its subfolder old, .*give data \S*/old",
        ),
        (
            "test_images/1.png train_images/1.png",
            "train",
            r"test_images and train_images look like splits, .* Give data \S*/train_images\. If they are classes",
        ),
        ("test1/1.png train/1.png", "train", r"test1 and train look like splits, .* Give data \S*/train\."),
        ("imagesTr/1.png imagesTs/1.png", "train", r"look like splits, .* Give data \S*/imagesTr"),
        ("1.dcm 2.DCM", "train", r"only 2 \.dcm\. Convert them to PNG"),
        ("train/1.parquet test/1.parquet", "train", r"only 2 \.parquet\. To read tables, give data \S*/\*\.parquet"),
        ("images.zip", "train", r"only 1 \.zip\. Unpack"),
        ("train-images-idx3-ubyte.gz", "train", r"only 1 \.gz\. Convert them .* or, in Python, give DataConfig"),
        ("digits.npz", "train", r"only 1 \.npz\. Convert them .* or, in Python, give DataConfig"),
    ],
)
def test_what_is_likely_wrong_is_asked(tmp_path, names, split, message):
    with pytest.raises(ValueError, match=message):
        open_source(fill(tmp_path, names), split)


def test_a_cache_inside_the_data_is_no_data(tmp_path):
    options = {"cache_dir": str(tmp_path), "validation_fraction": 0}
    fill(tmp_path, "1.png 2.png 3.png")
    assert [len(load_images(DataConfig(data=str(tmp_path), **options)).train) for _ in range(2)] == [3, 3]
    assert any((tmp_path / "unet_diffusion").rglob("*.npy")) and len(open_source(tmp_path)) == 3
    named_so = fill(tmp_path / "set", "unet_diffusion/1.png unet_diffusion/2.png")
    assert len(open_source(named_so)) == 2


def test_a_stated_label_column_says_that_subfolders_are_classes(tmp_path):
    for names in (("images", "masks"), ("test_images", "train_images")):
        folder = fill(tmp_path / names[0], " ".join(f"{name}/1.png" for name in names))
        assert class_names(open_source(folder, label_column="label")) == names


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        ("1.png Thumbs.db desktop.ini .DS_Store .hidden", ()),
        ("1.png a.HEIC b.heic README", ("3 files were left out: 2 .heic, 1 without an ending",)),
        (
            "1.png labels.csv",
            (
                "1 file was left out: 1 .csv",
                "to take labels or masks from a table, call it metadata.csv or .jsonl and its paths file_name",
            ),
        ),
        ("a/1.png b/1.png", ("the subfolders are the classes: a (1 image), b (1)",)),
        (
            "a/x/1.png a/y/2.png",
            (
                "only the first level of subfolders are classes, not these below: a/x, a/y; to take them for the "
                "classes, give the folder a as data",
                "the subfolders are the classes: a (2 images)",
            ),
        ),
        ("train/1.png test/1.png test/a.txt", ("the split is the subfolder train; other subfolders: test",)),
        (
            "train/1.png 2.png 3.png",
            ("the split is the subfolder train", "images beside the folders of the splits were left out: 2"),
        ),
        (
            "a/1.png 2.png",
            ("subfolders are not taken for classes, since not all images are in one: 1 image outside of a",),
        ),
    ],
)
def test_notes_say_what_was_understood(tmp_path, names, notes):
    assert open_with_notes(fill(tmp_path, names)).notes == notes


def parquet(folder: Path, labels: list, kind: Value | None = None, name: str = "train.parquet") -> Path:
    """A folder with one Parquet file of images and a column `label`."""
    images = fill(folder / "images", " ".join(f"{i}.png" for i in range(len(labels))))
    cells = [{"bytes": (images / f"{i}.png").read_bytes(), "path": None} for i in range(len(labels))]
    columns = {"image": cells, "label": labels}
    features = Features({"image": datasets.Image(), "label": kind or Value("int64")})
    (folder / "table").mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / "table" / name))
    return folder / "table"


@pytest.mark.parametrize(
    ("labels", "kind", "classes", "indices"),
    [
        ([10, 2, -1, None, 10], "int64", ("2", "10"), [1, 0, -1, -1, 1]),
        (["b", " -1 ", "-1", "a"], "string", ("a", "b"), [1, -1, -1, 0]),
        (["b", "", None, "a"], "string", ("a", "b"), [1, -1, -1, 0]),
        ([True, False, True], "bool", ("False", "True"), [1, 0, 1]),
        ([3, 3], "uint8", ("3",), [0, 0]),
        ([2.0, None, float("nan"), 10.0, -1.0], "float64", ("2", "10"), [0, -1, -1, 1, -1]),
        ([None, None], "int64", None, None),
        ([0.5, 1.0], "float32", None, None),
        ([1.0, float("inf")], "float64", None, None),
        (list(range(20)), "int64", None, None),
        ([f"caption {i}" for i in range(9)], "string", None, None),
    ],
)
def test_plain_labels(tmp_path, labels, kind, classes, indices):
    table = parquet(tmp_path, labels, Value(kind))
    opened = open_with_notes(table, cache_dir=tmp_path / "cache")
    assert class_names(opened.rows) == classes
    if classes is not None:
        assert opened.rows["label"][:] == indices
        unlabelled = indices.count(-1)
        assert opened.notes[-1].endswith(f" image{'s' * (unlabelled > 1)} without a label") == (unlabelled > 0)
        assert f"; {unlabelled} image" in opened.notes[-1] or not unlabelled
        return
    assert opened.notes[-1].startswith("the column label is not taken for labels: ")
    if len(labels) > 2:  # like names of the rows, but they may be used
        assert len(class_names(open_source(table, label_column="label", cache_dir=tmp_path / "cache"))) == len(labels)
    else:
        with pytest.raises(ValueError, match="label_column is 'label', but it holds"):
            open_source(table, label_column="label", cache_dir=tmp_path / "cache")


def test_tables_beside_images_and_other_tables(tmp_path):
    table = parquet(tmp_path, [1, 2], name="TRAIN.PARQUET")
    assert len(open_source(table, cache_dir=tmp_path / "cache")) == 2
    fill(table, "logo.png")
    opened = open_with_notes(table, cache_dir=tmp_path / "cache")
    assert (len(opened.rows), opened.notes[0]) == (2, "left out beside the .PARQUET files: 1 image")
    fill(table, "1.png")
    with pytest.raises(
        ValueError, match=r"holds .PARQUET files and 2 images, .*Give a glob such as \S*/\*.PARQUET, or"
    ):
        open_source(table)
    (table / "a.tar").touch()
    with pytest.raises(ValueError, match="holds .PARQUET files and .tar files and 2 images"):
        open_source(table)


@pytest.mark.parametrize(
    "names",
    [
        "images/1.png images/2.png masks/1.png masks/2.png",
        "train/1.png test/1.png",
        "a/1.png b/1.png run/samples/1.png",
    ],
)
@pytest.mark.parametrize("table", ["notes.parquet", "data/notes.parquet", "original.tar"])
def test_a_table_among_folders_of_images_is_asked_about(tmp_path, names, table):
    (fill(tmp_path, f"{names} run/model_index.json") / "data").mkdir()
    Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / table)
    count = len([name for name in names.split() if not name.startswith("run")])
    with pytest.raises(ValueError, match=rf"holds \{Path(table).suffix} files and {count} images, so it is not clear"):
        open_source(tmp_path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("others", ["a.csv b.csv", "a.txt b.txt sub/c.json", "train.csv test.csv", "prev/1.png"])
def test_files_of_other_types_are_not_taken_for_the_data(tmp_path, others):
    table = fill(parquet(tmp_path, [1, 2], name="cells.parquet"), others)
    assert open_source(table, cache_dir=tmp_path / "cache")["label"] == [0, 1]
    parquet(tmp_path, [1, 2, 3], name="test.parquet")
    assert len(open_source(table, "test", cache_dir=tmp_path / "cache")) == 3


METADATA = "1.png 2.png sub/3.png"


@pytest.mark.parametrize(
    ("name", "text", "classes", "count"),
    [
        ("metadata.jsonl", '{"file_name": "1.png", "label": 7}\n{"file_name": "sub/3.png", "label": 5}', ("5", "7"), 2),
        ("metadata.csv", "file_name,label\n1.png,cat\n2.png,\nsub/3.png,dog\n", ("cat", "dog"), 3),
        ("metadata.csv", "file_name,text\n1.png,cat\n", None, 1),
        ("metadata.csv", "file_name,label\n1.png,01\n2.png,1\nsub/3.png,\n", ("01", "1"), 3),
        ("metadata.csv", "file_name; label\r\n1.png; a\r\n2.png;a \r\nsub/3.png;b", ("a", "b"), 3),
        ("metadata.csv", "file_name\tlabel\n1.png\ta, b\n2.png\tc\n", ("a, b", "c"), 2),
        ("metadata.csv", "file_name,label\n1.png, 2\n2.png,1\nsub/3.png,0\n", ("0", "1", "2"), 3),
        ("metadata.csv", "file_name,label\n1.png,1.0\n2.png,1\nsub/3.png,\n", ("1",), 3),
        ("sub/metadata.csv", "file_name,label\n3.png,cat\n", None, 3),
    ],
)
def test_metadata(tmp_path, name, text, classes, count):
    (fill(tmp_path, METADATA) / name).write_text(text)
    opened = open_with_notes(tmp_path)
    assert (len(opened.rows), class_names(opened.rows)) == (count, classes)
    left_out = {1: "2", 2: "1", 3: None}[count]
    expected = [f"images that {name} does not name were left out: {left_out}"] if left_out else []
    assert [note for note in opened.notes if "does not name" in note] == expected
    assert any("is not read" in note for note in opened.notes) == name.startswith("sub")
    before = open_source(tmp_path)._fingerprint
    assert before == opened.rows._fingerprint
    fill(tmp_path, "2.png 1.png sub/3.png")
    assert open_source(tmp_path)._fingerprint != before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"name": "1.png"}', "has no column file_name.* its columns are name"),
        ("metadata.jsonl", '{"file_name": "9.png"}', r"names 1 file that cannot be found: \S*/9.png"),
        ("metadata.jsonl", '{"file_name": 3}', "file_name in row 0 .* is 3, but must be the path"),
        ("metadata.jsonl", "no JSON", "metadata.jsonl cannot be read"),
        ("metadata.parquet", "no Parquet", "metadata.parquet cannot be read"),
        ("metadata.csv", "file_name,label\n1.png,cat\n,dog\n", "file_name in row 1 of .* is empty"),
        ("metadata.csv", "file_name\n", "names no image"),
        ("metadata.csv", "file_name,label, label\n1.png,a,a\n", "has several columns label, but each must have its"),
        ("metadata.csv", "file_name,image\n1.png,x\n", "a column image beside the one of files of that name"),
    ],
)
def test_wrong_metadata(tmp_path, name, text, message):
    (fill(tmp_path, METADATA) / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


def test_subfolders_beside_metadata_are_mentioned(tmp_path):
    folder = fill(tmp_path, "cat/1.png dog/1.png")
    (folder / "metadata.csv").write_text("file_name,text\ncat/1.png,one\ndog/1.png,two\n")
    note = "the subfolders are not taken for classes beside metadata.csv; add a column label"
    assert note in open_with_notes(folder).notes
    (folder / "metadata.csv").write_text("file_name,label\ncat/1.png,one\ndog/1.png,two\n")
    assert note not in open_with_notes(folder).notes
    (folder / "metadata.csv").write_bytes("file_name,label\ncat/1.png,Käse\n".encode("latin-1"))
    with pytest.raises(ValueError, match="metadata.csv cannot be read: its text is not UTF-8; save it as UTF-8"):
        open_with_notes(folder)


@pytest.mark.parametrize(
    "cells",
    [
        "2024-01-01 2024-01-02 2024-01-01",
        "12:30 12:31 12:30",
        "1.10 1.1 1.10",
        "1.5 2.5 1.5",
        "12345678901234567890123 12345678901234567890124 12345678901234567890123",
    ],
)
def test_groups_in_a_csv_file_are_as_written(tmp_path, cells):
    folder = fill(tmp_path, METADATA)
    rows = "\n".join(map(",".join, zip(METADATA.split(), cells.split())))
    (folder / "metadata.csv").write_text(f"file_name,label\n{rows}\n")
    opened = open_with_notes(folder, group_column="label")
    assert opened.rows["group"] == cells.split()
    if cells.startswith("1234"):
        assert class_names(opened.rows) == tuple(cells.split()[:2])


def test_metadata_above_the_splits_and_twice(tmp_path):
    fill(tmp_path, "train/1.png test/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.png,cat\ntest/2.png,dog\n")
    assert class_names(open_source(tmp_path)) == ("cat",)
    assert class_names(open_source(tmp_path, "test")) == ("dog",)
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="has metadata.csv and metadata.jsonl; keep one of them"):
        open_source(tmp_path)


def test_a_misspelt_folder_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "here/images/1.png"))
    assert is_hub_name("there/images") and not is_hub_name("here/image")
    with pytest.raises(ValueError, match="data is 'here/image': there is no such file or folder"):
        check_sources(DataConfig(data="here/image"))


def test_validation_images_have_classes_by_their_names(tmp_path):
    train, other, unknown = (
        parquet(tmp_path / name, labels) for name, labels in (("a", [3, 7, 11]), ("b", [11, 7]), ("c", [7, 9]))
    )
    config = DataConfig(data=str(train), validation_data=str(other), cache_dir=str(tmp_path / "cache"))
    assert load_images(config).validation.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match="have classes that are not trained on: 9"):
        load_images(replace(config, validation_data=str(unknown)))


def test_class_folders_called_like_splits_are_classes_if_the_user_says_so(tmp_path):
    rows = open_source(fill(tmp_path, "train/1.png valid/1.png car/1.png"), label_column="label")
    assert (len(rows), class_names(rows)) == (3, ("car", "train", "valid"))
