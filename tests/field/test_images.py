"""Files whose axes, stored values or edges are often misread: stacks, arrays of torch, Fiji masks, brushes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.support.segmentation import network, pipeline
from unet_diffusion.cli import run
from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.segment import segment
from unet_diffusion.commands.train_segmentation import train_segmentation
from unet_diffusion.data.cache import cache_images
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.sets import load_images
from unet_diffusion.data.sources import open_source
from unet_diffusion.images.decoding import decode, decode_image
from unet_diffusion.images.masks import decode_mask
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.training.config import TrainingConfig

pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


def shares(keys: list[np.ndarray]) -> list[float]:
    """The share of each value, in ascending order."""
    _, counts = np.unique(np.concatenate([each.ravel() for each in keys]), return_counts=True)
    return [round(float(count), 4) for count in counts / counts.sum()]


def test_stacks(field):
    folder, right = field("imagej_stacks")
    for name, channels in right["channels"].items():
        for path in sorted((folder / name).iterdir()):
            found = decode(path)
            assert found.pixels.shape == (48, 48, channels)
            assert (found.format, found.lossy) == ("TIFF", False)
            assert (found.pages, found.unread_pages) == ((2, 1) if name == "preview" else (channels, 0))
    for name, axes in (("z_stack", "ZYX"), ("rgb_stack", "QYXS")):
        for stated in (None, "HWC", "CHW"):
            with pytest.raises(ValueError, match=rf"0\.tif cannot be decoded: its axes {axes} have the sizes"):
                decode_image(folder / name / "0.tif", axes=stated)
    for reading in ("values", "colours", "brightness"):
        with pytest.raises(ValueError, match="2 channels of uint8, and a channel for each class is not read"):
            decode_mask(folder / "class_masks" / "0.tif", reading=reading)


def test_segment_refuses_pages_in_words_for_the_command_and_names_each_file_once(field, tmp_path):
    folder, _ = field("imagej_stacks")
    pipeline().save_pretrained(tmp_path / "run")
    for name, says in (
        ("five_pages", "the image has 5 channels, but the network takes 1; convert it to 1 channel (grey)."),
        ("z_stack", "its axes ZYX have the sizes (5, 48, 48)"),
    ):
        arguments = ["--run", tmp_path / "run", "--inputs", folder / name, "--output", tmp_path / name]
        with pytest.raises(SystemExit) as stopped:
            run("segment", [str(argument) for argument in arguments])
        message = str(stopped.value)
        assert message.count(says) == 4
        assert all(message.count(str(path)) == 1 for path in (folder / name).iterdir())


@pytest.fixture
def channels_first(field):
    folder, right = field("arrays_with_channels_first")
    shape = (right["height"], right["width"], right["channels"])
    return folder, shape


def test_channels_first_are_asked_about_and_read_when_stated(channels_first, tmp_path):
    folder, shape = channels_first
    path = folder / "channels_first" / "00.npy"
    with pytest.raises(ValueError, match=r"its shape is \(3, 64, 48\), which may be 3 channels of 64 x 48.*axes='CHW'"):
        decode_image(path)
    assert np.array_equal(decode_image(path, axes="CHW"), np.moveaxis(np.load(path), 0, 2))
    config = {"data": str(folder / "channels_first"), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.25}
    with pytest.raises(ValueError, match=r"axes='CHW'"):
        load_images(DataConfig(**config))
    sets = load_images(DataConfig(**config, axes="CHW"))
    assert tuple(sets.train[0]["image"].shape) == (3, 64, 48)
    with pytest.raises(ValueError, match=r"or 12 images.*store each image in a file of its own"):
        load_images(DataConfig(**{**config, "data": str(folder / "one_array")}))


def test_streamed_arrays_follow_the_stated_axes(channels_first, tmp_path):
    folder, _ = channels_first
    config = {"data": str(folder / "channels_first"), "cache_dir": str(tmp_path), "image_size": 48, "streaming": True}
    stream = iter(load_images(DataConfig(**config, axes="CHW")).train)
    assert tuple(next(stream)["image"].shape) == (3, 48, 48)
    with pytest.raises(ValueError, match="axes='CHW'"):
        load_images(DataConfig(**config))


def test_stored_images_depend_on_the_stated_axes(tmp_path):
    """An array of 5 x 5 pixels with 5 channels is plain in neither order."""
    array = np.arange(125, dtype=np.uint8).reshape(5, 5, 5)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", array)
    for axes, expected in (("HWC", np.moveaxis(array, 2, 0)), ("CHW", array)):
        rows = open_source(tmp_path / "data")
        cache = cache_images(rows, Preparation(axes=axes), "data", 0.0, tmp_path / "cache")
        assert np.array_equal(cache.image(0), expected)


def test_a_run_trained_on_channels_first_segments_such_files(channels_first, tmp_path):
    folder, shape = channels_first
    model = tmp_path / "network.json"
    model.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    data = MaskedDataConfig(
        data=str(folder / "channels_first"),
        masks=str(folder / "masks"),
        axes="CHW",
        validation_fraction=0.25,
        cache_dir=str(tmp_path / "cache"),
    )
    training = TrainingConfig(
        steps=1, batch_size=2, warmup_steps=1, log_every=1, validate_every=1, checkpoint_every=1, trackers=()
    )
    options = TrainSegmentation(data, tmp_path / "run", str(model), augment=False, training=training)
    with pytest.raises(ValueError, match="axes='CHW'"):
        train_segmentation(replace(options, data=replace(data, axes=None)))
    train_segmentation(options)
    masks = segment(Segment(run=tmp_path / "run", inputs=(str(folder / "channels_first"),), device="cpu"))
    with Image.open(masks / "00.png") as mask, Image.open(masks / "00-overlay.png") as shown:
        assert mask.size == shown.size == (shape[1], shape[0])


def test_pipelines_take_arrays_in_the_order_of_their_channels(channels_first, tmp_path):
    folder, _ = channels_first
    path = folder / "channels_first" / "00.npy"
    pipe = pipeline(network(in_channels=3, out_channels=3, norm="none", attention=(False, False)))
    first = np.load(path)
    expected = pipe(np.moveaxis(first, 0, 2), output_type="np").masks[0]
    for source in (first, path, str(path)):
        assert np.array_equal(pipe(source, output_type="np").masks[0], expected)
    pipe.segment_file(path, tmp_path / "mask.npy", tile_size=16)
    assert np.array_equal(np.load(tmp_path / "mask.npy"), expected)
    assert pipe.overlay(path, expected).size == (48, 64)
    with pytest.raises(ValueError, match=r"its shape is \(12, 64, 48\), but 3 channels must be"):
        pipe(folder / "one_array" / "images.npy")


def test_stored_values_of_masks_from_fiji_count(field, tmp_path):
    folder, right = field("fiji_masks_with_inverting_lut")
    for name in ("masks", "labels"):
        found = [decode_mask(path) for path in sorted((folder / name).iterdir())]
        assert all(mask.white_is_zero for mask in found)
        assert shares([mask.keys for mask in found]) == right[name]
        config = {"data": str(folder / "images"), "masks": str(folder / name), "cache_dir": str(tmp_path / "cache")}
        data = load_masked(MaskedDataConfig(**config))
        assert data.num_classes == len(right[name])


def test_soft_edges_split_at_half(field):
    folder, right = field("masks_with_soft_edges")
    for name in ("smooth", "smooth_colour", "smooth_alpha", "white_on_nothing", "white_palette"):
        masks = [decode_mask(path, reading="brightness").keys for path in sorted((folder / name).iterdir())]
        assert shares([mask >= 128 for mask in masks]) == right["shares"]
    with pytest.raises(ValueError, match="give mask_encoding='binary'"):
        decode_mask(folder / "smooth_alpha" / "0.png")
    decode_mask(folder / "smooth_alpha" / "0.png", reading="brightness")
    outlined = [decode_mask(path).keys for path in sorted((folder / "cream_outline").iterdir())]
    _, outline, inner = right["cream_outline"]
    assert shares(outlined) in ([0.8845, inner, outline], [0.8845, outline, inner])


def test_lossy_masks_say_so(field):
    folder, _ = field("binary_masks_saved_as_jpeg")
    for name, kind, lossy in (("masks", "JPEG", True), ("masks_png", "PNG", False)):
        for path in (folder / name).iterdir():
            found = decode_mask(path)
            assert (found.format, found.lossy) == (kind, lossy)


@pytest.mark.parametrize(("inverted", "severity"), [({0, 1, 2, 3}, "note"), ({1, 3}, "warning"), (set(), None)])
def test_masks_shown_with_0_as_white_are_said(tmp_path, inverted, severity):
    """Black and white TIFF files of one bit, compressed as by a fax; PHOTOMETRIC is 0 where white is zero."""
    marked = np.zeros((16, 16), dtype=np.uint8)
    marked[4:9, 3:12] = 255
    for number in range(4):
        for folder, image in (("images", marked + number), ("masks", marked)):
            (tmp_path / folder).mkdir(exist_ok=True)
            options = {"compression": "group4", "tiffinfo": {262: int(number not in inverted)}}
            written = Image.fromarray(image).convert("1") if folder == "masks" else Image.fromarray(image)
            written.save(tmp_path / folder / f"{number}.tif", **(options if folder == "masks" else {}))
    config = MaskedDataConfig(str(tmp_path / "images"), masks=str(tmp_path / "masks"), cache_dir=str(tmp_path / "c"))
    found = [finding for finding in examine(config).findings if "show 0 as white" in finding.sentence]
    assert [finding.severity for finding in found] == [severity] * bool(severity)
    assert all(f"{len(inverted)} of 4" in finding.sentence for finding in found)


@pytest.mark.parametrize("channels", [2, 4])
def test_masks_in_the_alpha_channel_alone_are_asked_about(tmp_path, channels):
    marked = np.zeros((16, 16), dtype=np.uint8)
    marked[4:12, 4:12] = 255
    for number in range(4):
        alpha = np.zeros((16, 16, channels), dtype=np.uint8)
        alpha[:, :, -1] = 0 if number == 3 else marked
        for folder, image in (("images", marked // 2 + number), ("masks", alpha)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    options = {"data": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), "cache_dir": str(tmp_path / "c")}
    assert "Does the alpha channel hold the mask? Then give mask_encoding='binary'" in str(
        examine(MaskedDataConfig(**options)).questions
    )
    sets = load_masked(MaskedDataConfig(**options, mask_encoding="binary"))
    assert sets.train.cache.counts.sum(axis=0).tolist() == [4 * 256 - 3 * 64, 3 * 64]
    with pytest.raises(ValueError, match="every pixel of the masks is 0"):
        load_masked(MaskedDataConfig(**options, mask_encoding="palette"))
