"""Sets of images: their rows, held-out images, errors, cache, and the order in which a run sees them."""

import io
import logging
import pickle
import time
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context

import datasets
import fsspec
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from torch.utils.data import DataLoader

from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.data import cache as image_cache
from unet_diffusion.data import sets as image_sets
from unet_diffusion.data.cache import content_digest
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.record import DataRecord, make_record
from unet_diffusion.data.sets import load_images, place_of
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.training.batches import GlobalBatches

datasets.disable_progress_bars()


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def save(folder, images, labels=None, names=("a", "b")) -> str:
    """A `save_to_disk` folder; an image is an array or the bytes of a file."""
    rows = [{"bytes": p if isinstance(p, bytes) else encoded(p), "path": None} for p in images]
    features = Features({"image": datasets.Image(decode=False)})
    columns = {"image": rows}
    if labels is not None:
        features["label"] = ClassLabel(names=list(names))
        columns["label"] = labels
    Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return str(folder)


def numbered(count, shape=(6, 5, 1), dtype=np.uint8) -> list[np.ndarray]:
    """Images of one value each, which is their number."""
    return [np.full(shape, number, dtype=dtype) for number in range(count)]


@pytest.fixture
def load(tmp_path):
    return lambda data, seed=0, **options: load_images(DataConfig(data=data, cache_dir=str(tmp_path), **options), seed)


# what a set holds


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_images_keep_channels_precision_and_values(tmp_path, load, channels, dtype):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 8, channels)).astype(dtype)
    train = load(save(tmp_path / "set", images), validation_fraction=0.0, value_range=(0.0, 255.0)).train
    assert (len(train), train.channels, train.height, train.width) == (5, channels, 9, 8)
    assert train.pixel_range == PixelRange((0.0,), (255.0,), dtype)
    batch = to_batch([train[i] for i in range(5)])
    assert batch["image"].dtype == getattr(torch, dtype)
    assert np.array_equal(batch["image"].numpy(), np.moveaxis(images, 3, 1))
    assert batch["label"].tolist() == [-1] * 5
    back = train.pixel_range.to_stored(train.pixel_range.to_model(batch["image"]))
    torch.testing.assert_close(back, batch["image"], rtol=0, atol=255 * 2**-23 if dtype == "float32" else 0)


def test_held_out_images_do_not_depend_on_the_seed_and_are_not_trained_on(tmp_path, load):
    source = save(tmp_path / "set", numbered(20), labels=[0, 1] * 10)
    first, second = (load(source, seed=seed, validation_fraction=0.2) for seed in (1, 2))
    held_out, again, trained_on = (
        [part[i]["image"][0, 0, 0].item() for i in range(len(part))]
        for part in (first.validation, second.validation, first.train)
    )
    by_rule = [n for n, image in enumerate(numbered(20)) if place_of(content_digest(image).hex()) < 0.2]
    assert held_out == again == by_rule
    assert sorted(held_out + trained_on) == list(range(20))
    assert [first.train[i]["label"] for i in range(len(trained_on))] == [number % 2 for number in trained_on]
    assert first.train.fingerprint == second.train.fingerprint != first.validation.fingerprint


def in_groups(folder, images, groups) -> DataConfig:
    rows = [{"bytes": encoded(image), "path": None} for image in images]
    features = Features({"image": datasets.Image(decode=False), "group": datasets.Value("string")})
    Dataset.from_dict({"image": rows, "group": groups}, features=features).save_to_disk(folder)
    return DataConfig(str(folder), group_column="group", validation_fraction=0.4, cache_dir=str(folder) + " cache")


def test_groups_that_share_equal_images_are_on_one_side(tmp_path, caplog):
    names = [f"patient {number}" for number in range(12)]
    places = {name: place_of(name) for name in names}
    apart = load_images(in_groups(tmp_path / "apart", numbered(24), names * 2))
    held_out = {apart.validation.cache.groups[row] for row in apart.validation.rows}
    assert held_out == {name for name in names if places[name] < 0.4} and not caplog.text

    images, order = numbered(24), sorted(names, key=places.__getitem__)
    lowest, highest, between = order[0], order[-1], order[6]
    images[names.index(highest)] = images[names.index(lowest)]
    images[12 + names.index(highest)] = images[12 + names.index(between)]  # so that three groups are one
    joined = load_images(in_groups(tmp_path / "joined", images, names * 2))
    side = {joined.validation.cache.groups[row] for row in joined.validation.rows}
    one = {lowest, highest, between}
    assert side - one == held_out - one and side & one == (one if places[min(one)] < 0.4 else set())
    assert not {*joined.train.ids()} & {*joined.validation.ids()}
    assert "2 groups hold images of other groups too" in caplog.text

    config = in_groups(tmp_path / "one", [*numbered(2), *numbered(2)], ["a", "a", "b", "b"])
    message = "all 4 usable images belong together, since the 2 groups share equal images, so none can be held out"
    with pytest.raises(ValueError, match=message):
        load_images(config)
    assert [finding.severity for finding in examine(config).findings if message in finding.sentence] == ["error"]


@pytest.mark.parametrize("count", [1, 3])
def test_images_that_a_run_held_out_are_not_all_that_is_trained_on(tmp_path, load, count):
    config = DataConfig(save(tmp_path / "set", numbered(20)), validation_fraction=0.3, cache_dir=str(tmp_path))
    sets = load_images(config)
    before = make_record(sets, config.preparation)
    left = [sets.validation[index]["image"].numpy().transpose(1, 2, 0) for index in range(count)]
    left = replace(config, data=save(tmp_path / "left", left))
    with pytest.raises(
        ValueError, match=f"all {count} images of .*left that are left are held out by the run, so that"
    ):
        load_images(left, before=before)


def test_named_validation_takes_the_range_and_the_classes_of_training(tmp_path, load):
    train = save(tmp_path / "train", numbered(4, dtype=np.float32), [0, 1, 2, 1], names=["a", "b", "c"])
    other = save(tmp_path / "other", numbered(2, dtype=np.float32), [1, 0], names=["a", "c"])
    sets = load(train, validation_data=other, percentiles=(0.0, 100.0))
    assert len(sets.train) == 4
    assert sets.validation.pixel_range == sets.train.pixel_range == PixelRange((0.0,), (3.0,), "float32")
    assert [sets.validation[i]["label"] for i in range(2)] == [2, 0]  # c and a, as indices into a, b, c

    unknown = save(tmp_path / "unknown", numbered(2, dtype=np.float32), [1, 0], names=["a", "d"])
    sixteen = save(tmp_path / "sixteen", numbered(2, dtype=np.uint16))
    smaller = save(tmp_path / "smaller", numbered(2, shape=(4, 4, 1), dtype=np.float32))
    for validation, message in (
        (unknown, "not trained on: d"),
        (sixteen, r"1 channels of uint16, .*; store all images in one data type\."),
        (smaller, "4x4"),
    ):
        with pytest.raises(ValueError, match=message):
            load(train, validation_data=validation, value_range=(0.0, 1.0))


def test_named_validation_split(tmp_path, load):
    images = Dataset.from_dict({"image": [encoded(image) for image in numbered(5)]})
    DatasetDict(train=images, test=images.select([4])).save_to_disk(tmp_path / "splits")
    sets = load(str(tmp_path / "splits"), validation_split="test")
    assert (len(sets.train), len(sets.validation)) == (5, 1)
    assert sets.validation[0]["image"].max() == 4


@pytest.mark.parametrize("names", [("b", "a"), ("a", "c"), ("a",), ("a", "b", "c")])
def test_a_run_that_has_learnt_classes_resumes_with_the_same_ones(tmp_path, names):
    source = save(tmp_path / "set", numbered(4), [0, 0, 0, 0], names)
    config = DataConfig(source, cache_dir=str(tmp_path / "cache"))
    before = make_record(load_images(config), config.preparation, class_names=("a", "b"))
    before.write(tmp_path)
    assert DataRecord.read(tmp_path) == before
    with pytest.raises(ValueError, match="class . of .*, but the run has learnt .*, and the classes of a run stay"):
        load_images(config, before=before)
    stream = replace(config, streaming=True, crop_size=4)
    with pytest.raises(ValueError, match="the classes of a run stay as they are"):
        load_images(stream, before=before)
    assert load_images(config, before=replace(before, class_names=names)).train.class_names == names


def test_max_images_takes_the_first(tmp_path, load):
    train = load(save(tmp_path / "set", numbered(9)), max_images=3, validation_fraction=0.0).train
    assert [int(train[i]["image"].max()) for i in range(len(train))] == [0, 1, 2]


def test_real_images(shared_data, load):
    sets = load(str(shared_data / "fruits64"), split="test", max_images=40, image_size=16)
    assert (len(sets.train), sets.train.channels, sets.train.height) == (39, 3, 16)
    assert sets.train.class_names == ("apple", "cherry", "tomato")
    images = sets.train.pixel_range.to_model(torch.stack([sets.train[i]["image"] for i in range(39)]))
    assert images.max() > 0.9  # their background is white
    assert images[:, :, 0, 0].mean() > 0.9


# ranges


def test_percentiles_are_measured_per_channel_on_training_images(tmp_path, load):
    images = np.random.default_rng(0).normal(size=(40, 8, 8, 2)).astype(np.float32) * [1, 100]
    sets = load(save(tmp_path / "set", images), percentiles=(1.0, 99.0), validation_fraction=0.25)
    values = np.stack([item["image"].numpy() for item in map(sets.train.fetch, range(len(sets.train)))], axis=1)
    values = values.reshape(2, -1)
    np.testing.assert_allclose(sets.train.pixel_range.low, np.percentile(values, 1, axis=1), rtol=1e-6)
    np.testing.assert_allclose(sets.train.pixel_range.high, np.percentile(values, 99, axis=1), rtol=1e-6)


def test_the_range_of_large_sets_is_measured_on_all_training_images(tmp_path, load, monkeypatch):
    monkeypatch.setattr(image_sets, "MOST_MEASURED", 3000)
    images = np.random.default_rng(0).integers(0, 65536, (6, 64, 96, 1)).astype(np.uint16)
    images[0] = images[0] % 631 + 1000
    images[1:, :, 5:] = 0  # so that some columns are unlike the others
    images[1:, :, :5] |= 1
    source = save(tmp_path / "set", images)
    assert load(source, validation_fraction=0).train.pixel_range == PixelRange.full("uint16")
    train = load(source, percentiles=(10.0, 99.0), validation_fraction=0).train
    values = image_sets._measured_values(train.cache, train.rows)
    assert values.shape[0] == 1 and 1500 < values.shape[1] <= 3000
    assert np.mean((values >= 1000) & (values <= 1630)) == pytest.approx(1 / 6 + 0.0095 * 5 / 6 * 5 / 96, abs=0.01)
    assert np.mean(values == 0) == pytest.approx(5 / 6 * 91 / 96, abs=0.01)


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 255), ("float32", 0.25), ("float32", 1e9)])
def test_percentiles_of_channels_that_hold_nearly_one_value(tmp_path, load, dtype, value):
    images = np.zeros((5, 8, 8, 3), dtype=dtype)
    images[..., 1] = value
    images[..., 2] = np.arange(64).reshape(8, 8)
    images[3, 2, 2, 0] = 7  # sparse
    train = load(save(tmp_path / "set", images), percentiles=(1.0, 99.0), validation_fraction=0).train
    low, high = train.pixel_range.low, train.pixel_range.high
    assert (low[0], high[0], low[1]) == (0, 7, value) and low[2] < high[2]
    assert high[1] == (value + 1 if value < 1e9 else value + value / 2**20)
    mapped = train.pixel_range.to_model(train[3]["image"])
    assert mapped[0].min() == -1 and mapped[0].max() == 1 and (mapped[1] == -1).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_percentiles_of_each_image_make_exposures_of_a_scene_equal(tmp_path, load, streaming):
    scene = np.random.default_rng(0).normal(100, 10, size=(8, 8, 1)).astype(np.float32)
    source = save(tmp_path / "set", [scene * gain + gain for gain in (1, 5, 30)])
    options = {"crop_size": 8, "streaming": True} if streaming else {"validation_fraction": 0}
    sets = load(source, percentiles=(0.0, 100.0), percentiles_of="image", **options)
    assert sets.train.pixel_range == PixelRange.stretched("float32", (0.0, 100.0))
    expected = (scene - scene.min()) / np.ptp(scene)
    items = list(islice(sets.train, 3)) if streaming else [sets.train.fetch(index) for index in range(3)]
    assert len(items) == 3
    for item in items:
        np.testing.assert_allclose(item["image"][0], expected[..., 0], atol=1e-5)


def test_floats_and_dark_16_bit_images_need_a_range(tmp_path, load):
    with pytest.raises(ValueError, match=r"floats from 0 to 9.*value_range"):
        load(save(tmp_path / "floats", numbered(10, dtype=np.float32)), validation_fraction=0.0)
    fourteen_bits = save(tmp_path / "fourteen", [np.array([[6000, 8000]], dtype=np.uint16)] * 3)
    with pytest.raises(ValueError, match=r"only 6000 to 8000 .* value_range 0 16383 if the data have 14 bits"):
        load(fourteen_bits, validation_fraction=0.0)
    bright = save(tmp_path / "bright", [np.array([[60000, 62000]], dtype=np.uint16)] * 3)
    with pytest.raises(
        ValueError, match=r"only 60000 to 62000 .* Give percentiles such as 0.1 and 99.9, or value_range"
    ):
        load(bright, validation_fraction=0.0)
    twelve_bits = save(tmp_path / "twelve", [np.array([[0, 4095]], dtype=np.uint16)] * 3)
    with pytest.raises(ValueError, match=r"only 0 to 4095 of 0 to 65535.* value_range 0 4095 if the data have 12 bits"):
        load(twelve_bits)
    for most in (4095.0, 65535.0):
        options = {"value_range": (0.0, most), "validation_fraction": 0.0}
        assert load(twelve_bits, **options).train.pixel_range.high == (most,)
    sixteen_bits = save(tmp_path / "sixteen", [np.array([[0, 60000]], dtype=np.uint16)] * 3)
    assert load(sixteen_bits, validation_fraction=0.0).train.pixel_range == PixelRange.full("uint16")


# size, cut, mirror


def test_sizes_that_differ_need_image_size(tmp_path, load):
    source = save(tmp_path / "set", [np.zeros((4, 6), dtype=np.uint8), np.zeros((5, 5), dtype=np.uint8)])
    with pytest.raises(ValueError, match="row 1 has 5x5 pixels, but the rows before have 6x4; give image_size"):
        load(source)
    assert load(source, image_size=3, validation_fraction=0.0).train[1]["image"].shape == (1, 3, 3)


def test_random_cuts_and_mirrors_depend_on_seed_epoch_and_index_alone(tmp_path, load):
    wide, tall = np.tile(np.arange(12, dtype=np.uint8), (4, 1)), np.tile(np.arange(9, dtype=np.uint8)[:, None], (1, 4))
    source = save(tmp_path / "set", [wide, tall])
    options = {"image_size": 4, "crop_size": 4, "flip": True, "validation_fraction": 0.0}
    train, again = (load(source, seed=3, **options).train for _ in range(2))
    keys = [(epoch, index) for epoch in range(30) for index in (0, 1)]
    cuts = {key: train[key]["image"] for key in keys}
    for key in reversed(keys):
        assert torch.equal(again[key]["image"], cuts[key])
        assert torch.equal(again.fetch(key[1], keyed_generator(3, "augment", *key))["image"], cuts[key])
    rows = [cuts[epoch, 0][0, 0].tolist() for epoch in range(30)]
    assert all(np.abs(np.diff(row)).tolist() == [1, 1, 1] for row in rows)  # pieces of the ramp, bit-exact
    assert {row[1] > row[0] for row in rows} == {True, False}
    assert len({min(row) for row in rows}) > 4  # of 9 places
    assert not all(torch.equal(load(source, seed=4, **options).train[key]["image"], cuts[key]) for key in keys)
    assert train[0]["image"][0, 0].tolist() == [4, 5, 6, 7]  # undisturbed: the middle


def test_center_crop_is_not_random(tmp_path, load):
    train = load(save(tmp_path / "set", numbered(2, shape=(4, 9, 1))), image_size=4, validation_fraction=0.0).train
    assert torch.equal(train[0, 1]["image"], train[5, 1]["image"])


def ramps(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Images whose values are 16 * row + column, so that a crop shows where it was cut."""
    return [(16 * np.arange(height)[:, None] + np.arange(width)).astype(np.uint8) for height, width in sizes]


def test_pieces_are_cut_bit_exactly_from_images_of_any_size(tmp_path, load):
    images = ramps((9, 12), (6, 5), (15, 5))
    source = save(tmp_path / "set", images)
    train = load(source, crop_size=5, validation_fraction=0.0).train
    assert (train.height, train.width) == (5, 5)
    for index, image in enumerate(images):
        spare = image.shape[0] - 5, image.shape[1] - 5
        pieces = [train[epoch, index]["image"][0].numpy() for epoch in range(40)]
        places = {tuple(map(int, divmod(piece[0, 0], 16))) for piece in pieces}
        assert len(places) > min(10, spare[0])
        assert all(top <= spare[0] and left <= spare[1] for top, left in places)
        for piece in pieces:
            top, left = divmod(int(piece[0, 0]), 16)
            assert np.array_equal(piece, image[top : top + 5, left : left + 5])
        middle = image[spare[0] // 2 :, spare[1] // 2 :][:5, :5]
        assert np.array_equal(train[index]["image"][0], middle)  # undisturbed, as validation images are


def test_pieces_depend_on_seed_epoch_and_index_alone(tmp_path, load):
    source = save(tmp_path / "set", ramps((15, 12), (15, 12)))
    train, again, other = (load(source, seed, crop_size=4, validation_fraction=0.0).train for seed in (3, 3, 4))
    keys = [(epoch, index) for epoch in range(10) for index in (0, 1)]
    pieces = {key: train[key]["image"] for key in keys}
    assert all(torch.equal(again[key]["image"], pieces[key]) for key in reversed(keys))
    assert not all(torch.equal(other[key]["image"], pieces[key]) for key in keys)
    assert not all(torch.equal(pieces[epoch, 0], pieces[epoch, 1]) for epoch in range(10))


def test_images_smaller_than_the_pieces_are_mirrored(tmp_path, load):
    source = save(tmp_path / "set", [np.tile(np.arange(3, dtype=np.uint8), (6, 1))])
    train = load(source, crop_size=5, validation_fraction=0.0).train
    assert train[0]["image"][0].tolist() == [[1, 0, 1, 2, 1]] * 5
    seen = {tuple(train[epoch, 0]["image"][0, 0].tolist()) for epoch in range(30)}
    assert seen == {(2, 1, 0, 1, 2), (1, 0, 1, 2, 1), (0, 1, 2, 1, 0)}  # the three places of 3 pixels in 5


def test_pieces_of_resized_images_come_from_their_whole_length(tmp_path, load):
    wide = np.repeat(np.arange(8, dtype=np.uint8) * 20, 10)[None].repeat(40, axis=0)  # 40x80, to be 4x8
    train = load(save(tmp_path / "set", [wide]), image_size=4, crop_size=3, validation_fraction=0.0).train
    assert {round(int(train[epoch, 0]["image"][0, 0, 0]) / 20) for epoch in range(60)} == {0, 1, 2, 3, 4, 5}


def test_a_set_that_was_cut_is_still_refused_whole(tmp_path, load):
    source = save(tmp_path / "set", ramps((4, 6), (5, 5)))
    assert len(load(source, crop_size=3, validation_fraction=0.0).train) == 2
    with pytest.raises(ValueError, match="row 1 has 5x5 pixels.* or crop_size to train on pieces"):
        load(source)


def test_named_validation_images_are_cut_in_the_middle_to_the_size_of_training(tmp_path, load):
    train, other = (save(tmp_path / name, ramps(size)) for name, size in (("train", (9, 9)), ("other", (5, 12))))
    sets = load(train, validation_data=other, crop_size=3)
    assert sets.validation[0]["image"][0].tolist() == [[20, 21, 22], [36, 37, 38], [52, 53, 54]]


def test_a_stream_is_cut_at_the_size_of_its_files(tmp_path, load):
    stream = load(save(tmp_path / "set", ramps((9, 12), (6, 5))), streaming=True, crop_size=4, max_images=2).train
    pieces = [item["image"] for item in islice(stream, 20)]
    assert {piece.shape for piece in pieces} == {(1, 4, 4)}
    assert all((piece[0].diff(dim=0) == 16).all() and (piece[0].diff(dim=1) == 1).all() for piece in pieces)
    assert len({int(piece[0, 0, 0]) for piece in pieces}) > 5


# broken images


def test_broken_images_are_named_and_left_out_up_to_a_share(tmp_path, load, caplog):
    images = [*numbered(8), b"", np.zeros((6, 5, 3), dtype=np.uint8), np.zeros((6, 5, 1), dtype=np.uint16)]
    source = save(tmp_path / "set", images)
    rows = "row 8: .*empty.*row 9: .*3 channels.*; give channels=1 or 3 .*row 10: .*uint16.*; store all images in one"
    with pytest.raises(ValueError, match=f"3 of the 11 images.*{rows}"):
        load(source, max_broken=0.2)
    for _ in range(2):  # warnings come back when the images come from the cache
        caplog.clear()
        train = load(source, max_broken=0.3, validation_fraction=0.0).train
        assert [int(train[i]["image"].max()) for i in range(len(train))] == list(range(8))
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
        assert "row 8" in caplog.text
    assert len(load(source, max_broken=0.3, channels=3, validation_fraction=0.0).train) == 9


def test_no_usable_image_is_an_error_at_once(tmp_path, load):
    with pytest.raises(ValueError, match="no usable image among 2. row 0.*empty.*row 1.*cannot be decoded"):
        load(save(tmp_path / "broken", [b"", b"no image"]), max_broken=1.0)
    no_rows = Dataset.from_dict({"image": []}, features=Features({"image": datasets.Image()}))
    no_rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no data"):
        load(str(tmp_path / "train.parquet"))


# cache


def test_second_start_reads_no_image(tmp_path, load, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.new("L", (5, 5), number).save(folder / f"{number}.png")
    before = load(str(folder), validation_fraction=0.0).train
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "decode", None)  # calling it would raise an error
        after = load(str(folder), validation_fraction=0.0).train
    assert after.fingerprint == before.fingerprint
    assert all(torch.equal(after[i]["image"], before[i]["image"]) for i in range(4))
    for file in folder.iterdir():  # the same names, sizes and times, but nothing to decode in them
        state = file.stat()
        file.write_bytes(bytes(state.st_size))
        image_cache.os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match=r"0\.png cannot be decoded"):
        load(str(folder))


def test_few_large_images_are_decoded_ahead_of_the_file(monkeypatch):
    monkeypatch.setattr(image_cache.os, "cpu_count", lambda: 2)
    decoded = []

    def prepare(row):
        time.sleep(2 * image_cache.QUICK)
        decoded.append(row["number"])
        return row["number"]

    rows = image_cache.each_row(Dataset.from_dict({"number": list(range(40))}), prepare)
    first = next(rows)
    time.sleep(0.2)  # all that may be decoded ahead is
    assert len(decoded) == 1 + 2 * image_cache.MOST_AHEAD
    assert [first, *rows] == sorted(decoded) == list(range(40))


def test_other_settings_are_cached_apart(tmp_path, load):
    source = save(tmp_path / "set", numbered(3))
    fingerprints = {load(source, **options).train.fingerprint for options in ({}, {"image_size": 3}, {"channels": 3})}
    assert len(fingerprints) == 3


def test_a_decoding_that_was_killed_leaves_nothing_behind(tmp_path, load):
    source = save(tmp_path / "set", numbered(3))
    train = load(source).train
    home = train.cache.folder.parent
    train.cache.folder.rename(home / ".writing-1-images")  # as if the process had died before the renaming
    again = load(source).train
    assert sorted(path.name for path in home.iterdir()) == ["images", "lock"]
    assert again.fingerprint == train.fingerprint


def test_a_class_whose_link_is_renamed_has_its_new_name(tmp_path, load):
    for number, (link, folder) in enumerate((("cat", "A"), ("dog", "B"))):
        (tmp_path / folder).mkdir()
        Image.new("L", (5, 5), number).save(tmp_path / folder / "0.png")
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / link).symlink_to(tmp_path / folder)
    assert load(str(tmp_path / "set"), validation_fraction=0.0).train.class_names == ("cat", "dog")
    (tmp_path / "set" / "cat").rename(tmp_path / "set" / "bird")
    assert load(str(tmp_path / "set"), validation_fraction=0.0).train.class_names == ("bird", "dog")


def test_remote_files_that_failed_are_fetched_again(tmp_path):
    """A file that is absent for the moment neither stays broken for training nor for the doctor."""
    url = f"memory://{tmp_path.name}"
    cells = [{"bytes": None, "path": f"{url}/{number}.npy"} for number in range(3)]
    rows = Dataset.from_dict({"image": cells}, features=Features({"image": datasets.Image(decode=False)}))
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"{url}/{number}.npy", encoded(numbered(3)[number]))
    config = DataConfig(data=rows, validation_fraction=0.0, cache_dir=str(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of the 3 images .* row 2: memory://\S*2\.npy cannot be read"):
            load_images(config)
        assert "1 of the 3 images" in str(examine(config))
    memory.pipe(f"{url}/2.npy", encoded(numbered(3)[2]))
    assert len(load_images(config).train) == 3
    assert "of the 3 images" not in str(examine(config))


def load_length(source: str, cache_dir: str) -> tuple[int, str]:
    train = load_images(DataConfig(data=source, cache_dir=cache_dir, validation_fraction=0.0)).train
    return len(train), train.fingerprint


def test_processes_that_start_at_once_share_one_cache(tmp_path):
    source = save(tmp_path / "set", numbered(50))
    with get_context("fork").Pool(3) as pool:
        results = pool.starmap(load_length, [(source, str(tmp_path))] * 3)
    assert results == [results[0]] * 3
    assert results[0][0] == 50


def test_worker_processes_read_the_same_items(tmp_path, load):
    train = load(save(tmp_path / "set", numbered(12)), flip=True, validation_fraction=0.0).train
    assert len(pickle.dumps(train)) < 5000  # a path, not the images
    assert torch.equal(pickle.loads(pickle.dumps(train))[3, 5]["image"], train[3, 5]["image"])
    alone, workers = (
        DataLoader(train, batch_sampler=GlobalBatches(12, 4), collate_fn=to_batch, num_workers=n) for n in (0, 2)
    )
    for one, other in islice(zip(alone, workers), 5):
        assert torch.equal(one["image"], other["image"])


# what is refused


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"crop_size": 0},
        {"channels": 4},
        {"validation_fraction": 1.0},
        {"max_broken": 2.0},
        {"max_images": 0},
        {"shuffle_buffer": 0},
        {"num_workers": -1},
        {"value_range": (1.0, 1.0)},
        {"percentiles": (50.0, 101.0)},
        {"value_range": (0.0, 1.0), "percentiles": (0.0, 99.0)},
        {"streaming": True},
        {"streaming": True, "image_size": 8, "percentiles": (0.0, 99.0)},
        {"percentiles_of": "image"},
        {"percentiles_of": "images", "percentiles": (0.0, 99.0)},
        {"percentiles": (0.01, 0.998)},
        {"percentiles": (1, 50, 99)},
        {"percentiles": 5},
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options):
    with pytest.raises(ValueError):
        DataConfig(**options)


def test_a_cache_that_cannot_be_written_asks_for_another(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    Dataset.from_dict({"image": [str(tmp_path / "0.png")]}, Features(image=datasets.Image())).to_parquet(
        tmp_path / "0.parquet"
    )
    cache = tmp_path / "cache"
    cache.write_text("a file")
    (tmp_path / "images").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "images" / "0.png")
    for data in ("images", "0.parquet"):
        with pytest.raises(OSError, match="^the cache cannot be written: .*Not a directory.*; make room, or"):
            load_images(DataConfig(data=str(tmp_path / data), cache_dir=str(cache)))
