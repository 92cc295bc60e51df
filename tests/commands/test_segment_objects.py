"""The objects that the command finds: label images, outlines and tables, also after a stop or with other options."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from tests.commands.test_segment import files_in
from tests.support.segmentation import SMALL
from unet_diffusion import UNet
from unet_diffusion.cli import run
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.segment import segment
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.figures import encoded_labels
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.palette import colour, outlines, overlay
from unet_diffusion.pipelines import SegmentationPipeline

NAMES = ["ground", "dim", "bright"]
TABLES = {"objects.csv", "objects.parquet", "counts.csv"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that calls pixels dim from 64 on and bright from 192 on, whatever lies beside them."""
    unet = UNet(**{**SMALL, "out_channels": None, "norm": "none", "attention": (False, False)}, num_classes=3)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
        unet.stem.weight[0, 0, 1, 1], unet.stem.bias[0] = 10, 20  # 10 to 30, where SiLU changes nothing
        unet.decoder[0].blocks.blocks[0].shortcut[1].weight[0, [0, 4]] = 1  # of the skip connection; the rest is 0
        unet.segmentation_head.weight[:, 0, 0, 0] = torch.tensor([0.0, 4.0, 8.0])
        unet.segmentation_head.bias.copy_(torch.tensor([0.0, -60.0, -160.0]))
    folder = tmp_path_factory.mktemp("trained") / "run"
    SegmentationPipeline(unet.eval(), class_names=NAMES).save_pretrained(folder)
    return folder


def drawing(*squares: tuple[int, int, int], size: tuple[int, int] = (24, 30)) -> np.ndarray:
    """Squares of 5 pixels a side at a row and a column, with a value, on black."""
    image = np.zeros(size, dtype=np.uint8)
    for top, left, value in squares:
        image[top : top + 5, left : left + 5] = value
    return image


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    drawings = {
        "a/x": drawing((2, 2, 128), (2, 12, 255), (12, 7, 128)),
        "b/x": drawing((4, 4, 255)),
        "b/none": drawing(),
    }
    for name, pixels in drawings.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def options(trained: Path, images: Path, **changes) -> Segment:
    output = changes.pop("output", images.parent / "out")
    return Segment(run=trained, inputs=(str(images),), output=output, device="cpu", instances=True, **changes)


def test_label_images_outlines_and_tables(trained, images):
    output = images.parent / "out"
    given = ["--run", trained, "--inputs", images, "--output", output, "--device", "cpu", "--instances"]
    run("segment", [str(word) for word in given])
    endings = (".png", "-overlay.png", "-objects.tif", "-objects.csv")
    assert files_in(output) == {
        *(".lock", "areas.csv", "segment.jsonl", *TABLES),
        *(f"{stem}{ending}" for stem in ("a/x", "b/x", "b/none") for ending in endings),
    }
    labels = decode_image(output / "a" / "x-objects.tif")[..., 0]
    expected = np.zeros((24, 30), dtype=np.uint16)
    expected[2:7, 2:7], expected[2:7, 12:17], expected[12:17, 7:12] = 1, 2, 3
    assert labels.dtype == np.uint16 and np.array_equal(labels, expected)
    assert not decode_image(output / "b" / "none-objects.tif").any()

    table = rows(output / "objects.csv")
    assert [(Path(row["file"]).relative_to(images).as_posix(), row["object"], row["class_name"]) for row in table] == [
        ("a/x.png", "1", "dim"),
        ("a/x.png", "2", "bright"),
        ("a/x.png", "3", "dim"),
        ("b/x.png", "1", "bright"),
    ]
    assert [float(row["mean_0"]) for row in table] == [128, 255, 128, 255]
    assert {row["area"] for row in table} == {"25"}
    assert [(row["y"], row["x"]) for row in table] == [("4", "4"), ("4", "14"), ("14", "9"), ("6", "6")]
    parquet = pandas.read_parquet(output / "objects.parquet")
    pandas.testing.assert_frame_equal(parquet, pandas.read_csv(output / "objects.csv"), check_dtype=False)
    assert {name: parquet[name].dtype.kind for name in ("object", "area", "confidence", "y")} == {
        **dict.fromkeys(("object", "area"), "i"),
        **dict.fromkeys(("confidence", "y"), "f"),
    }
    counts = [
        (Path(row["file"]).stem, row["class_name"], row["objects"], row["area"]) for row in rows(output / "counts.csv")
    ]
    assert counts == [
        *(("x", "dim", "2", "50"), ("x", "bright", "1", "25")),
        *(("none", "dim", "0", "0"), ("none", "bright", "0", "0")),
        *(("x", "dim", "0", "0"), ("x", "bright", "1", "25")),
    ]
    assert rows(output / "a" / "x-objects.csv") == [
        {name: value for name, value in row.items() if name != "file"} for row in table[:3]
    ]


def test_a_stopped_command_goes_on_and_its_tables_have_all_images(trained, images, monkeypatch):
    whole = segment(options(trained, images, output=images.parent / "whole"))
    (images / "b").rename(images.parent / "later")
    output = segment(options(trained, images))
    assert len(rows(output / "objects.csv")) == 3
    (output / "objects.parquet").unlink()  # as if the command was killed before it wrote it
    (images.parent / "later").rename(images / "b")
    segment(options(trained, images))
    for name in TABLES:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    before = {name: (output / name).stat().st_mtime_ns for name in files_in(output) if "x" in Path(name).stem}
    segment(options(trained, images))
    assert before == {name: (output / name).stat().st_mtime_ns for name in before}


def test_what_is_smaller_than_the_objects_of_the_training_is_left_out_and_that_is_said(trained, images, caplog):
    pipe = SegmentationPipeline.from_pretrained(trained)
    pipe.unet.register_to_config(object_min_area=26)  # one pixel more than a square has
    pipe.save_pretrained(images.parent / "learnt")
    output = segment(options(images.parent / "learnt", images))
    assert rows(output / "objects.csv") == [] and "objects of fewer than 26 pixels are left out" in caplog.text
    caplog.clear()
    segment(options(images.parent / "learnt", images, min_area=0))  # another option, so they are made again
    assert len(rows(output / "objects.csv")) == 4 and "left out" not in caplog.text
    segment(replace(options(images.parent / "learnt", images), instances=False))
    assert "left out" not in caplog.text


def test_other_options_make_objects_again_and_without_objects_they_are_removed(trained, images):
    output = segment(options(trained, images))
    segment(options(trained, images, min_area=26))
    assert rows(output / "objects.csv") == []
    assert list(pandas.read_parquet(output / "objects.parquet")) == list(pandas.read_csv(output / "objects.csv"))
    assert [row["objects"] for row in rows(output / "counts.csv")] == ["0"] * 6
    (images / "a" / "x.png").rename(images.parent / "x.png")
    segment(replace(options(trained, images), instances=False))
    left = {name for name in files_in(output) if "objects" in name}
    assert left == {*TABLES - {"counts.csv"}, "a/x-objects.tif", "a/x-objects.csv"}
    assert {Path(row["file"]).name for row in rows(output / "counts.csv")} == {"x.png"}
    (images.parent / "x.png").rename(images / "a" / "x.png")
    segment(replace(options(trained, images), instances=False))
    assert not [name for name in files_in(output) if "objects" in name or "counts" in name]


def test_tables_of_a_user_are_not_overwritten_unless_asked(trained, images):
    output = images.parent / "out"
    output.mkdir()
    (output / "counts.csv").write_text("mine")
    with pytest.raises(ValueError, match="counts.csv exists already"):
        segment(options(trained, images))
    assert segment(replace(options(trained, images), instances=False)) == output
    assert (output / "counts.csv").read_text() == "mine"
    with pytest.raises(ValueError, match="counts.csv exists already; set overwrite"):
        segment(options(trained, images))
    segment(options(trained, images, overwrite=True))
    assert len(rows(output / "counts.csv")) == 6
    (output / "objects.csv").write_text("mine")
    with pytest.raises(ValueError, match="objects.csv exists already"):
        segment(options(trained, images))
    segment(replace(options(trained, images), instances=False))
    assert (output / "objects.csv").read_text() == "mine"


def test_a_failed_image_is_in_no_table_of_objects(trained, images):
    (images / "b" / "x.png").write_bytes(b"no image")
    with pytest.raises(RuntimeError, match="1 of 3 inputs failed"):
        segment(options(trained, images))
    assert {Path(row["file"]).parent.name for row in rows(images.parent / "out" / "objects.csv")} == {"a"}


def test_options_of_objects_are_whole_numbers_of_pixels(trained):
    for name, value in (("min_area", -1), ("max_hole", 2.5)):
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be a whole number of pixels"):
            Segment(run=trained, inputs=("x",), instances=True, **{name: value})
        with pytest.raises(ValueError, match=f"{name} is 5, but objects are not asked for"):
            Segment(run=trained, inputs=("x",), **{name: 5})


def test_areas_in_micrometres_for_files_that_say_their_pixel_size(trained, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = drawing((2, 2, 128), (12, 12, 128))
    pixels[3, 3] = 0  # a hole of a pixel, 0.02 square micrometres
    pixels[12, 12:17] = 0  # 20 pixels of 0.02 square micrometres are left
    tifffile.imwrite(folder / "a.tif", pixels, resolution=(10, 5), resolutionunit="MICROMETER")  # 0.2 by 0.1
    Image.fromarray(pixels).save(folder / "b.png", dpi=(300, 300))

    output = segment(options(trained, folder))
    own = pandas.read_csv(output / "a-objects.csv")
    assert own["area_um2"].tolist() == [0.48, 0.4] and own["area"].tolist() == [24, 20]
    assert own["major_axis_um"][1] == pytest.approx(4 * np.sqrt((4**2 - 1) / 12) * 0.2)
    assert own["minor_axis_um"][1] == pytest.approx(4 * np.sqrt((5**2 - 1) / 12) * 0.1)
    assert "area_um2" not in pandas.read_csv(output / "b-objects.csv")
    joined = pandas.read_csv(output / "objects.csv")
    assert joined["area_um2"].isna().tolist() == [False, False, True, True]
    pandas.testing.assert_frame_equal(pandas.read_parquet(output / "objects.parquet"), joined, check_dtype=False)

    with pytest.raises(RuntimeError, match="1 of 2 inputs failed") as raised:
        segment(options(trained, folder, unit="micrometre", min_area=0.4, max_hole=0.02))
    assert "unit is 'micrometre', but" in str(raised.value) and "b.png says no pixel size" in str(raised.value)
    assert pandas.read_csv(output / "a-objects.csv")["area"].tolist() == [25, 20]
    assert set(pandas.read_csv(output / "objects.csv")["file"]) == {str(folder / "a.tif")}
    (folder / "b.png").unlink()
    segment(options(trained, folder, unit="micrometre", min_area=0.401, max_hole=0.019))
    assert pandas.read_csv(output / "a-objects.csv")["area"].tolist() == [24]


def test_areas_in_micrometres_are_numbers_and_others_whole_numbers(trained):
    given = {"run": trained, "inputs": ("x",), "instances": True}
    assert Segment(**given, min_area=3.0).min_area == 3
    assert Segment(**given, min_area=2.5, unit="micrometre").min_area == 2.5
    with pytest.raises(ValueError, match="min_area is -1, but must be 0 square micrometres or more"):
        Segment(**given, min_area=-1, unit="micrometre")
    with pytest.raises(ValueError, match="unit is 'um', but must be one of 'pixel', 'micrometre'"):
        Segment(**given, unit="um")


@pytest.mark.parametrize(("highest", "kind"), [(0, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_label_images_keep_every_number(highest, kind, tmp_path):
    pytest.importorskip("tifffile")
    labels = np.array([[0, 1, 0], [highest, 0, 0]], dtype=np.int32)
    (tmp_path / "labels.tif").write_bytes(encoded_labels(labels))
    opened = open_image(tmp_path / "labels.tif")
    assert opened.dtype == np.dtype(kind)
    assert np.array_equal(opened.read(slice(0, 2), slice(0, 3))[..., 0], labels)


def test_outlines_are_opaque_and_inside_of_the_objects():
    mask = np.zeros((7, 12), dtype=np.uint8)
    mask[1:6, 1:11] = 1
    objects = mask.astype(np.int32)
    objects[1:6, 6:11] = 2
    shown = np.asarray(overlay(Image.new("L", (12, 7), 100), mask, 0, [[0, 0, 0], [9, 8, 7]], objects))
    inner = np.zeros(mask.shape, dtype=bool)
    inner[2:5, 2:5] = inner[2:5, 7:10] = True
    assert (shown[(mask > 0) & ~inner] == [9, 8, 7]).all()
    assert (shown[inner | (mask == 0)] == 100).all()


def test_outlines_have_the_colour_of_the_class_of_most_pixels():
    """Also where the mask is background, as in a hole that was filled."""
    mask, objects = np.zeros((12, 24), dtype=np.uint8), np.zeros((12, 24), dtype=np.int32)
    objects[2:10, 2:10], objects[2:10, 14:22] = 1, 2
    mask[2:10, 3:10], mask[2:5, 3:10] = 2, 1
    shown = np.asarray(overlay(Image.new("L", (24, 12), 10), mask, 0.0, objects=objects))
    assert {tuple(pixel) for pixel in shown[outlines(objects) & (objects == 1)].tolist()} == {colour(2)}
    assert {tuple(pixel) for pixel in shown[outlines(objects) & (objects == 2)].tolist()} == {colour(1)}
    assert {tuple(pixel) for pixel in shown[~outlines(objects)].tolist()} == {(10, 10, 10)}
