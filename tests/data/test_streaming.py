"""A stream is the same for any number of processes, resumes exactly, mixes classes, and survives broken images."""

import io
import itertools
import shutil
import tarfile
from dataclasses import asdict
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from torch.utils.data import DataLoader

from unet_diffusion.data import shuffled_rows
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.shuffled_rows import BufferedRows, IndexedRows, RowsOfGroups
from unet_diffusion.data.tables import RowGroups
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_permutation
from unet_diffusion.training.run_folder import claim

datasets.disable_progress_bars()

KINDS = ("arrow", "parquet", "tar")  # read by index, by row groups, and in their order through a buffer


def png(value: int) -> dict:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6), value, dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{value}.png"}


def write(folder, images, kind="arrow", sizes=None, labels=None) -> str:
    """Writes images, each with the label 0 or 1 in turn unless others are given, as files of these sizes."""
    labels = [i % 2 for i in range(len(images))] if labels is None else labels
    names = ["even", "odd", *map(str, range(2, max(labels) + 1))]
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=names)})
    rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
    ends = np.cumsum(sizes or [len(images)]).tolist()
    for file, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        part = rows.select(range(first, end))
        if kind == "arrow":
            part.save_to_disk(folder / f"{file}")
        elif kind == "parquet":
            part.to_parquet(folder / f"{file}.parquet", batch_size=4)
        else:
            tar(folder / f"{file}.tar", images[first:end], first)
    return str(folder / {"arrow": "*/*.arrow", "parquet": "*.parquet", "tar": "*.tar"}[kind])


def tar(path, images, first):
    with tarfile.open(path, "w") as file:
        for number, image in enumerate(images, start=first):
            info = tarfile.TarInfo(f"{number:04d}.png")
            info.size = len(image["bytes"])
            file.addfile(info, io.BytesIO(image["bytes"]))


def stream(source, process_index=0, num_processes=1, seed=0, **options):
    buffer = {"shuffle_buffer": 5} if str(source).endswith((".tar", ".parquet")) else {}  # the others have an index
    config = DataConfig(data=source, streaming=True, image_size=4, **{**buffer, **options})
    return load_images(config, seed, process_index, num_processes).train


def numbers(images, count) -> list[int]:
    return [int(item["image"].max()) for item in islice(images, count)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(20,), pytest.param((2, 5, 13), marks=pytest.mark.slow)])  # of the files
def test_processes_see_disjoint_images_and_together_all(tmp_path, kind, sizes):
    """Also where files hold unequal numbers of rows and an epoch ends within a batch."""
    source = write(tmp_path, [png(value) for value in range(20)], kind, sizes)
    whole = numbers(stream(source), 48)
    for start in (0, 20):
        assert sorted(whole[start : start + 20]) == list(range(20))
    assert whole[:20] != whole[20:40]  # the second epoch has another order
    assert numbers(stream(source, seed=1), 48) != whole
    for processes, batch_size in ((2, 4), (4, 2), (2, 2), (3, 1)):
        parts = []
        for rank in range(processes):
            part = stream(source, rank, processes)
            part.batch_size = batch_size
            parts.append(iter(part))
        together = []
        while len(together) < 48:
            for part in parts:
                together += numbers(part, batch_size)
        assert together[:48] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_has_the_same_substitute_in_every_process(tmp_path, kind):
    images = [png(value) for value in range(12)]
    images[4] = images[5] = {"bytes": b"", "path": "broken.png"}
    source, options = write(tmp_path, images, kind), {"crop_size": 4, "flip": True, "max_broken": 0.1}
    whole = [item["image"] for item in islice(stream(source, **options), 30)]
    parts = [iter(stream(source, rank, 3, **options)) for rank in range(3)]
    for place, image in enumerate(whole):
        assert torch.equal(next(parts[place % 3])["image"], image)


@pytest.mark.parametrize(
    ("kind", "workers"), [*((kind, workers) for kind in KINDS for workers in (0, 1)), ("arrow", 2), ("parquet", 2)]
)
def test_resuming_equals_the_undisturbed_stream_with_worker_processes_or_without(tmp_path, kind, workers):
    images = [png(value) for value in range(12)]
    images[4] = {"bytes": b"", "path": "four.png"}  # another image takes its place
    source = write(tmp_path, images, kind, (5, 7))
    options = {"crop_size": 4, "flip": True, "max_broken": 0.1}

    def seen(start: int, batches: int, workers: int = 0) -> list[tuple[int, int]]:
        streamed = stream(source, num_workers=workers, **options)
        streamed.start, streamed.batch_size = start, 3
        loader = DataLoader(streamed, batch_size=3, collate_fn=to_batch, num_workers=workers)
        pairs = (zip(batch["image"].amax((1, 2, 3)).tolist(), batch["label"].tolist()) for batch in loader)
        return [pair for batch in islice(pairs, batches) for pair in batch]

    undisturbed = seen(0, batches=16)
    assert {image for image, _ in undisturbed} == {*range(12)} - {4}
    assert kind == "tar" or all(label == image % 2 for image, label in undisturbed)
    for start in (3, 27):
        assert seen(start, 6, workers) == undisturbed[start : start + 18]


def test_cuts_are_resumed_too(tmp_path):
    ramp = io.BytesIO()
    np.save(ramp, np.tile(np.arange(30, dtype=np.uint8), (4, 1)))
    source = write(tmp_path, [{"bytes": ramp.getvalue(), "path": None}] * 6)
    undisturbed = [item["image"] for item in islice(stream(source, crop_size=4, flip=True), 20)]
    assert len({int(image.min()) for image in undisturbed}) > 5
    resumed = stream(source, crop_size=4, flip=True)
    resumed.start = 8
    assert all(torch.equal(a["image"], b) for a, b in zip(resumed, undisturbed[8:]))


# order


def mean_classes(images, batches: int, batch_size: int) -> float:
    labels = [item["label"] for item in islice(images, batches * batch_size)]
    return np.mean([len({*labels[first : first + batch_size]}) for first in range(0, len(labels), batch_size)])


@pytest.mark.parametrize("kind", ["folder", "arrow", "parquet"])
def test_sorted_classes_are_mixed_from_the_first_batch(tmp_path, kind):
    """A batch drawn from all rows holds 10 (1 - 0.9^16) = 8.1 of 10 classes; the buffer holds two of them."""
    labels = np.repeat(range(10), 40).tolist()
    if kind == "folder":
        for number, label in enumerate(labels):
            (tmp_path / f"{label}").mkdir(exist_ok=True)
            (tmp_path / f"{label}" / f"{number}.png").write_bytes(png(label)["bytes"])
        source = str(tmp_path)
    else:
        source = write(tmp_path, [png(label) for label in labels], kind, labels=labels)
    images = stream(source, **({"shuffle_buffer": 80} if kind == "parquet" else {}))
    # a window of Parquet rows holds 10 pieces, a row group of 4 each at most, so it too comes from all places
    assert mean_classes(images, 25, 16) == pytest.approx(10 * (1 - 0.9**16), abs=0.4)


def test_with_an_index_an_epoch_is_the_permutation_that_stored_images_have(tmp_path):
    images = stream(write(tmp_path, [png(value) for value in range(9)]), seed=3)
    orders = [keyed_permutation(9, 3, "order", epoch).tolist() for epoch in range(2)]
    assert numbers(images, 18) == orders[0] + orders[1]


def test_resuming_with_an_index_reads_nothing_before_its_place(tmp_path, monkeypatch):
    read = []
    row = IndexedRows._read
    monkeypatch.setattr(IndexedRows, "_read", lambda rows, index: read.append(index) or row(rows, index))
    images = stream(write(tmp_path, [png(value) for value in range(20)]), process_index=1, num_processes=2)
    images.start, images.batch_size = 50, 5
    assert numbers(images, 5) == read == keyed_permutation(20, 0, "order", 2).tolist()[15:20]  # its own alone


def test_resuming_by_row_groups_reads_one_window(tmp_path, monkeypatch):
    read = []
    group = RowGroups.read
    monkeypatch.setattr(RowGroups, "read", lambda rows, *piece: read.append(piece) or group(rows, *piece))
    source = write(tmp_path, [png(value) for value in range(60)], "parquet", (20, 40))
    images = stream(source, shuffle_buffer=20)  # 3 windows of 10 pieces of 2 rows
    images.start = 25
    numbers(images, 15)
    assert sum(len(rows) for _, rows in read) == 20


def test_earlier_epochs_are_not_read_again_without_an_index(tmp_path, monkeypatch, caplog):
    read = []
    source = write(tmp_path, [png(value) for value in range(8)], "tar")
    images = stream(source)
    whole = numbers(images, 70)
    rows_of = shuffled_rows.rows_of
    monkeypatch.setattr(shuffled_rows, "rows_of", lambda *args: (read.append(1) or row for row in rows_of(*args)))
    images.start = 60
    assert numbers(images, 4) == whole[60:64]
    assert len(read) == 8 + 8  # to count them, and the epoch of place 60
    assert "has no index, so that its rows are read again" in caplog.text


@pytest.mark.parametrize(("labels", "warns"), [(np.repeat(range(10), 40), True), (np.tile(range(10), 40), False)])
def test_a_buffer_that_hardly_mixes_the_classes_is_warned_of(labels, warns, caplog):
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(num_classes=10)})
    rows = Dataset.from_dict({"image": [png(0)] * 400, "label": labels.tolist()}, features=features)
    list(islice(BufferedRows(rows.to_iterable_dataset(), "here", 0, 40).after(0), 30))
    expected = "the first 20 rows of here hold 1 of its 10 classes, as if they were sorted"
    assert (expected in caplog.text) == warns == bool(caplog.text)


def test_each_kind_of_source_is_read_by_the_best_index_that_it_has(tmp_path):
    images = [png(value) for value in range(12)]
    for kind, expected in zip(KINDS, (IndexedRows, RowsOfGroups, BufferedRows)):
        (tmp_path / kind).mkdir()
        source = write(tmp_path / kind, images, kind)
        few = stream(source, max_images=5)
        assert isinstance(few.rows, expected)
        assert {*numbers(few, 20)} == {*range(5)}
        if expected is BufferedRows:
            with pytest.raises(ValueError, match="num_workers is 2, but must be 0 or 1 for .* has no index"):
                stream(source, num_workers=2)
    # of files with other columns, those of the first count, which only a stream converts
    Dataset.from_dict({"image": images[:1], "label": [1.0]}).to_parquet(tmp_path / "parquet" / "1.parquet")
    assert isinstance(stream(str(tmp_path / "parquet" / "*.parquet")).rows, BufferedRows)


def test_integer_labels_are_classes_where_any_row_can_be_read(tmp_path):
    features = Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    rows = Dataset.from_dict({"image": [png(value) for value in range(4)], "label": [7, 3, 7, 3]}, features=features)
    rows.save_to_disk(tmp_path / "rows")
    images = stream(str(tmp_path / "rows" / "*.arrow"))
    assert images.class_names == ("3", "7")
    assert all(item["label"] == 1 - int(item["image"].max()) % 2 for item in islice(images, 8))


def test_a_stream_has_the_attributes_of_a_set(tmp_path):
    source = write(tmp_path, [png(value) for value in range(4)])
    images = stream(source)
    assert (images.channels, images.height, images.width) == (1, 4, 4)
    assert images.pixel_range == PixelRange.full("uint8")
    assert images.class_names == ("even", "odd")
    assert stream(source).fingerprint == images.fingerprint != stream(source, max_images=3).fingerprint
    assert set(numbers(stream(source, max_images=3), 9)) == {0, 1, 2}
    sets = load_images(
        DataConfig(data=source, streaming=True, image_size=4, validation_data=source, cache_dir=str(tmp_path / "cache"))
    )
    assert len(sets.validation) == 4
    write(tmp_path / "0", [png(4)])
    (tmp_path / "0" / "0").rename(tmp_path / "1")
    assert stream(source).fingerprint != images.fingerprint  # of more rows, the order is another


# what a resumed run is told from


def files_of_images(folder) -> None:
    for value in range(6):  # of six sizes
        (folder / "ab"[value % 2]).mkdir(exist_ok=True)
        noise = np.random.default_rng(value).integers(0, 255, (4, 6 + value), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "ab"[value % 2] / f"{value}.png")


def with_labels(folder) -> None:
    files_of_images(folder)
    lines = [f"{file.relative_to(folder)},{number % 2}" for number, file in enumerate(sorted(folder.glob("*/*")))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines, ""]))


def same_sizes(kind):
    return lambda folder: write(folder, [png(value) for value in range(6)], kind, (2, 2, 2))


SOURCES = {  # each writes a source of several files; a stream is opened from their folder
    "folder": (files_of_images, "*/*.png"),
    "metadata": (with_labels, "*/*.png"),
    "parquet": (same_sizes("parquet"), "*.parquet"),
    "tar": (same_sizes("tar"), "*.tar"),
    "arrow": (same_sizes("arrow"), "*/*.arrow"),
}


def swap(first, second) -> None:
    first.rename(first.with_name("kept"))
    second.rename(first)
    first.with_name("kept").rename(second)


def remove_one_and_add_another(files) -> None:
    files[0].unlink()
    shutil.copy(files[2], files[0].with_stem(f"{files[0].stem}-new"))


def rename(file) -> None:
    file.rename(file.with_stem(f"{file.stem}-renamed"))


CHANGES = {
    "renamed": lambda files: rename(files[1]),
    "exchanged": remove_one_and_add_another,
    "replaced": lambda files: shutil.copy(files[0], files[1]),
    "swapped": lambda files: swap(files[0], files[2]),
}


def fingerprint_of(folder, files: str, **options) -> str:
    source = str(folder) if files.endswith(".png") else str(folder / files)
    return stream(source, cache_dir=str(folder.parent / "cache"), **options).fingerprint


@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_is_told_by_its_files_wherever_they_lie(tmp_path, kind):
    write_files, files = SOURCES[kind]
    (tmp_path / "here").mkdir()
    write_files(tmp_path / "here")
    before = fingerprint_of(tmp_path / "here", files)
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)  # written later
    assert fingerprint_of(tmp_path / "there", files) == before
    assert fingerprint_of(tmp_path / "there", files, max_images=3) != before
    for name, change in CHANGES.items():
        if kind == "metadata" and name in ("renamed", "exchanged"):
            continue  # which are refused: the table names files that are not there
        shutil.copytree(tmp_path / "here", tmp_path / name)
        change(sorted((tmp_path / name).glob(files)))
        assert fingerprint_of(tmp_path / name, files) != before, name
    if kind == "metadata":
        table = tmp_path / "there" / "metadata.csv"
        table.write_text(table.read_text().replace(",0", ",1", 1))
        assert fingerprint_of(tmp_path / "there", files) != before


def test_a_saved_set_is_told_by_its_files_too(tmp_path):
    for folder, values in (("a", range(4)), ("b", range(4)), ("c", (0, 1, 3, 2))):
        write(tmp_path / folder, [png(value) for value in values], labels=[0] * 4)
    a, b, c = (stream(str(tmp_path / folder / "0")).fingerprint for folder in "abc")
    assert a == b != c


def test_a_run_goes_on_with_a_stream_that_was_moved_and_says_when_its_files_have_changed(tmp_path):
    def claimed(source, **options) -> None:
        config = DataConfig(data=source, streaming=True, image_size=4, **options)
        sections = {"data": asdict(config), "training": {"allow_changed_data": False}}
        claim(tmp_path / "run", sections, make_record(load_images(config), config.preparation))

    (tmp_path / "here").mkdir()
    files_of_images(tmp_path / "here")
    claimed(str(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    claimed(str(tmp_path / "there"))
    with pytest.raises(ValueError, match="split is 'a', but the run in .* was started with 'train'"):
        claimed(str(tmp_path / "there"), split="a")
    rename(tmp_path / "there" / "a" / "0.png")
    told = "changed since .* was started: the files of the stream have changed, or .*; set allow_changed_data"
    with pytest.raises(ValueError, match=told):
        claimed(str(tmp_path / "there"))


def test_streams_that_cannot_continue_say_why(tmp_path, caplog):
    broken = {"bytes": b"", "path": "broken.png"}
    source = write(tmp_path, [png(1), broken, broken, png(2)])
    with pytest.raises(ValueError, match="max_broken=0.01"):
        numbers(stream(source), 4)
    assert "broken.png is empty" in caplog.text
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no usable image"):
        stream(write(tmp_path / "none", [broken] * 3))
    with pytest.raises(ValueError, match="group_column is 'label', but nothing of a stream is held out"):
        stream(source, group_column="label")


def test_a_stream_that_breaks_off_is_named(tmp_path):
    """The second of two Parquet files is cut in the middle of its rows."""
    rows = Dataset.from_dict({"image": [png(value) for value in range(40)]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    for index in range(2):
        rows.shard(2, index).to_parquet(tmp_path / f"{index}.parquet", batch_size=4)
    content = bytearray((tmp_path / "1.parquet").read_bytes())
    content[100:2000] = bytes(1900)  # the footer, which locates the columns, is intact
    (tmp_path / "1.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="(?s)which cannot be read: .* It is damaged or incomplete; get it again"):
        numbers(stream(str(tmp_path / "*.parquet")), 40)


def test_offsets_out_of_a_mapped_file_are_not_followed(tmp_path):
    images = [png(value) for value in range(4)]
    source = write(tmp_path, images)
    (file,) = tmp_path.glob("*/*.arrow")
    ends = np.cumsum([len(image["bytes"]) for image in images]).astype(np.int32)  # of the images in their column
    content = file.read_bytes()
    assert content.count(ends.tobytes()) == 1
    file.write_bytes(content.replace(ends.tobytes(), (ends * 10**6).tobytes()))
    with pytest.raises(ValueError, match="It is damaged or incomplete; get it again"):
        stream(source)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    images = stream(write(tmp_path, [png(value) for value in range(8)]))
    images.class_names = ("even",)
    with pytest.raises(ValueError, match="a label of .* is 1, but there are 1 classes"):
        numbers(images, 8)
