"""Sets of images with masks: their sources, items, errors and cache."""

import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, DatasetDict, Features
from PIL import Image
from torch.utils.data import DataLoader

from tests.support.image_files import npy
from unet_diffusion.data.cache import content_digest
from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.masked import cache as masked_cache
from unet_diffusion.data.masked import dataset as masked_dataset
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.sets import load_labelled, load_masked
from unet_diffusion.data.masked.sources import open_masked_source
from unet_diffusion.data.record import DataRecord, make_record
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.segmentation.instances import border_weight_map, separate_instances
from unet_diffusion.segmentation.losses import class_counts
from unet_diffusion.training.batches import GlobalBatches

datasets.disable_progress_bars()

BINARY = np.array([0, 255])
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
FIELD = datasets.Image(decode=False)


def field(value) -> dict | None:
    return value if value is None else {"bytes": value if isinstance(value, bytes) else npy(value), "path": None}


def save(folder, images, masks, **columns) -> str:
    """A `save_to_disk` folder; an image is an array, the bytes of a file, or None."""
    columns = {"image": images, "mask": masks, **columns}
    rows = {name: [field(value) for value in values] for name, values in columns.items()}
    Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, FIELD))).save_to_disk(folder)
    return str(folder)


def examples(count=6, shape=(8, 10), classes=3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of random classes, and grey images whose value is 10 * class + 1: a mask belongs to its image."""
    masks = list(np.random.default_rng(0).integers(0, classes, (count, *shape)).astype(np.uint8))
    return [10 * mask + 1 for mask in masks], masks


def belong_together(item) -> bool:
    labelled = item["mask"] != 255
    return torch.equal(item["image"][0][labelled].long(), 10 * item["mask"][labelled] + 1)


@pytest.fixture
def load(tmp_path):
    def load(data, seed=0, **options):
        named = {"validation_data", "validation_split"} & set(options)
        fraction = {} if named else {"validation_fraction": 0.2}
        options = {**fraction, "cache_dir": str(tmp_path / "cache"), **options}
        return load_masked(MaskedDataConfig(data=data, **options), seed)

    return load


# sources


@pytest.mark.parametrize("kind", ["parquet", "other names", "arrays", "two folders", "split folders", "one folder"])
def test_sources(tmp_path, load, kind):
    images, masks = examples()
    options = {}
    source = tmp_path / "data"
    if kind in ("parquet", "other names"):
        names = ("image", "mask") if kind == "parquet" else ("photo", "annotation")
        rows = {name: [field(each) for each in values] for name, values in zip(names, (images, masks))}
        source.mkdir()
        Dataset.from_dict(rows, features=Features(dict.fromkeys(names, FIELD))).to_parquet(source / "train.parquet")
        options = {} if kind == "parquet" else {"image_column": "photo"}
    elif kind == "arrays":
        features = Features(image=Array2D((8, 10), "uint8"), mask=Array2D((8, 10), "int64"))
        Dataset.from_dict({"image": images, "mask": masks}, features=features).save_to_disk(source)
    else:
        split = "train/" if kind == "split folders" else ""
        suffix = "_seg" if kind == "one folder" else ""
        for number, (image, mask) in enumerate(zip(images, masks)):
            files = {f"images/{split}a/{number}.bmp": image, f"masks/{split}a/{number}{suffix}.png": mask}
            for name, pixels in files.items():
                path = source / (name.replace("masks", "images") if suffix else name)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        options = {"mask_suffix": "_seg"} if suffix else {"masks": str(source / "masks")}
        source = source / "images"
    sets = load(str(source), **options)
    assert (len(sets.train) + len(sets.validation), sets.num_classes) == (6, 3)
    assert (sets.train.channels, sets.train.height, sets.train.width) == (1, 8, 10)
    assert sets.pixel_range == PixelRange.full("uint8")
    items = [part.fetch(i) for part in (sets.train, sets.validation) for i in range(len(part))]
    assert all(item["mask"].dtype == torch.int64 and belong_together(item) for item in items)
    assert sorted(item["mask"].sum().item() for item in items) == sorted(int(mask.sum()) for mask in masks)


def test_named_validation_of_columns_and_of_folders(tmp_path, load):
    images, masks = examples(4)
    for part, rows in (("train", slice(0, 3)), ("val", slice(3, 4))):
        for kind, values in (("images", images), ("masks", masks)):
            (tmp_path / kind / part).mkdir(parents=True)
            for number, pixels in enumerate(values[rows]):
                Image.fromarray(pixels).save(tmp_path / kind / part / f"{number}.png")
    source, folder = tmp_path / "images", str(tmp_path / "masks")
    in_splits = load(str(source), masks=folder, validation_split="val")
    elsewhere = load(
        str(source / "train"),
        masks=f"{folder}/train",
        validation_data=str(source / "val"),
        validation_masks=f"{folder}/val",
    )
    for sets in (in_splits, elsewhere):
        assert (len(sets.train), len(sets.validation)) == (3, 1)
        assert sets.validation[0]["mask"].tolist() == masks[3].tolist()


def test_wrong_sources_are_refused(tmp_path):
    images, masks = examples(2)
    source = save(tmp_path / "set", images, masks)
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / "empty" / name)
    folder = tmp_path / "empty"
    for data, options, message in (
        (source, {"mask_column": "seg"}, "mask_column is 'seg'.*Columns: image"),
        (source, {"instances_column": "mask"}, "mask_encoding='instances' alone"),
        (source, {"instances_column": "nuclei"}, "no such column"),
        (source, {"masks": "/absent"}, "/absent, which is not a folder"),
        (folder, {}, "has images, but no masks are named: the first names are a.jpg, a.png, b.png. Give masks"),
        (folder, {"mask_suffix": "_m"}, "a.jpg and .*a.png have the same name"),
        (folder, {"masks": folder, "mask_column": "mask"}, "for data sets with columns"),
    ):
        with pytest.raises(ValueError, match=message):
            open_masked_source(data, **options)
    (folder / "a.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image of .* has a mask.*a, b and none, without mask_suffix='_m'"):
        open_masked_source(folder, mask_suffix="_m")


@pytest.mark.slow
def test_real_sets(shared_data, load):
    cells = load(str(shared_data / "wbc"), validation_split="validation", max_labels=8, class_names=("r", "c", "n"))
    assert (len(cells.train), len(cells.validation), cells.num_classes) == (8, 29, 3)
    assert cells.train[0]["image"].shape == (3, 128, 128)
    membranes = load(str(shared_data / "isbi2012"), validation_split="validation", max_labels=3, crop_size=64)
    assert membranes.train[0, 0]["image"].shape == (1, 64, 64)
    assert membranes.validation[0]["mask"].shape == (512, 512)
    interior = membranes.train.class_counts()[1] / membranes.train.class_counts().sum()
    assert 0.7 < interior < 0.85  # 77 % of the whole training set
    nuclei = load(
        str(shared_data / "dsb2018"),
        validation_split="validation",
        max_labels=4,
        instances_column="instances",
        border_weights=True,
    )
    item = nuclei.train[0]
    assert item["weights"].shape == (1, 256, 256)
    assert 1 <= item["weights"].min() < item["weights"].max() <= 11
    joined = nuclei.train.table[nuclei.train.cache.codes[0]]
    assert (joined > 0).sum() >= item["mask"].sum() > 0
    assert "weights" not in nuclei.validation[0]


# masks


def test_binary_palette_and_colour_masks(tmp_path, load):
    images, masks = examples(classes=2)
    sets = load(save(tmp_path / "binary", images, [BINARY[mask].astype(np.uint8) for mask in masks]))
    assert sets.num_classes == 2
    assert belong_together(sets.train[0])

    images, masks = examples()
    colours = np.array([(0, 0, 0), (0, 200, 0), (255, 0, 0)], dtype=np.uint8)
    found = load(save(tmp_path / "colours", images, [colours[mask] for mask in masks]))
    assert found.palette == ((0, 0, 0), (0, 200, 0), (255, 0, 0))
    assert belong_together(found.train[0])
    mapping = {"black": 0, "#00c800": 255, "#ff0000": 1}
    given = load(str(tmp_path / "colours"), mask_colours=mapping)
    assert given.num_classes == 2
    assert set(given.train[0]["mask"].unique().tolist()) == {0, 1, 255}
    assert (
        given.train.class_counts().tolist()
        == class_counts(torch.stack([given.train[i]["mask"] for i in range(len(given.train))]), 2).tolist()
    )

    files = []
    for mask in masks:
        image = Image.fromarray(mask, mode="P")
        image.putpalette(colours.flatten().tolist())
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    source = save(tmp_path / "palette", images, files)
    for options in ({}, {"mask_encoding": "palette"}):
        sets = load(source, **options)
        assert sets.palette == ((0, 0, 0), (0, 200, 0), (255, 0, 0))
        assert belong_together(sets.train[0])


def test_instances_are_separated_in_training_only_and_give_border_weights(tmp_path, load):
    instances = np.zeros((12, 16), dtype=np.uint16)
    instances[2:8, 2:6], instances[2:8, 6:11], instances[9:11, 13:15] = 300, 7, 8
    images = [np.full((12, 16), value, dtype=np.uint8) for value in range(3)]
    mask = (instances > 0).astype(np.uint8)
    separated = separate_instances(instances)
    columns = load(
        save(tmp_path / "columns", images, [mask] * 3, nuclei=[instances] * 3),
        instances_column="nuclei",
        border_weights=True,
    )
    alone = load(save(tmp_path / "maps", images, [instances] * 3), mask_encoding="instances", border_weights=True)
    for sets in (columns, alone):
        item = sets.train[0]
        assert sets.num_classes == 2
        assert np.array_equal(item["mask"].numpy(), separated > 0)
        assert np.array_equal(item["weights"][0].numpy(), border_weight_map(separated))
        assert np.array_equal(sets.validation[0]["mask"].numpy(), mask)
        assert set(sets.validation[0]) == {"image", "mask"}
    mask[instances == 7] = 255
    ignored = load(
        save(tmp_path / "ignored", images, [mask] * 3, nuclei=[instances] * 3),
        instances_column="nuclei",
        border_weights=True,
    )
    item = ignored.train[0]  # an ignored object touches nothing, and stays ignored
    assert np.array_equal(item["mask"].numpy(), mask)
    assert np.array_equal(item["weights"][0].numpy(), border_weight_map(np.where(instances == 7, 0, instances)))
    mask[instances == 7] = 1
    components = load(str(tmp_path / "columns"), border_weights=True).train[0]
    assert np.array_equal(components["weights"][0].numpy(), border_weight_map(mask > 0))
    assert np.array_equal(components["mask"].numpy(), mask)


def test_keys_wait_in_the_smallest_type_that_holds_them():
    kinds = {"uint8": [0, 255], "uint16": [0, 700], "uint32": [0, 2**20]}
    masks = [{"bytes": npy(np.array([values], dtype=np.uint32)), "path": None} for values in kinds.values()]
    images = [{"bytes": npy(np.zeros((1, 2), dtype=np.uint8)), "path": None}] * 3
    rows = Dataset.from_dict({"image": images, "mask": masks}, features=Features({"image": FIELD, "mask": FIELD}))
    read = masked_cache.example_reader(rows, MaskedDataConfig("data").preparation, "values")
    for row, (kind, values) in zip(rows, kinds.items()):
        example = read(row)
        assert (example.mask.keys.dtype, example.mask.keys.tolist()) == (kind, [values])
        assert example.mask_digest == content_digest(np.array([values], dtype=np.int64))  # as runs have recorded it


def test_max_labels_are_the_first_rows_that_are_not_held_out(tmp_path, load):
    images, masks = examples(9)
    source = save(tmp_path / "set", images, [*masks[:5], *[None] * 4])
    sets = load(source, max_labels=5)  # rows without a mask are images without labels
    assert len(sets.train) + len(sets.validation) == 5
    assert load(source, max_labels=2).train.rows.tolist() == sets.train.rows[:2].tolist()
    with pytest.raises(ValueError, match="4 of the 9 images.*row 5: it has no mask"):
        load(source)


def test_values_outside_the_classes_name_their_rows(tmp_path, load):
    images, masks = examples(4)
    masks[2] = masks[2] + 5
    source = save(tmp_path / "set", images, masks)
    with pytest.raises(ValueError, match=r"masks hold 5..7, but the classes are 0..2.*in 1 of 4 masks: rows 2\."):
        load(source, num_classes=3)
    images, masks = examples(4, classes=2)
    source = save(tmp_path / "binary", images, [BINARY[mask].astype(np.uint8) for mask in masks])
    with pytest.raises(ValueError, match="only class 0.*mask_encoding='binary'"):
        load(source, mask_encoding="indices")
    ones = load(source, validation_data=save(tmp_path / "ones", images, masks)).validation
    assert all(belong_together(ones[index]) for index in range(4))  # 1 is class 1, as 255 is
    others = save(tmp_path / "others", images, [3 * mask + 1 for mask in masks])
    with pytest.raises(ValueError, match="masks hold 1, 4, but the classes are 0, 2"):
        load(
            save(tmp_path / "0 and 2", images, [2 * mask for mask in masks]),
            mask_encoding="palette",
            validation_data=others,
        )


def test_palettes_that_contradict_each_other_leave_a_row_out(tmp_path, load):
    images, masks = examples(4, classes=2)
    files = []
    for number, mask in enumerate(masks):
        image = Image.fromarray(mask, mode="P")
        image.putpalette([0, 0, 0, *((255, 0, 0) if number < 3 else (0, 0, 255))])
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    source = save(tmp_path / "set", images, files)
    with pytest.raises(ValueError, match=r"row 3: index 1 of its mask has the colour \(0, 0, 255\).*'palette'"):
        load(source)
    assert load(source, mask_encoding="palette").num_classes == 3


# sizes and crops


def test_crops_depend_on_seed_epoch_and_index_alone_and_keep_image_and_mask_together(tmp_path, load):
    images, masks = examples(4, shape=(20, 30))
    source = save(tmp_path / "set", images, masks)
    train, again = (load(source, seed=3, crop_size=7).train for _ in range(2))
    assert (train.height, train.width) == (7, 7)
    keys = [(epoch, index) for epoch in range(10) for index in range(3)]
    crops = {key: train[key] for key in keys}
    for key in reversed(keys):
        assert crops[key]["image"].shape == (1, 7, 7)
        assert belong_together(crops[key])
        assert torch.equal(again[key]["image"], crops[key]["image"])
        assert torch.equal(again.fetch(key[1], keyed_generator(3, "crop", *key))["mask"], crops[key]["mask"])
    assert len({crops[epoch, 0]["image"].numpy().tobytes() for epoch in range(10)}) > 5
    assert not all(
        torch.equal(load(source, seed=4, crop_size=7).train[key]["image"], crops[key]["image"]) for key in keys
    )
    assert train[0]["image"].shape == (1, 20, 30)  # an index alone: whole


def test_small_images_are_mirrored_and_ignored_there(tmp_path, load):
    images, masks = examples(4, shape=(5, 30))
    sets = load(save(tmp_path / "set", images, masks), crop_size=8, border_weights=True)
    for epoch in range(5):
        item = sets.train[epoch, 0]
        assert item["image"].shape == (1, 8, 8)
        ignored = (item["mask"] == 255).all(dim=1)
        assert ignored.sum() == 3
        assert belong_together(item)
        assert (item["weights"][0][ignored] == 0).all()
        assert (item["weights"][0][~ignored] >= 1).all()
        first = int((~ignored).nonzero()[0])
        for distance in range(1, min(first, 4) + 1):  # rows before the border mirror those after it
            assert torch.equal(item["image"][0, first - distance], item["image"][0, first + distance])
    tiny = load(
        save(tmp_path / "tiny", [np.zeros((1, 2))] * 3, [np.array([[0, 1]])] * 3), crop_size=8, value_range=(0, 1)
    )
    assert tiny.train[0, 0]["image"].shape == (1, 8, 8)


def test_sizes_may_differ_with_a_crop_size_and_in_validation(tmp_path, load):
    images, masks = zip(*(pair for shape in ((8, 10), (12, 9)) for pair in zip(*examples(3, shape))))
    source = save(tmp_path / "set", images, masks)
    with pytest.raises(ValueError, match="row 3 has 9x12 pixels, but row 0 has 10x8; give crop_size"):
        load(source, validation_split="train")
    sets = load(source, crop_size=6)
    assert all(belong_together(sets.train[0, index]) for index in range(len(sets.train)))
    resized = load(source, image_size=4)
    assert {tuple(resized.train[i]["mask"].shape) for i in range(len(resized.train))} == {(4, 4)}
    whole = load(save(tmp_path / "same", *examples(3)), validation_data=source)
    assert {tuple(whole.validation[i]["mask"].shape) for i in range(6)} == {(8, 10), (12, 9)}


def test_masks_of_another_size_and_unreadable_ones_are_named(tmp_path, load):
    images, masks = examples(6)
    masks[1], masks[3] = masks[1][:5], b"no image"
    images[4] = np.zeros((8, 10, 3), dtype=np.uint8)
    source = save(tmp_path / "set", images, masks)
    with pytest.raises(
        ValueError, match=r"row 1: its mask has 10x5 pixels, but the image has 10x8.*row 3.*row 4: .*3 channels"
    ):
        load(source, max_broken=0.2)
    sets = load(source, max_broken=0.5)
    assert sets.train.cache.rows.tolist() == [0, 2, 5]
    assert belong_together(sets.train[0])


# batches, cache, options


def test_batches_hold_images_masks_and_weights(tmp_path, load):
    images, masks = examples(5)
    source = save(tmp_path / "set", [image.astype(np.uint16) for image in images], masks)
    train = load(source, border_weights=True, crop_size=4, value_range=(0, 255)).train
    assert len(pickle.dumps(train)) < 8000  # paths, not images
    batches = [
        next(iter(DataLoader(train, batch_sampler=GlobalBatches(4, 3), collate_fn=to_batch, num_workers=workers)))
        for workers in (0, 1)
    ]
    for batch in batches:
        assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
            "image": ((3, 1, 4, 4), torch.uint16),
            "mask": ((3, 4, 4), torch.int64),
            "weights": ((3, 1, 4, 4), torch.float32),
        }
        assert torch.equal(batch["mask"], batches[0]["mask"])


def test_second_start_decodes_nothing_and_another_encoding_neither(tmp_path, load, monkeypatch):
    source = save(tmp_path / "set", *examples(classes=2))
    first = load(source, border_weights=True)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(masked_cache, "example_reader", refuse)
    monkeypatch.setattr(masked_dataset, "border_weight_map", refuse)
    second = load(source, border_weights=True)
    assert second.train.fingerprint == first.train.fingerprint
    assert torch.equal(second.train[0]["weights"], first.train[0]["weights"])
    assert load(source, mask_encoding="indices").train.fingerprint == first.train.fingerprint
    assert load(source, num_classes=5).num_classes == 5
    with pytest.raises(AssertionError, match="decoded again"):
        load(source, image_size=4)


def test_held_out_images_do_not_depend_on_the_seed(tmp_path, load):
    source = save(tmp_path / "set", *examples(20))
    first, second = (load(source, seed=seed) for seed in (1, 2))
    assert first.validation.fingerprint == second.validation.fingerprint
    assert sorted([*first.train.rows, *first.validation.rows]) == list(range(20))


def record_of(data) -> DataRecord:
    return make_record(data, MaskedDataConfig("data").preparation, mask_encoding=data.encoding.to_dict())


def test_a_resumed_run_keeps_the_class_of_each_colour_and_the_names(tmp_path):
    for number, mask in enumerate(examples(4)[1]):
        for folder, pixels in (("images", np.full((8, 10), number, np.uint8)), ("masks", COLOURS[mask])):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    names = ["background:0,0,0::", "cat:0,0,255::", "dog:255,0,0::"]
    labelmap = tmp_path / "masks" / "labelmap.txt"
    labelmap.write_text("\n".join(names))
    places = {"data": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), "cache_dir": str(tmp_path / "cache")}
    config = MaskedDataConfig(**places, validation_fraction=0.5)
    first = load_masked(config)
    before = record_of(first)
    assert load_masked(config, before=before).encoding == first.encoding

    labelmap.write_text("\n".join([names[0], names[2], names[1]]))
    with pytest.raises(
        ValueError, match=r"\(0, 0, 255\) in the masks of .* is class 2, but .* has been class 1; restore"
    ):
        load_masked(config, before=before)
    again = load_masked(config, before=before, saved=first.encoding)
    assert all(torch.equal(again.train[i]["mask"], first.train[i]["mask"]) for i in range(len(first.train)))
    labelmap.write_text("\n".join([names[0], names[1].replace("cat", "cow"), names[2]]))
    with pytest.raises(ValueError, match="class 1 of .* is 'cow', but the run has learnt 'cat', and the classes"):
        load_masked(config, before=before)
    labelmap.unlink()
    with pytest.raises(ValueError, match="class 0 of .* is missing, but the run has learnt 'background'"):
        load_masked(config, before=before)


def test_a_resumed_run_keeps_its_number_of_classes(tmp_path, load):
    images, masks = examples(6)
    before = record_of(load(save(tmp_path / "set", images, masks)))
    more = save(tmp_path / "more", [*images, np.full((8, 10), 9, np.uint8)], [*masks, np.full((8, 10), 3, np.uint8)])
    config = MaskedDataConfig(more, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="have 4 classes, but those of the run have 3; restore the masks"):
        load_masked(config, before=before)


def test_the_range_is_measured_on_training_images(tmp_path, load):
    images, masks = examples(5)
    floats = [image.astype(np.float32) / 7 for image in images]
    source = save(tmp_path / "set", floats, masks)
    with pytest.raises(ValueError, match="floats from .*value_range"):
        load(source)
    assert load(source, percentiles=(0.0, 100.0)).pixel_range.high == pytest.approx((3.0,))
    with pytest.raises(ValueError, match="1 channels of uint8, but the training images have 1 of float32"):
        load(source, value_range=(0.0, 3.0), validation_data=save(tmp_path / "other", images, masks))


def test_each_image_of_training_and_of_tests_can_have_a_range_of_its_own(tmp_path, load):
    images, masks = examples(5)
    brighter = [image + 100 for image in images]
    dark, bright = (save(tmp_path / name, each, masks) for name, each in (("dark", images), ("bright", brighter)))
    sets = load(dark, percentiles=(0.0, 100.0), percentiles_of="image", validation_data=bright)
    assert sets.pixel_range == PixelRange.stretched("uint8", (0.0, 100.0))
    test = load_labelled(
        MaskedOptions(data=bright), num_classes=sets.num_classes, channels=1, pixel_range=sets.pixel_range
    )
    for index in range(5):
        pixels = images[index].astype(np.float64)
        expected = ((pixels - pixels.min()) / np.ptp(pixels) * 255).round().squeeze()
        for part in (sets.train, sets.validation, test):
            assert np.array_equal(part[index]["image"][0], expected)


def test_named_splits(tmp_path, load):
    source = Dataset.load_from_disk(save(tmp_path / "set", *examples(5)))
    DatasetDict(train=source, test=source.select([4])).save_to_disk(tmp_path / "splits")
    sets = load(str(tmp_path / "splits"), validation_split="test")
    assert (len(sets.train), len(sets.validation)) == (5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size is 0"),
        ({"max_labels": 0}, "max_labels is 0"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 3, "class_names": ("a", "b")}, "2 entries, but num_classes is 3"),
        ({"class_names": ("a",)}, "must name at least 2 classes"),
        ({"mask_suffix": ""}, "mask_suffix is ''"),
        ({"mask_encoding": "colour"}, "mask_encoding is 'colour'"),
        ({"mask_encoding": "binary", "mask_colours": {"red": 1}}, "mask_colours is .* only a palette has colours"),
        ({"mask_encoding": "instances", "instances_column": "cells"}, "leave instances_column out"),
        ({"masks": "m", "validation_data": "v"}, "validation_masks is None"),
        ({"validation_masks": "m"}, "validation_masks is 'm'"),
        ({"channels": 2}, "channels is 2"),
        ({"percentiles": (5.0, 1.0)}, "percentiles"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDataConfig(data="absent", **options)
