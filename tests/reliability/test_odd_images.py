"""Unusual but valid images and names give the right values, which are derived without the package."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from tests.reliability.sandbox import as_nobody, without_rights
from unet_diffusion.data.cache import cache_images
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.sources import open_source
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.masks import decode_mask
from unet_diffusion.images.resizing import Preparation

PROMISE = "Unusual input"
RANDOM = np.random.default_rng(1)
ORIENTATION = 0x0112


def _equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, found.dtype)
    assert (found == expected).all()


def test_CMYK_colours_are_as_printed(sandbox):
    """No ink is white; full cyan has no red; full black is black."""
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(sandbox.folder / "a.tif")
    colours = np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0]]], dtype=np.uint8)
    _equal(decode_image(sandbox.folder / "a.tif"), colours)


def test_a_palette_with_alpha_is_colours_and_alpha_and_as_a_mask_the_indices(sandbox):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(sandbox.folder / "a.png", transparency=bytes([0, 255]))
    _equal(decode_image(sandbox.folder / "a.png"), np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], dtype=np.uint8))
    _equal(decode_mask(sandbox.folder / "a.png").keys, np.array([[0, 1]]))  # as a mask: the indices


def test_sixteen_bits_are_kept(sandbox):
    values = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(values).save(sandbox.folder / "a.png")
    _equal(decode_image(sandbox.folder / "a.png"), values[:, :, None])


def test_an_image_of_1_pixel_has_a_mask_of_1_pixel(sandbox):
    Image.new("L", (1, 1), 7).save(sandbox.folder / "a.png")
    sandbox.segment(sandbox.folder / "a.png")
    with Image.open(sandbox.folder / "out" / "a.png") as mask:
        assert mask.size == (1, 1)


def test_an_image_larger_than_a_tile_has_a_mask_of_its_size(sandbox):
    values = RANDOM.integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(values).save(sandbox.folder / "a.png")
    run, out = sandbox.models / "segmentation", sandbox.folder / "out"
    sandbox.command("segment", "--run", run, "--output", out, "--tile-size", 16, "--inputs", sandbox.folder / "a.png")
    with Image.open(out / "a.png") as mask:
        assert mask.size == (90, 70) and set(np.unique(mask)) <= {0, 1}


def test_the_first_frame_of_an_animated_GIF_is_the_image(sandbox):
    frames = [Image.new("L", (4, 3), value) for value in (50, 200)]
    frames[0].save(sandbox.folder / "a.gif", save_all=True, append_images=frames[1:])
    found = decode_image(sandbox.folder / "a.gif")
    assert found.shape == (3, 4, 3) and (found == 50).all()  # a palette of greys, as colours


def test_EXIF_rotation_is_applied_to_image_and_mask(sandbox):
    """Image and mask of the same stored pixels, of which the image alone states a quarter turn."""
    data = sandbox.folder / "data"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    stored = np.zeros((6, 9), dtype=np.uint8)
    stored[0, :3] = 1
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the stored first row is the right column of the upright image
    for i in range(3):
        Image.fromarray(stored * 200).save(data / "images" / f"{i}.png", exif=exif)
        Image.fromarray(stored).save(data / "masks" / f"{i}.png")
    sets = load_masked(
        MaskedDataConfig(data=str(data / "images"), masks=str(data / "masks"), cache_dir=str(sandbox.folder / "cache"))
    )
    upright = np.zeros((9, 6), dtype=np.int64)
    upright[:3, 5] = 1
    item = sets.train[0]
    _equal(item["image"][0].numpy(), (upright * 200).astype(np.uint8))
    _equal(item["mask"].numpy(), upright)


def test_an_image_is_used_after_the_limit_of_pixels_is_raised(sandbox, monkeypatch):
    """An image above Pillow's limit is refused, named and left out; with the limit raised it is there."""
    images = sandbox.images() / "images"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 255)
    Image.new("L", (15, 15), 9).save(images / "0.png")

    def count() -> int:
        return len(cache_images(open_source(images), Preparation(image_size=8), "set", 1.0, sandbox.folder / "cache"))

    assert count() == 1
    monkeypatch.setenv("UNET_DIFFUSION_MAX_PIXELS", "256")
    assert count() == 6


def test_one_empty_file_of_200_is_left_out_and_named(sandbox, caplog):
    """That is less than max_broken, so the others are trained on."""
    images = sandbox.images(count=200) / "images"
    (images / "3.png").write_bytes(b"")
    sandbox.train(images)
    assert (sandbox.folder / "run" / "model_index.json").is_file()
    assert any("row 123: " in text and "3.png is empty" in text for text in caplog.messages)  # in order of names


def test_a_file_made_readable_is_used_though_its_time_is_as_it_was(sandbox):
    """A file that could not be read is read again when its rights, but not its time, have changed."""
    with as_nobody() as folder:
        for name in "ab":
            Image.new("L", (4, 4)).save(folder / f"{name}.png")
        (folder / ".cache").mkdir()  # a hidden one holds no images
        (folder / ".cache").chmod(0o777)

        def count(expected: int) -> None:
            rows = open_source(folder)
            assert len(cache_images(rows, Preparation(), "set", 1.0, folder / ".cache")) == expected

        (folder / "a.png").chmod(0)
        without_rights(lambda: count(1))
        (folder / "a.png").chmod(0o644)
        without_rights(lambda: count(2))


def test_names_that_are_not_UTF8_are_trained_on_segmented_and_listed(sandbox):
    data = sandbox.images()
    for part in ("images", "masks"):
        shutil.copy(data / part / "0.png", os.fsdecode(os.fsencode(data / part) + b"/caf\xe9.png"))
    sandbox.train_masks(data)
    sandbox.segment(data / "images")
    assert "caf\\xe9.png" in (sandbox.folder / "out" / "areas.csv").read_text("utf-8")
    assert Path(os.fsdecode(os.fsencode(sandbox.folder) + b"/out/caf\xe9.png")).is_file()


def test_names_with_newline_comma_and_quote_are_trained_on_and_segmented(sandbox):
    data = sandbox.images()
    for part in ("images", "masks"):
        shutil.copy(data / part / "0.png", data / part / 'a\nb,"c.png')
    sandbox.train_masks(data)
    sandbox.segment(data / "images")
    assert (sandbox.folder / "out" / 'a\nb,"c.png').is_file()


def test_symlink_loops_give_every_image_once(sandbox):
    """A folder that links to itself and to its parent holds each image once."""
    images = sandbox.images() / "images"
    (images / "again").symlink_to(images)
    (images / "up").symlink_to(images.parent)
    rows = open_source(images)
    assert len(rows) == 6 + 6  # and those of the folder of masks, which the second link leads to
    (images / "0.png").unlink()
    (images / "0.png").symlink_to(images / "0.png")
    sandbox.train(images, "--max-broken", 0.5)


def test_a_folder_called_parquet_is_read_as_a_folder(sandbox, monkeypatch):
    """The folder has the name of a reader of `datasets`."""
    folder = sandbox.folder / "parquet"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": [b"x"] * 3}).to_parquet(folder / "a.parquet")
    monkeypatch.chdir(sandbox.folder)
    assert len(open_source("parquet", image_column="image", cache_dir=sandbox.folder / "cache")) == 3
