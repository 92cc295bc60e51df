"""Images and names that are unusual but right: what must come of each, derived without the package."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
from fault_checks.attempts import Case, Place, as_nobody, without_rights
from PIL import Image

from unet_diffusion.data.cache import cache_images
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.sources import open_source
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.masks import decode_mask
from unet_diffusion.images.resizing import Preparation

RANDOM = np.random.default_rng(1)
ORIENTATION = 0x0112


def _equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, found.dtype)
    assert (found == expected).all()


def cmyk(place: Place) -> None:
    """No ink is white; full cyan has no red; full black is black."""
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(place.folder / "a.tif")
    colours = np.array([[[255, 255, 255], [0, 255, 255], [0, 0, 0]]], dtype=np.uint8)
    _equal(decode_image(place.folder / "a.tif"), colours)


def _palette_with_alpha(place: Place) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(place.folder / "a.png", transparency=bytes([0, 255]))
    _equal(decode_image(place.folder / "a.png"), np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], dtype=np.uint8))
    _equal(decode_mask(place.folder / "a.png").keys, np.array([[0, 1]]))  # as a mask: the indices


def _sixteen_bits(place: Place) -> None:
    values = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(values).save(place.folder / "a.png")
    _equal(decode_image(place.folder / "a.png"), values[:, :, None])


def _one_pixel(place: Place) -> None:
    Image.new("L", (1, 1), 7).save(place.folder / "a.png")
    place.segment(place.folder / "a.png")
    with Image.open(place.folder / "out" / "a.png") as mask:
        assert mask.size == (1, 1)


def _larger_than_a_tile(place: Place) -> None:
    values = RANDOM.integers(0, 256, (70, 90), dtype=np.uint8)
    Image.fromarray(values).save(place.folder / "a.png")
    run, out = place.models / "segmentation", place.folder / "out"
    place.command("segment", "--run", run, "--output", out, "--tile-size", 16, "--inputs", place.folder / "a.png")
    with Image.open(out / "a.png") as mask:
        assert mask.size == (90, 70) and set(np.unique(mask)) <= {0, 1}


def _animation(place: Place) -> None:
    frames = [Image.new("L", (4, 3), value) for value in (50, 200)]
    frames[0].save(place.folder / "a.gif", save_all=True, append_images=frames[1:])
    found = decode_image(place.folder / "a.gif")
    assert found.shape == (3, 4, 3) and (found == 50).all()  # a palette of greys, as colours


def turned(place: Place) -> None:
    """Image and mask of the same stored pixels, of which the image alone states a quarter turn."""
    data = place.folder / "data"
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
        MaskedDataConfig(data=str(data / "images"), masks=str(data / "masks"), cache_dir=str(place.folder / "cache"))
    )
    upright = np.zeros((9, 6), dtype=np.int64)
    upright[:3, 5] = 1
    item = sets.train[0]
    _equal(item["image"][0].numpy(), (upright * 200).astype(np.uint8))
    _equal(item["mask"].numpy(), upright)


def raised_limit(place: Place) -> None:
    """An image above Pillow's limit is refused, named and left out; with the limit raised it is there."""
    images = place.images() / "images"
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 255
    try:
        Image.new("L", (15, 15), 9).save(images / "0.png")

        def count() -> int:
            rows = open_source(images)
            assert isinstance(rows, datasets.Dataset)
            return len(cache_images(rows, Preparation(image_size=8), "set", 1.0, place.folder / "cache"))

        assert count() == 1
        os.environ["UNET_DIFFUSION_MAX_PIXELS"] = "256"
        assert count() == 6
    finally:
        os.environ.pop("UNET_DIFFUSION_MAX_PIXELS", None)
        Image.MAX_IMAGE_PIXELS = limit


def one_broken(place: Place) -> None:
    """One of 200 is less than max_broken, so that the others are trained on."""
    images = place.images(count=200) / "images"
    (images / "3.png").write_bytes(b"")
    place.train(images)
    assert (place.folder / "run" / "model_index.json").is_file()


def repaired(place: Place) -> None:
    """A file that could not be read is read again when its rights, but not its time, have changed."""
    with as_nobody() as folder:
        for name in "ab":
            Image.new("L", (4, 4)).save(folder / f"{name}.png")
        (folder / ".cache").mkdir()  # a hidden one holds no images
        (folder / ".cache").chmod(0o777)

        def count(expected: int) -> None:
            rows = open_source(folder)
            assert isinstance(rows, datasets.Dataset)
            assert len(cache_images(rows, Preparation(), "set", 1.0, folder / ".cache")) == expected

        (folder / "a.png").chmod(0)
        without_rights(lambda: count(1))
        (folder / "a.png").chmod(0o644)
        without_rights(lambda: count(2))


def _not_utf8(place: Place) -> None:
    data = place.images()
    for part in ("images", "masks"):
        shutil.copy(data / part / "0.png", os.fsdecode(os.fsencode(data / part) + b"/caf\xe9.png"))
    place.train_masks(data)
    place.segment(data / "images")
    assert "caf\\xe9.png" in (place.folder / "out" / "areas.csv").read_text("utf-8")
    assert Path(os.fsdecode(os.fsencode(place.folder) + b"/out/caf\xe9.png")).is_file()


def _newline(place: Place) -> None:
    data = place.images()
    for part in ("images", "masks"):
        shutil.copy(data / part / "0.png", data / part / 'a\nb,"c.png')
    place.train_masks(data)
    place.segment(data / "images")
    assert (place.folder / "out" / 'a\nb,"c.png').is_file()


def loops(place: Place) -> None:
    """A folder that links to itself and to its parent holds each image once."""
    images = place.images() / "images"
    (images / "again").symlink_to(images)
    (images / "up").symlink_to(images.parent)
    rows = open_source(images)
    assert isinstance(rows, datasets.Dataset)
    assert len(rows) == 6 + 6  # and those of the folder of masks, which the second link leads to
    (images / "0.png").unlink()
    (images / "0.png").symlink_to(images / "0.png")
    place.train(images, "--max-broken", 0.5)


def folder_of_a_reader(place: Place) -> None:
    """A folder of Parquet files that is called parquet."""
    folder = place.folder / "parquet"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": [b"x"] * 3}).to_parquet(folder / "a.parquet")
    before = os.getcwd()
    os.chdir(place.folder)
    try:
        rows = open_source("parquet", image_column="image", cache_dir=place.folder / "cache")
    finally:
        os.chdir(before)
    assert isinstance(rows, datasets.Dataset) and len(rows) == 3


ODD = [
    Case("CMYK: colours as printed", cmyk),
    Case("palette with alpha: colours and alpha; as a mask, indices", _palette_with_alpha),
    Case("16 bits: kept", _sixteen_bits),
    Case("1-pixel image: a mask of 1 pixel", _one_pixel),
    Case("image larger than a tile: a mask of its size", _larger_than_a_tile),
    Case("animated GIF: the first frame", _animation),
    Case("EXIF rotation: applied to image and mask", turned),
    Case("limit of pixels raised: the image is used", raised_limit),
    Case("one zero-byte file of 200: left out, training goes on", one_broken),
    Case("file made readable: used, though its time is as it was", repaired),
    Case("names that are not UTF-8: trained on, segmented, listed", _not_utf8),
    Case("names with newline, comma and quote", _newline),
    Case("symlink loops: every image once; a link to itself is left out", loops),
    Case("folder called parquet: read as a folder", folder_of_a_reader),
]
