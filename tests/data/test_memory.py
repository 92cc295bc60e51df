"""Images in memory, given from Python: what is taken, what is refused, and that runs know them by their content."""

import copy
import io
import json
import pickle
from dataclasses import asdict, replace

import datasets
import numpy as np
import pytest
import tifffile
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.run_data import held_out_masks, own_images
from unet_diffusion.commands.train_ddpm import train_ddpm
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.data.config import DataConfig, InMemory
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.memory import as_source
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.sources import open_source
from unet_diffusion.images.decoding import decode, decode_image
from unet_diffusion.pipelines import ImageGenerationPipeline
from unet_diffusion.training.config import TrainingConfig

datasets.disable_progress_bars()


def squares(count: int = 12, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W), uint8, all different, and masks of 0 and 1 whose left half is 1."""
    masks = np.zeros((count, side, side), dtype=np.uint8)
    masks[:, :, : side // 2] = 1
    return masks * 100 + np.arange(count, dtype=np.uint8)[:, None, None], masks


def table(images: np.ndarray, **columns) -> Dataset:
    features = Features({"image": datasets.Image(), **({"label": ClassLabel(names=["a", "b"])} if columns else {})})
    return Dataset.from_dict({"image": list(map(Image.fromarray, images)), **columns}, features=features)


@pytest.mark.parametrize("kind", ["array", "channels", "arrays", "pil", "paths", "dataset"])
def test_every_kind_gives_the_same_images(tmp_path, kind):
    images, _ = squares()
    if kind == "paths":
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{i}.png")
    data = {
        "array": lambda: images,
        "channels": lambda: images[..., None],
        "arrays": lambda: list(images),
        "pil": lambda: tuple(map(Image.fromarray, images)),
        "paths": lambda: [tmp_path / f"{i}.png" for i in range(len(images))],
        "dataset": lambda: table(images),
    }[kind]()
    config = DataConfig(data=data, validation_fraction=0.25, cache_dir=str(tmp_path / "cache"))
    check_sources(config)
    sets = load_images(config)
    assert (len(sets.train), len(sets.validation)) == (9, 3)
    loaded = [part[i]["image"][0].numpy() for part in (sets.train, sets.validation) for i in range(len(part))]
    assert np.array_equal(sorted(image.tolist() for image in loaded), images.tolist())
    assert str(config.data).startswith(f"12 {'rows' if kind == 'dataset' else 'images'} in memory (fingerprint ")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_pil_images_keep_values_and_palettes(mode):
    random = np.random.default_rng(0).integers(0, 2 if mode == "P" else 256, (5, 4), dtype=np.uint8)
    image = Image.fromarray(random.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(random).convert(mode)
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 0, 0])
    (cell,) = as_source([image]).rows["image"][:]
    assert np.array_equal(decode_image(cell), decode_image(image))
    if mode == "P":
        assert decode(cell, reading="values").palette[:6] == [0, 0, 0, 255, 0, 0]


def test_indices_beyond_a_palette_stay():
    image = Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8), mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    (cell,) = as_source([image], "masks").rows["image"][:]
    assert decode(cell, reading="values").pixels[0, :, 0].tolist() == [0, 1, 2, 255]


@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("option", ["data", "masks"])
def test_pil_images_of_files_in_which_white_is_zero_are_read_like_these_files(tmp_path, option, bits):
    values = (np.arange(64).reshape(8, 8) % 3 > 0) if bits == 1 else np.arange(64, dtype=f"uint{bits}").reshape(8, 8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    (cell,) = as_source([Image.open(tmp_path / "a.tif")], option).rows["image"][:]
    reading = "values" if option == "masks" else "image"
    pixels = decode(cell, reading=reading).pixels
    assert np.array_equal(pixels, decode(tmp_path / "a.tif", reading=reading).pixels)
    assert (pixels[0, 0, 0] == 0) == (option == "masks")


def test_pil_images_keep_their_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)).save(file, "PNG", exif=exif)
    (cell,) = as_source([Image.open(file)]).rows["image"][:]
    kept, expected = decode(cell), decode(file.getvalue())
    assert kept.orientation == 6 and kept.pixels.shape == (5, 4, 1)
    assert np.array_equal(kept.pixels, expected.pixels)


def test_a_source_in_memory_is_text_that_depends_on_its_content():
    images, _ = squares()
    source, same, other = (as_source(each) for each in (images, list(images.copy()), images[::-1]))
    assert source == same != other
    assert as_source(table(images)) == as_source(table(images.copy())) != as_source(table(images[::-1]))
    for copied in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), as_source(source)):
        assert isinstance(copied, InMemory) and copied == source and len(copied.rows) == 12
    config = DataConfig(data=images, validation_data=images[:2])
    assert json.loads(json.dumps(asdict(config)))["data"] == source
    assert replace(config, image_size=4).data.rows is config.data.rows


def test_labels_and_other_columns_come_from_a_data_set(tmp_path):
    images, masks = squares(4)
    rows = table(images, label=[0, 1, 1, 0]).with_format("torch")
    train = load_images(DataConfig(data=rows, validation_fraction=0, cache_dir=str(tmp_path))).train
    assert train.class_names == ("a", "b") and train.labels.tolist() == [0, 1, 1, 0]
    both = table(images).add_column("mask", [{"bytes": None, "path": None}] * 4).remove_columns("mask")
    drawn = table(masks).rename_column("image", "mask")
    both = datasets.concatenate_datasets([both, drawn], axis=1)
    sets = load_masked(MaskedDataConfig(data=both, validation_fraction=0.25, cache_dir=str(tmp_path)))
    assert sets.train.class_counts().tolist() == [3 * 32, 3 * 32]


def test_masks_in_memory_belong_to_images_in_the_same_order(tmp_path):
    images, masks = squares(4)
    config = MaskedDataConfig(
        data=images,
        masks=[Image.fromarray(mask) for mask in masks],
        validation_data=list(images[:2]),
        validation_masks=masks[:2],
        cache_dir=str(tmp_path),
    )
    check_sources(config)
    sets = load_masked(config)
    assert (len(sets.train), len(sets.validation)) == (4, 2)
    assert np.array_equal(sets.train[2]["image"][0], images[2]) and np.array_equal(sets.train[2]["mask"], masks[2])
    with pytest.raises(ValueError, match="data is 4 images .* but masks are 3 masks .* one mask for each image"):
        load_masked(replace(config, masks=masks[:3]))
    with pytest.raises(ValueError, match="masks are 4 masks in memory.*give both in memory, or both as files"):
        load_masked(replace(config, data=str(tmp_path)))
    some = [None, *masks[1:]]
    sets = load_masked(replace(config, masks=some, max_broken=0.5))
    assert len(sets.train) == 3  # an image without a mask is left out, with a warning


def test_stated_axes_settle_the_order_of_one_array(tmp_path):
    images = np.stack([squares()[0]] * 3, axis=1)  # (12, 3, 8, 8)
    options = {"validation_fraction": 0, "cache_dir": str(tmp_path / "cache")}
    for axes, shape in {"CHW": (3, 8, 8), "HWC": (8, 3, 8)}.items():
        image = load_images(DataConfig(data=images, axes=axes, **options)).train[0]["image"]
        assert image.shape == shape


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"type torch.Tensor, but must be a name or path.*images.numpy\(\), and axes='CHW'"),
        ({"image": []}, "type dict, .*Dataset.from_dict"),
        (Image.new("L", (4, 4)), "type PIL.Image.Image.*pass a list of it"),
        (7, "type int, but must be a name"),
        ([], "data is empty"),
        ([torch.zeros(3, 8, 8)], r"data\[0\] is of type torch.Tensor, but must be a PIL image"),
        ([(Image.new("L", (4, 4)), 1)], r"data\[0\] is of type tuple.*columns image and label"),
        ([np.zeros(4)], r"data\[0\] has shape \(4,\)"),
        ([np.array([["a"]])], r"data\[0\] has shape \(1, 1\) and holds <U1"),
        (["absent.png"], r"data\[0\] is 'absent.png', but there is no such file"),
        (np.zeros((4, 4)), r"shape \(4, 4\), but must be \(N, H, W\).*give a list"),
        (np.zeros((8, 8, 3)), r"shape \(8, 8, 3\), which would be 8 images of 3 columns"),
        (
            np.zeros((5, 3, 8, 8)),
            r"shape \(5, 3, 8, 8\), which looks like \(N, C, H, W\).*axes='CHW' if it is the former",
        ),
    ],
)
def test_other_types_are_refused_with_the_rule(data, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(data=data)


def test_open_source_takes_images_too():
    images, _ = squares(3)
    assert len(open_source(images)) == 3
    with pytest.raises(ValueError, match="split is 'test', but 3 images in memory"):
        open_source(images, "test")
    assert [row["image"]["path"] for row in open_source(images, streaming=True)] == [None] * 3


def test_a_run_on_images_in_memory_resumes_with_equal_images_only(tmp_path):
    images, masks = squares()
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    training = TrainingConfig(steps=2, batch_size=4, validate_every=2, checkpoint_every=2, trackers=())
    data = DataConfig(data=list(images), cache_dir=str(tmp_path / "cache"))
    options = TrainDDPM(tmp_path / "run", str(network), data, training=training)
    run = train_ddpm(options)
    assert json.loads((run / "config.json").read_text())["data"]["data"] == str(data.data)
    assert "12 images in memory" in (run / "README.md").read_text()
    ImageGenerationPipeline.from_pretrained(run)
    train_ddpm(replace(options, data=replace(data, data=images.copy()), training=replace(training, steps=3)))
    with pytest.raises(
        ValueError, match="the data have changed.*'12 images in memory.* instead of '12 images in memory"
    ):
        train_ddpm(replace(options, data=replace(data, data=images + 1)))
    masked = MaskedDataConfig(data=images, masks=masks, cache_dir=str(tmp_path / "cache"))
    train_segmentation(TrainSegmentation(masked, tmp_path / "masks", str(network), training=training))
    assert (tmp_path / "masks" / "model_index.json").is_file()
    for own, folder in ((own_images, run), (lambda run: held_out_masks(run, 2), tmp_path / "masks")):
        with pytest.raises(ValueError, match="data is not given, .* was 12 images in memory .*, which no file keeps"):
            own(folder)
