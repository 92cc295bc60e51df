"""Masks of files: window by window where they are large, and the command that segments folders."""

import csv
import io
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from tests.support.segmentation import image, network, pipeline, saved
from unet_diffusion.cli import run
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.segment import segment
from unet_diffusion.images.large_images import create_mask, open_image
from unet_diffusion.images.pixel_range import PixelRange


@pytest.mark.parametrize("suffix", [".npy", ".tif", ".zarr", ".NPY", ".TIF"])
def test_files_are_segmented_window_by_window(tmp_path, suffix):
    pytest.importorskip({".npy": "numpy", ".tif": "tifffile", ".zarr": "zarr"}[suffix.lower()])
    pipe = pipeline(network(norm="none", attention=(False, False)))
    pixels = image(70, 41)
    expected = pipe(pixels, output_type="np").masks[0]
    source, target = tmp_path / f"image{suffix}", tmp_path / f"mask{suffix}"
    if suffix.lower() == ".npy":
        with open(source, "wb") as file:  # a path would get another suffix
            np.save(file, pixels)
    elif suffix.lower() == ".tif":
        import tifffile

        tifffile.imwrite(source, pixels[..., 0], tile=(16, 16), compression="zlib")
    else:
        import zarr

        zarr.create_array(source, data=pixels, chunks=(16, 16, 1))
    pipe.segment_file(source, target, tile_size=16)
    assert np.array_equal(open_image(target).read(slice(0, 70), slice(0, 41))[..., 0], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, target.name])
    with pytest.raises(ValueError, match="exists already"):
        pipe.segment_file(source, target)


def test_any_array_can_be_read_and_written():
    pipe = pipeline(network(norm="none", attention=(False, False)))
    pixels, mask = image(50, 41), np.full((50, 41), 9, dtype=np.uint8)
    pipe.segment_file(pixels, mask, tile_size=16)
    assert np.array_equal(mask, pipe(pixels, output_type="np").masks[0])
    with pytest.raises(ValueError, match=r"target has shape \(3, 3\)"):
        pipe.segment_file(pixels, mask[:3, :3])


def test_planar_tiff_channels_and_other_byte_orders_are_understood(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.arange(3 * 20 * 30, dtype=np.uint16).reshape(3, 20, 30)
    tifffile.imwrite(tmp_path / "p.tif", values, photometric="rgb", planarconfig="separate", byteorder=">")
    opened = open_image(tmp_path / "p.tif")
    assert (opened.shape, opened.dtype) == ((20, 30, 3), np.dtype("uint16"))
    assert np.array_equal(opened.read(slice(3, 9), slice(5, 30)), np.moveaxis(values, 0, 2)[3:9, 5:30])


@pytest.mark.parametrize(("name", "message"), [("a.jpg", "cannot be read in windows"), ("b.npy", "does not exist")])
def test_files_that_cannot_be_read_in_windows_are_refused(tmp_path, name, message):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=message):
        open_image(tmp_path / name)


def test_a_failed_run_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="channels"):
        pipeline().segment_file(image(9, 9, 3), tmp_path / "mask.npy")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'mask.png'} cannot be written in windows")):
        pipeline().segment_file(image(9, 9), tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_in_files_as_in_memory(tmp_path, value):
    pipe = pipeline(pixel_range=PixelRange((0.0,), (1.0,), "float32").to_dict())
    pixels = np.zeros((70, 41))
    pixels[60, 40] = value
    np.save(tmp_path / "image.npy", pixels)
    for segment_it in (pipe, lambda source: pipe.segment_file(source, tmp_path / "mask.npy", tile_size=16)):
        with pytest.raises(ValueError, match="image.npy has pixels that are NaN or infinite"):
            segment_it(tmp_path / "image.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["image.npy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extratags": [(274, "H", 1, 6, True)]}, r"turned or mirrored \(orientation 6\); store it upright"),
        (
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "a table of colours; convert it to RGB",
        ),
        ({"photometric": "cielab"}, "holds colours as CIELAB; convert it to RGB"),
        ({"bitspersample": 2}, "has 2 bits a value, which are scaled to 8 .*; store it with 8 bits"),
        ({"bitspersample": 4, "photometric": "miniswhite"}, "has 4 bits a value, .*; store it with 8 bits"),
    ],
)
def test_tiff_files_that_are_shown_otherwise_than_stored_are_refused(tmp_path, options, message):
    tifffile = pytest.importorskip("tifffile")
    shape = (9, 14, 3) if options.get("photometric") == "cielab" else (9, 14)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(shape, np.uint8), **options)
    with pytest.raises(ValueError, match=f"a.tif .*{message}, or segment it whole"):
        open_image(tmp_path / "a.tif")


def test_a_large_strip_is_warned_of(tmp_path, monkeypatch, caplog):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("zarr")
    monkeypatch.setattr("unet_diffusion.images.large_images.LARGE_PART", 2**20)
    pixels = np.zeros((1025, 1024), np.uint8)
    tifffile.imwrite(tmp_path / "tiles.tif", pixels, tile=(512, 512), compression="zlib")
    open_image(tmp_path / "tiles.tif")
    assert not caplog.messages
    tifffile.imwrite(tmp_path / "strip.tif", pixels, rowsperstrip=1025, compression="zlib")
    open_image(tmp_path / "strip.tif")
    assert "strip.tif is compressed in parts of 1 MiB" in caplog.messages[0]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_new_mask_has_its_room_on_the_disk(tmp_path, suffix):
    """A mapped file without room would kill the process when the disk is full."""
    pytest.importorskip({".npy": "numpy", ".tif": "tifffile"}[suffix])
    path = tmp_path / f"mask{suffix}"
    create_mask(path, 1000, 1000)
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 1_000_000


# --- the command ---


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def folder_of_images(folder: Path) -> Path:
    for name, seed in (("a/x.png", 0), ("b/x.png", 1), ("b/y.png", 2)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(12, 10, seed=seed)[..., 0]).save(folder / name)
    return folder


def test_the_command_writes_masks_overlays_and_areas_and_goes_on_after_a_bad_file(tmp_path):
    pipe = saved(tmp_path / "run")
    images = folder_of_images(tmp_path / "images")
    (images / "b" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "out"
    arguments = ["--run", tmp_path / "run", "--inputs", images, "--output", output, "--device", "cpu"]
    with pytest.raises(
        SystemExit, match=r"(?s)1 of 4 inputs failed.*broken.png cannot be decoded"
    ):  # a message makes the exit status 1
        run("segment", [str(argument) for argument in arguments])
    stems = ("a/x", "b/x", "b/y")
    assert files_in(output) == {
        *(".lock", "areas.csv", "segment.jsonl"),
        *(f"{stem}{ending}.png" for stem in stems for ending in ("", "-overlay")),
    }
    for stem in stems:
        name = f"{stem}.png"
        expected = np.asarray(pipe(images / name).masks[0])
        assert np.array_equal(np.asarray(Image.open(output / f"{stem}.png")), expected)
        rows = [
            row
            for row in csv.DictReader(io.StringIO((output / "areas.csv").read_text()))
            if row["mask"] == f"{stem}.png"
        ]
        assert [row["class"] for row in rows] == ["ground", "cell", "border"]
        assert [int(row["pixels"]) for row in rows] == np.bincount(expected.ravel(), minlength=3).tolist()
        assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=2e-6)
        assert {row["file"] for row in rows} == {str(images / name)}
        assert {row["error"] for row in rows} == {""}
    (failed,) = (row for row in csv.DictReader(io.StringIO((output / "areas.csv").read_text())) if row["error"])
    assert failed["file"] == str(images / "b" / "broken.png") and "cannot be decoded" in failed["error"]
    assert [failed[name] for name in ("mask", "class", "pixels", "share")] == [""] * 4


def test_results_are_not_overwritten_unless_asked(tmp_path):
    saved(tmp_path / "run")
    images = folder_of_images(tmp_path / "images")
    options = {"run": tmp_path / "run", "output": tmp_path / "out", "device": "cpu"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "y.png").write_bytes(b"mine")
    with pytest.raises(RuntimeError, match=r"y.png exists already"):
        segment(Segment(inputs=(str(images / "b"),), **options))
    assert (tmp_path / "out" / "y.png").read_bytes() == b"mine"
    assert (tmp_path / "out" / "x.png").exists()
    segment(Segment(inputs=(str(images / "b" / "*.png"),), overwrite=True, **options))
    assert Image.open(tmp_path / "out" / "y.png").mode == "P"
    with pytest.raises(RuntimeError, match=f"x.png holds the result of {images / 'b' / 'x.png'}"):
        segment(Segment(inputs=(str(images / "a"),), **options))
    (tmp_path / "out" / "segment.jsonl").unlink()
    with pytest.raises(ValueError, match="areas.csv exists already"):
        segment(Segment(inputs=(str(images / "b"),), **options))


def test_overlays_can_be_left_out(tmp_path):
    saved(tmp_path / "run")
    images = folder_of_images(tmp_path / "images")
    options = Segment(run=tmp_path / "run", output=tmp_path / "out", device="cpu", inputs=(str(images),))
    both = segment(options)
    plain = segment(replace(options, output=tmp_path / "plain", overlays=False))
    assert files_in(plain) == {name for name in files_in(both) if not name.endswith("-overlay.png")}
    assert all((plain / name).read_bytes() == (both / name).read_bytes() for name in files_in(plain) if "/" in name)


def test_a_table_that_was_changed_is_not_replaced_unless_asked(tmp_path):
    saved(tmp_path / "run")
    images = folder_of_images(tmp_path / "images")
    options = Segment(run=tmp_path / "run", output=tmp_path / "out", device="cpu", inputs=(str(images),))
    table = segment(options) / "areas.csv"
    whole = table.read_bytes()
    segment(options)
    assert table.read_bytes() == whole
    table.write_text("mine")
    with pytest.raises(ValueError, match="areas.csv was changed after it was written"):
        segment(options)
    assert table.read_text() == "mine"
    segment(replace(options, overwrite=True))
    assert table.read_bytes() == whole


def test_a_mask_whose_name_would_be_a_formula_in_a_spreadsheet_is_a_path(tmp_path):
    saved(tmp_path / "run")
    for name in ("=1+1", "+1", "-1", "@a", "a"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image(12, 10)[..., 0]).save(tmp_path / "images" / f"{name}.png")
    options = Segment(run=tmp_path / "run", inputs=(tmp_path / "images",), output=tmp_path / "out", device="cpu")
    for _ in range(2):  # the second call makes nothing again
        table = pandas.read_csv(segment(options) / "areas.csv")
        assert set(table["mask"]) == {"./=1+1.png", "./+1.png", "./-1.png", "./@a.png", "a.png"}
        assert all((tmp_path / "out" / name).is_file() for name in table["mask"])


def test_inputs_that_are_missing_are_named(tmp_path):
    saved(tmp_path / "run")
    with pytest.raises(ValueError, match="there is no image"):
        segment(Segment(run=tmp_path / "run", inputs=(tmp_path / "nowhere",), device="cpu"))
    with pytest.raises(ValueError, match="inputs is empty"):
        Segment()
    with pytest.raises(ValueError, match="no model_index.json"):
        segment(Segment(run=tmp_path, inputs=("x",)))
