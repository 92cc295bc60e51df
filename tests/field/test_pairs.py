"""Images and masks are paired as their names say, or it is asked; polygons are refused by that name."""

import json
import re
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.package.documentation import ROOT, blocks
from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.data.folders import check_sources
from unet_diffusion.data.masked.config import MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.pairing import pair
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.masked.sources import open_masked_source
from unet_diffusion.segmentation.instances import separate_instances
from unet_diffusion.segmentation.objects import find_objects, one_hot


def share(tmp_path: Path, data: Path, **options) -> tuple[int, list[float]]:
    """The number of images with masks, and the share of pixels that each class has."""
    options = {"cache_dir": str(tmp_path / "cache"), "max_broken": 0.0, **options}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    sets = load_masked(MaskedDataConfig(data=str(data), **options))
    counts = sum(each.class_counts() for each in (sets.train, sets.validation)).numpy()
    return len(sets.train) + len(sets.validation), (counts / counts.sum()).round(4).tolist()


def names(data: Path, **options) -> dict[str, str | None]:
    """The path of the mask of each image, both below the folder of the test."""
    found = {}
    for row in open_masked_source(data, **options).rows:
        image, mask = (None if row[column] is None else Path(row[column]["path"]).name for column in ("image", "mask"))
        found[image] = mask
    return found


def save(folder: Path, *files: str, size: int = 4) -> Path:
    """Images of one value each, which differs from file to file."""
    for number, file in enumerate(files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size), number).save(folder / file)
    return folder


# cases from the field


def test_retinal_images_are_paired_by_their_number(field, tmp_path):
    folder, right = field("retinal_pictures_paired_by_number")
    masks = folder / "1st_manual"
    assert share(tmp_path, folder / "images", masks=masks) == (8, right["vessels"])
    assert share(tmp_path, folder / "images", masks=masks, mask_suffix="_manual1") == (8, right["vessels"])
    options = {"image_suffix": "_training", "mask_suffix": "_manual1"}
    assert share(tmp_path, folder / "images", masks=masks, **options) == (8, right["vessels"])
    (told,) = open_masked_source(folder / "images", masks=masks).notes
    assert told.startswith("images are paired with masks by the part of their names that differs: ")
    assert told.endswith(": 21_training.tif with 21_manual1.gif.")
    (view,) = open_masked_source(folder / "images", masks=folder / "mask", mask_suffix="_mask").notes
    assert "21_training.tif with 21_training_mask.gif" in view
    with pytest.raises(ValueError, match="several folders of masks: images and 1st_manual, mask.*masks='.*1st_manual'"):
        open_masked_source(folder)


def test_cells_with_suffixes_on_both_sides_or_beside(field, tmp_path):
    folder, right = field("cell_labels_of_cellpose")
    read = {"mask_encoding": "instances"}
    both = {"image_suffix": "_img", "mask_suffix": "_masks"}
    assert share(tmp_path, folder / "both_suffixes", **both, **read) == (6, right["shares"])
    assert share(tmp_path, folder / "both_suffixes", mask_suffix="_masks", **read) == (6, right["shares"])
    assert share(tmp_path, folder / "beside", mask_suffix="_masks", **read) == (6, right["shares"])
    with pytest.raises(ValueError, match="give image_suffix='_img' and mask_suffix='_masks'"):
        open_masked_source(folder / "both_suffixes")
    for options in ({}, {"masks": folder / "beside"}):
        with pytest.raises(ValueError, match="give mask_suffix='_masks'"):
            open_masked_source(folder / "beside", **options)
    with pytest.raises(ValueError, match=r"well_000_seg.npy.*Cellpose's window.*Save masks as PNG/TIFF"):
        open_masked_source(folder / "images", masks=folder / "gui")
    for file in (folder / "gui").iterdir():
        shutil.copy(file, folder / "beside")
    opened = open_masked_source(folder / "beside", mask_suffix="_masks")
    assert len(opened.rows) == 6
    assert opened.notes[0].startswith("6 files such as well_000_seg.npy are left out")


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("dsb", {"masks_per_image": "objects"}),
        ("dsb", {"masks": "dsb", "masks_per_image": "objects"}),
        ("images", {"masks": "per_class", "masks_per_image": "classes", "num_classes": 3}),
        ("images", {"masks": "per_class", "mask_suffix": "class_cell"}),
        ("images", {"masks": "prefix"}),
        ("images", {"masks": "prefix", "mask_prefix": "mask_"}),
        ("images", {"masks": "with_ending"}),
        ("images", {"masks": "with_ending", "mask_suffix": ".jpg"}),
        ("imagesTr", {"masks": "labelsTr"}),
        ("imagesTr", {"masks": "labelsTr", "image_suffix": "_0000"}),
    ],
)
def test_other_annotations(field, tmp_path, data, options):
    folder, right = field("annotations_other_than_a_mask_per_picture")
    options = {name: folder / value if name == "masks" else value for name, value in options.items()}
    count, shares = share(tmp_path, folder / data, **options)
    assert (count, shares[:2]) == (8, right["shares"])
    assert shares[2:] == [0] * (options.get("num_classes", 2) - 2)


def test_objects_are_numbered_and_classes_are_named(field, tmp_path):
    folder, _ = field("annotations_other_than_a_mask_per_picture")
    options = {"cache_dir": str(tmp_path / "cache")}
    objects = load_masked(MaskedDataConfig(data=str(folder / "dsb"), masks_per_image="objects", **options))
    assert all(np.unique(instances).tolist() == [0, 1, 2, 3] for instances in objects.train.cache.instances)
    classes = {"masks": str(folder / "per_class"), "masks_per_image": "classes"}
    config = MaskedDataConfig(data=str(folder / "images"), **classes, **options)
    assert load_masked(config).class_names == ("background", "cell", "dirt")
    report = examine(config)
    table = [line.split() for line in report.summary.lines() if line.endswith(" 8")]
    assert [row[2:4] for row in table] == [["background", "92.6%"], ["cell", "7.4%"]]
    assert "class 2 (dirt) does not occur" in str(report.findings[0])
    named = MaskedDataConfig(data=str(folder / "images"), class_names=("nothing", "dirt", "cell"), **classes, **options)
    assert load_masked(named).train[0]["mask"].unique().tolist() == [0, 2]
    with pytest.raises(ValueError, match="class_names must be the background and then .*: cell, dirt"):
        load_masked(MaskedDataConfig(data=str(folder / "images"), class_names=("a", "b", "c"), **classes, **options))
    with pytest.raises(ValueError, match="the classes would be 0, 1, 2, .* If these are objects, give"):
        open_masked_source(folder / "dsb", masks_per_image="classes")


@pytest.mark.parametrize(("data", "masks"), [("dsb", None), ("dsb", "dsb"), ("images", "per_class")])
def test_several_masks_of_an_image_are_asked_for(field, data, masks):
    folder, _ = field("annotations_other_than_a_mask_per_picture")
    with pytest.raises(ValueError, match=r"id000\....? has [23] masks in .*='objects'.*='classes'"):
        open_masked_source(folder / data, masks=masks and folder / masks)


@pytest.mark.parametrize(
    ("data", "masks", "message"),
    [
        ("labelme", None, r"id000.json holds polygons of labelme"),
        ("labelme", "labelme", r"id000.json holds polygons of labelme"),
        ("images", "labelme", r"id000.json holds polygons of labelme"),
        ("images", "coco.json", r"coco.json holds polygons or boxes of COCO"),
        ("images", "yolo", r"id000.txt holds polygons of YOLO"),
    ],
)
def test_polygons_are_refused_by_that_name(field, data, masks, message):
    folder, _ = field("annotations_other_than_a_mask_per_picture")
    with pytest.raises(ValueError, match=message):
        open_masked_source(folder / data, masks=masks and folder / masks)


@pytest.fixture
def draw() -> dict:
    """The functions of docs/segmentation.md that draw polygons."""
    (block,) = (each for each in blocks(ROOT / "docs/segmentation.md") if "def draw(" in each.text)
    functions: dict = {}
    exec(block.text, functions)
    return functions


def test_the_documents_refuse_what_are_no_polygons(draw, tmp_path):
    corners = [[1, 1], [8, 8]]
    shape = {"label": "cell", "shape_type": "rectangle", "points": corners}
    (tmp_path / "a.json").write_text(json.dumps({"imageWidth": 20, "imageHeight": 10, "shapes": [shape]}))
    with pytest.raises(ValueError, match="a.json has shapes of type rectangle"):
        draw["from_labelme"](tmp_path / "a.json", {"cell": 1})
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    with pytest.raises(ValueError, match="a.txt holds boxes"):
        draw["from_yolo"](tmp_path / "a.txt", (20, 10))
    with pytest.raises(ValueError, match="RLE"):
        list(draw["from_coco"](coco(tmp_path, 0, {"size": [10, 20], "counts": [5, 5, 190]})))


def test_the_documents_number_the_categories_of_coco_from_1_and_write_16_bits(draw, tmp_path):
    ((name, mask),) = draw["from_coco"](coco(tmp_path, 0, [[1, 1, 8, 1, 8, 8, 1, 8]]))
    mask.save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "I;16"
        assert np.unique(np.asarray(image)).tolist() == [0, 1]


def coco(folder: Path, category: int, segmentation: dict | list) -> Path:
    """A file of COCO with one annotation, which does not say whether it is a crowd."""
    record = {
        "images": [{"id": 7, "file_name": "a.png", "width": 20, "height": 10}],
        "annotations": [{"image_id": 7, "category_id": category, "segmentation": segmentation}],
        "categories": [{"id": category, "name": "cell"}],
    }
    (folder / "coco.json").write_text(json.dumps(record))
    return folder / "coco.json"


def test_the_documents_draw_polygons_into_masks(draw, field, tmp_path):
    folder, right = field("annotations_other_than_a_mask_per_picture")
    for kind in ("labelme", "yolo", "coco"):
        (tmp_path / kind).mkdir()
    for file in (folder / "labelme").glob("*.json"):
        draw["from_labelme"](file, {"cell": 1}).save(tmp_path / f"labelme/{file.stem}.png")
        draw["from_yolo"](folder / f"yolo/{file.stem}.txt", (64, 64)).save(tmp_path / f"yolo/{file.stem}.png")
    for name, mask in draw["from_coco"](folder / "coco.json"):
        mask.save(tmp_path / "coco" / Path(name).with_suffix(".png"))
    for kind in ("labelme", "yolo", "coco"):
        assert share(tmp_path, folder / "images", masks=tmp_path / kind) == (8, right["shares"])


def test_the_objects_of_a_mask_are_numbered_and_counted(field):
    """As docs/segmentation.md does it; objects that touch are told apart as far as their shape shows."""
    folder, right = field("instance_maps_of_cells")
    for file in (folder / "labels").iterdir():
        labels = np.asarray(Image.open(file))
        separate = find_objects(one_hot(separate_instances(labels) > 0, 2))
        assert np.unique(separate).tolist() == list(range(right["cells"] + 1))
        assert right["connected_parts"] <= find_objects(one_hot(labels > 0, 2)).max() <= right["cells"]


def test_a_file_of_polygons_is_named_before_anything_is_read(field):
    folder, _ = field("annotations_other_than_a_mask_per_picture")
    with pytest.raises(ValueError, match="polygons or boxes of COCO"):
        open_masked_source(folder / "coco.json")
    with pytest.raises(ValueError, match="polygons or boxes of COCO, but masks must be images.*Polygons to masks"):
        check_sources(MaskedOptions(data=str(folder / "images"), masks=str(folder / "coco.json")))


def test_carvana_and_double_endings_and_one_label(field, tmp_path):
    folder, right = field("carvana_names_and_small_objects")
    for options in ({}, {"mask_suffix": "_mask"}):
        assert share(tmp_path, folder / "train", masks=folder / "train_masks", **options) == (16, right["shares"])
    stacks, right = field("imagej_stacks")
    assert names(stacks / "ome", masks=stacks / "masks") == {f"{i}.ome.tif": f"{i}.png" for i in range(4)}
    labelled, _ = field("one_label_among_many_pictures")
    assert names(labelled / "labelled", masks=labelled / "masks") == {"0.png": "0.png"}


# their neighbours


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (["A.PNG", "B.JPG"], ["A.png", "B.TIF"]),
        (["a b (1).png", "a b (2).png"], ["a b (1).bmp", "a b (2).bmp"]),
        (["a.b.png", "a.c.png"], ["a.b.png", "a.c.png"]),
        (["a.png.jpg", "b.png.jpg"], ["a.png", "b.png"]),
        (["a.OME.TIF", "b.ome.tiff"], ["a.png", "b.png"]),
        ([unicodedata.normalize("NFC", "zelle-\u00e4.png")], [unicodedata.normalize("NFD", "zelle-\u00e4.png")]),
        ([f"{i}.png" for i in range(1, 11)], [f"{i:02d}.png" for i in range(1, 11)]),
        (["IMG_001.JPG", "IMG_002.JPG"], ["img_001.png", "img_002.png"]),
        ([f"{i}.png" for i in range(21, 29)], [f"{i}_2.png" for i in range(21, 29)]),
        ([f"Scan {i} .PNG" for i in range(9)], [f"scan {i}.png" if i % 4 else f"Scan {i} .tif" for i in range(9)]),
        (["a/B.png", "a/C.png"], ["A/b.png", "a/C.png"]),
        (["cat.png", "dog.png"], ["mask of cat.png", "mask of dog.png"]),
        (["ISIC_07.jpg"], ["ISIC_07_segmentation.png"]),
        (["patient1/a.png", "patient2/a.png"], ["patient1/a.png", "patient2/a.png"]),
        (["patient1/a.png", "patient2/a.png"], ["patient1/a_seg.png", "patient2/a_seg.png"]),
        (["first/a.png", "second/b.png"], ["a.png", "b.png"]),
        (["first/1_training.png", "second/2_training.png"], ["1_manual1.png", "2_manual1.png"]),
        (["p1/photo.png", "p2/photo.png"], ["p1/0a7f.png", "p2/33b1.png"]),
    ],
)
def test_names_that_pair(tmp_path, images, masks):
    save(tmp_path / "images", *images)
    save(tmp_path / "masks", *masks, size=5)
    rows = open_masked_source(tmp_path / "images", masks=tmp_path / "masks").rows
    found = {row["image"]["path"]: row["mask"] and row["mask"]["path"] for row in rows}
    assert found == {str(tmp_path / "images" / i): str(tmp_path / "masks" / m) for i, m in zip(images, masks)}


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["a.png", "b.png"], ["c.png", "d.png"], "They must be equal except for the ending"),
        (["a.png"], ["b.png"], "the first names are a and b"),
        (["x_1.png"], ["x_2.png"], "the first names are x_1 and x_2"),
        (["2.png", "12.png"], ["1_a.png", "2_a.png"], "no image of"),  # 2 is no part of 12
        (["p1_1.png", "p1_2.png"], ["p2_1.png", "p2_2.png"], "no image of"),
        ([f"{i}.png" for i in range(10)], [f"m{i}.png" for i in range(1, 11)], "no image of"),
        (
            [f"{i}.png" for i in range(10)],
            [f"{i}.png" for i in range(1, 11)],
            "one may count from 0 .* the other from 1",
        ),
        (
            [f"{i}_x.png" for i in range(8)],
            ["3_y.png", "5_y.png"],
            "give image_suffix='_x' and mask_suffix='_y'|suggest",
        ),
        (["a.png", "b.png"], ["a_1.png", "a_2.png", "b_1.png"], "a.png has 2 masks .*: a_1.png, a_2.png"),
    ],
)
def test_names_that_do_not_pair_are_asked_for(tmp_path, images, masks, message):
    save(tmp_path / "images", *images)
    save(tmp_path / "masks", *masks, size=5)
    with pytest.raises(ValueError, match=message):
        open_masked_source(tmp_path / "images", masks=tmp_path / "masks")


def test_a_suffix_with_its_ending_is_corrected(tmp_path):
    save(tmp_path / "images", "a.png")
    save(tmp_path / "masks", "a_mask.gif", size=5)
    with pytest.raises(ValueError, match="give mask_suffix='_mask'"):
        open_masked_source(tmp_path / "images", masks=tmp_path / "masks", mask_suffix="_mask.gif")


def test_files_without_the_affixes_are_left_out_and_told(tmp_path):
    save(tmp_path / "images", "a_img.png", "b_img.png", "a_dark.png")
    save(tmp_path / "masks", "mask_a.png", "mask_b.png", "view_a.png", size=5)
    options = {"masks": tmp_path / "masks", "image_suffix": "_img", "mask_prefix": "mask_"}
    assert names(tmp_path / "images", **options) == {"a_img.png": "mask_a.png", "b_img.png": "mask_b.png"}
    images, masks, pairs = open_masked_source(tmp_path / "images", **options).notes
    assert "1 files" in images
    assert images.endswith("do not fit image_suffix='_img' and mask_prefix='mask_': a_dark.png.")
    assert "view_a.png" in masks
    assert pairs.endswith("without image_suffix='_img' and mask_prefix='mask_': a_img.png with mask_a.png.")


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["a_img.png", "b_img.png", "a_m.png", "b_m.png", "note.png"], {"image_suffix": "_img", "mask_suffix": "_m"}),
        (["a_0000.png", "b_0000.png", "a.png", "b.png"], {"image_suffix": "_0000"}),
        (["a.png", "b.png", "m_a.png", "m_b.png"], {"mask_prefix": "m_"}),
        (["a_x.png", "b_x.png", "a_x_m.png", "b_x_m.png"], {"image_suffix": "_x", "mask_suffix": "_x_m"}),
    ],
)
def test_images_and_masks_in_one_folder(tmp_path, files, options):
    save(tmp_path / "both", *files)
    found = names(tmp_path / "both", **options)
    assert list(found.items()) == list(zip(files[:2], files[2:4]))
    assert found == names(tmp_path / "both", masks=tmp_path / "both", **options)


def test_images_and_masks_of_equal_names_in_one_folder_are_asked_for(tmp_path):
    save(tmp_path, "a.jpg", "a.png", "b.jpg", "b.png")
    with pytest.raises(ValueError, match="If a.jpg and a.png are an image and its mask, move the masks to a folder"):
        open_masked_source(tmp_path)


def test_masks_that_are_the_images_are_refused(tmp_path):
    save(tmp_path / "images", "a.png", "b.png")
    shutil.copytree(tmp_path / "images", tmp_path / "images/copies")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(ValueError, match=r"copies/a.png is the image .*images/a.png or a copy of it"):
        open_masked_source(tmp_path / "images", masks=tmp_path / "images/copies")
    for masks in ("images", "link"):
        with pytest.raises(ValueError, match="masks is .*images, the folder of the images"):
            open_masked_source(tmp_path / "images", masks=tmp_path / masks)


# folders


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images/{}.png", "masks/{}.png", "train"),
        ("JPEGImages/{}.png", "SegmentationClass/{}.png", "train"),
        ("imgs/{}.png", "GT/{}_gt.png", "train"),
        ("image/{}.png", "Ground Truth/{}.png", "train"),
        ("train/images/{}.png", "train/masks/{}.png", "train"),
        ("val/Image/{}.png", "val/Mask/{}.png", "val"),
        ("images/val/{}.png", "masks/val/{}.png", "val"),
        ("p{}/images/a.png", "p{}/masks/a.png", "train"),
        ("p{}/images/photo.png", "p{}/masks/0f.png", "train"),
    ],
)
def test_usual_folders_are_found_and_told(tmp_path, images, masks, split):
    save(tmp_path / "set", *(images.format(i) for i in range(3)))
    save(tmp_path / "set", *(masks.format(i) for i in range(3)), size=5)
    if split == "val":
        other = images.replace("val", "train"), masks.replace("val", "train")
        save(tmp_path / "set", *(name.format(i) for i in range(2) for name in other))
    opened = open_masked_source(tmp_path / "set", split)
    found = [(row["image"]["path"], row["mask"]["path"]) for row in opened.rows]
    expected = [(images.format(i), masks.format(i)) for i in range(3)]
    assert found == [tuple(str(tmp_path / "set" / path) for path in couple) for couple in expected]
    assert "images" in opened.notes[0] and "masks" in opened.notes[0]


def test_a_sibling_of_the_images_is_asked_for(field):
    folder, _ = field("carvana_names_and_small_objects")
    for source in (folder, folder / "train"):
        with pytest.raises(ValueError, match="If the masks are those in .*train_masks, give masks='.*train_masks'"):
            open_masked_source(source)


def test_metadata_and_stated_columns_come_before_usual_folders(tmp_path):
    save(tmp_path, "images/a.png", "masks/a.png")
    with pytest.raises(ValueError, match="looks like masks of the images"):
        open_masked_source(tmp_path, mask_column="mask")
    (tmp_path / "metadata.csv").write_text("file_name\nimages/a.png\n")
    with pytest.raises(ValueError, match="no column of masks"):
        open_masked_source(tmp_path)


def test_usual_folders_with_affixes(tmp_path):
    save(tmp_path, "images/a_img.png", "images/b_img.png", "masks/a_m.png", "masks/a_v.png", "masks/b_m.png")
    assert names(tmp_path, image_suffix="_img", mask_suffix="_m") == {"a_img.png": "a_m.png", "b_img.png": "b_m.png"}


@pytest.mark.parametrize("images", ["set/{}.png", "set/train/{}.png", "set/photos/{}.png"])
def test_a_likely_folder_of_masks_is_asked_for(tmp_path, images):
    save(tmp_path, *(images.format(name) for name in "ab"), "set/masks/a.png")
    source = (tmp_path / images).parent if "photos" in images else tmp_path / "set"
    with pytest.raises(ValueError, match=r"If the masks are those in .*set/masks, give masks='.*set/masks'"):
        open_masked_source(source)


def test_masks_within_the_folder_of_the_images_are_no_images(tmp_path):
    save(tmp_path / "data", "a.png", "b.png", "masks/a.png", "masks/b.png")
    assert names(tmp_path / "data", masks=tmp_path / "data/masks") == {"a.png": "a.png", "b.png": "b.png"}
    assert (
        "are masks; the images are the other files"
        in open_masked_source(tmp_path / "data", masks=tmp_path / "data/masks").notes[0]
    )
    save(tmp_path / "more", "images/p/a.png", "labels/p/a.png", "overlays/p/a.png")
    opened = open_masked_source(tmp_path / "more", masks=tmp_path / "more/labels")
    assert [row["image"]["path"] for row in opened.rows] == [str(tmp_path / "more/images/p/a.png")]
    save(tmp_path / "around", "a.png", "b.png", "images/a.png", "images/b.png")
    opened = open_masked_source(tmp_path / "around/images", masks=tmp_path / "around")
    assert (len(opened.rows), opened.orphans) == (2, ())


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("a.txt", "0 0.5 0.5 0.1 0.1\n", "boxes of YOLO"),
        ("a.xml", "<annotation><object><bndbox></bndbox></object></annotation>", "boxes of Pascal VOC"),
        ("a.json", '{"shapes": [{"points": []}], "imagePath": "a.png"}', "polygons of labelme"),
        ("a.json", '{"annotations": [{"image_id": 1, "category_id": 1}]}', "polygons or boxes of COCO"),
        ("a.geojson", '{"type": "FeatureCollection", "features": [{"coordinates": []}]}', "polygons of GeoJSON"),
    ],
)
def test_other_files_of_polygons_and_boxes(tmp_path, file, text, kind):
    save(tmp_path / "set", "images/a.png")
    (tmp_path / "set/labels").mkdir()
    (tmp_path / "set/labels" / file).write_text(text)
    for source, options in (("set", {}), ("set/images", {"masks": tmp_path / "set/labels"})):
        with pytest.raises(ValueError, match=f"{file} holds {kind}, but masks must be images"):
            open_masked_source(tmp_path / source, **options)


# several masks of an image


def parts(folder: Path, **files: list[tuple[int, int]]) -> Path:
    """Masks of 4 x 4, each with some pixels of 255."""
    folder.mkdir(parents=True)
    for name, pixels in files.items():
        mask = np.zeros((4, 4), np.uint8)
        for row, column in pixels:
            mask[row, column] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


def test_another_set_has_the_classes_of_the_first(tmp_path):
    save(tmp_path / "images", "a.png", "b.png")
    parts(tmp_path / "masks/a", class_dirt=[(0, 0)])
    parts(tmp_path / "masks/b", class_dirt=[(0, 1)])
    options = {"masks": tmp_path / "masks", "masks_per_image": "classes"}
    assert open_masked_source(tmp_path / "images", **options).class_names == ("background", "class_dirt")
    opened = open_masked_source(tmp_path / "images", class_files=["cell", "dirt"], **options)
    assert opened.class_names == ("background", "cell", "dirt")
    assert opened.rows[1]["mask"] == [None, {"bytes": None, "path": str(tmp_path / "masks/b/class_dirt.png")}]


def test_objects_with_names_of_their_own_are_no_classes(tmp_path):
    save(tmp_path / "images", "a.png", "b.png")
    parts(tmp_path / "masks/a", f1c0=[(0, 0)], aa27=[(0, 1)])
    parts(tmp_path / "masks/b", e9b2=[(0, 1)])
    with pytest.raises(ValueError, match="would be aa27, e9b2, f1c0, .* give masks_per_image='objects'"):
        open_masked_source(tmp_path / "images", masks=tmp_path / "masks", masks_per_image="classes")


def test_objects_that_overlap_are_told(tmp_path, caplog):
    save(tmp_path / "images", "a.png", "b.png")
    parts(tmp_path / "masks/a", x2=[(0, 0), (0, 1)], x10=[(0, 1), (0, 2)])
    parts(tmp_path / "masks/b", x2=[(1, 1)])
    config = MaskedDataConfig(
        data=str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        masks_per_image="objects",
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.5,
    )
    cache = load_masked(config).train.cache
    assert cache.instances[0][0].tolist() == [1, 2, 2, 0]
    assert "objects overlap in 1 masks" in caplog.text
    found = " ".join(map(str, examine(config).findings))
    assert "in which objects overlap: 1." in found
    assert "row 0 (a.png): 1 pixels" in found


@pytest.mark.parametrize("several", ["objects", "classes"])
def test_an_image_without_any_file_has_no_mask(tmp_path, several):
    save(tmp_path / "images", "a.png", "b.png")
    parts(tmp_path / "masks/a", cell=[(0, 0)])
    options = {"masks": str(tmp_path / "masks"), "cache_dir": str(tmp_path / "cache"), "masks_per_image": several}
    config = MaskedDataConfig(data=str(tmp_path / "images"), **options)
    assert "that have no mask: 1" in " ".join(map(str, examine(config).errors))
    with pytest.raises(ValueError, match="row 1.*: it has no mask"):
        load_masked(config)


@pytest.mark.parametrize("layout", ["a folder an image", "a folder a class", "names"])
def test_layouts_of_classes(tmp_path, layout):
    save(tmp_path / "images", "id1.png", "id10.png")
    marks = {"cell": [(0, 0)], "dirt": [(0, 1), (0, 2)]}
    for image in ("id1", "id10"):
        for name, pixels in marks.items():
            if layout == "names":
                parts(tmp_path / image / name, **{f"{image}_{name}_mask": pixels})
                (tmp_path / "masks").mkdir(exist_ok=True)
                shutil.copy(tmp_path / image / name / f"{image}_{name}_mask.png", tmp_path / "masks")
            elif layout == "a folder an image":
                (tmp_path / "masks" / image).mkdir(parents=True, exist_ok=True)
                parts(tmp_path / "made" / image / name, **{name: pixels})
                shutil.copy(tmp_path / "made" / image / name / f"{name}.png", tmp_path / "masks" / image)
            else:
                (tmp_path / "masks" / name).mkdir(parents=True, exist_ok=True)
                parts(tmp_path / "made" / image / name, **{image: pixels})
                shutil.copy(tmp_path / "made" / image / name / f"{image}.png", tmp_path / "masks" / name)
    options = {"masks": str(tmp_path / "masks"), "masks_per_image": "classes", "cache_dir": str(tmp_path / "cache")}
    sets = load_masked(MaskedDataConfig(data=str(tmp_path / "images"), validation_fraction=0.5, **options))
    assert sets.class_names == ("background", "cell", "dirt")
    assert sets.train[0]["mask"][0].tolist() == [1, 2, 2, 0]


def test_classes_that_overlap_and_files_of_more_values_are_refused(tmp_path):
    save(tmp_path / "images", "a.png")
    parts(tmp_path / "masks/a", cell=[(0, 0), (0, 1)], dirt=[(0, 1), (0, 2)])
    options = {"masks": str(tmp_path / "masks"), "cache_dir": str(tmp_path / "cache")}
    config = MaskedDataConfig(data=str(tmp_path / "images"), masks_per_image="classes", **options)
    with pytest.raises(ValueError, match="mark 1 pixels as two classes"):
        load_masked(config)
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 10).save(tmp_path / "masks/a/cell.png")
    with pytest.raises(ValueError, match="cell.png holds 0, 10, .* holds 0 and one other value"):
        load_masked(config)


def test_options_of_several_masks_are_checked(tmp_path):
    for options, message in (
        ({"masks_per_image": "many"}, "masks_per_image is 'many', but must be one of"),
        ({"masks_per_image": "objects", "mask_encoding": "binary"}, "mask_encoding is 'binary'.*'instances'"),
        ({"masks_per_image": "classes", "mask_colours": {"red": 1}}, "mask_colours are given"),
        ({"image_suffix": ""}, "image_suffix is ''"),
        ({"mask_prefix": "a/b"}, "mask_prefix is 'a/b'"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedOptions(data="absent", **options)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="has columns; it is for folders"):
        open_masked_source(tmp_path / "a.parquet", masks_per_image="objects")


def test_thousands_of_names_are_paired_in_linear_time():
    images = [f"p{number % 9}/{number:05d}_training" for number in range(5000)]
    masks = [f"p{number % 9}/{number:05d}_manual1" for number in range(5000)]
    pairs, way = pair(images, masks)
    assert list(pairs.items()) == list(zip(images, masks))
    assert way == "by the part of their names that differs"


def street(folder: Path, *splits: str) -> tuple[Path, Path]:
    """Images and three kinds of masks of each, named as in Cityscapes."""
    scenes = [f"{split}/{city}/{city}_00000{i}_000019" for split in splits for city in "ab" for i in range(3)]
    kinds = ("color", "instanceIds", "labelIds")
    save(folder / "leftImg8bit", *(f"{scene}_leftImg8bit.png" for scene in scenes))
    save(folder / "gtFine", *(f"{scene}_gtFine_{kind}.png" for scene in scenes for kind in kinds), size=5)
    return folder / "leftImg8bit", folder / "gtFine"


def test_kinds_of_masks_of_each_image_are_listed_as_suffixes(tmp_path):
    images, masks = street(tmp_path, "train")
    kinds = ["_gtFine_color", "_gtFine_instanceIds", "_gtFine_labelIds"]
    advice = f"image_suffix='_leftImg8bit' and one mask_suffix of {', '.join(map(repr, kinds))}, or "
    with pytest.raises(ValueError, match=re.escape(advice)):
        open_masked_source(images, masks=masks)
    for kind in kinds:
        options = {"masks": masks, "image_suffix": "_leftImg8bit", "mask_suffix": kind}
        found = names(images, **options)
        assert len(found) == 6
        assert all(mask == image.replace("_leftImg8bit", kind) for image, mask in found.items())
    notes = open_masked_source(images, **options).notes
    assert len(set(notes)) == len(notes)


def test_splits_below_several_folders_are_not_mixed(tmp_path):
    images, _ = street(tmp_path, "train", "val")
    message = "but the splits train, val lie in its subfolders gtFine, leftImg8bit, and .* mixed; give one of these as"
    for options in ({}, {"image_suffix": "_leftImg8bit", "mask_suffix": "_gtFine_labelIds"}):
        with pytest.raises(ValueError, match=message):
            open_masked_source(images.parent, **options)


@pytest.mark.parametrize(
    ("images", "masks", "warned"),
    [
        ("train/images", "val/masks", True),
        ("images/training", "masks/Validation", True),
        ("train/images", "train/masks", False),
        ("train/images", "masks/training", False),
        ("images/val", "masks", False),
    ],
)
def test_masks_of_another_split_are_warned_of(tmp_path, images, masks, warned):
    home = tmp_path / "test" / "data"  # both lie in it, so that it says nothing
    save(home / images, "a.png", "b.png")
    save(home / masks, "a.png", "b.png")
    report = examine(MaskedDataConfig(str(home / images), masks=str(home / masks), cache_dir=str(tmp_path / "cache")))
    assert ("names another split; check the pairs" in str(report)) == warned


@pytest.mark.parametrize("archive", [False, True])
def test_outlines_of_imagej_are_named(tmp_path, archive):
    save(tmp_path / "images", "a.png")
    (tmp_path / "rois").mkdir()
    if archive:
        with zipfile.ZipFile(tmp_path / "rois" / "a_RoiSet.zip", "w") as written:
            written.writestr("0001-0002.roi", b"Iout")
    else:
        (tmp_path / "rois" / "a.roi").write_bytes(b"Iout")
    with pytest.raises(ValueError, match="holds outlines of ImageJ, but masks must be images. Make .* Create Mask"):
        open_masked_source(tmp_path / "images", masks=tmp_path / "rois")


def test_folders_of_masks_come_before_polygons_beside_them(tmp_path):
    """An export of Supervisely: images, polygons, and masks of two kinds."""
    names = [f"{i}.png" for i in range(3)]
    save(tmp_path / "img", *names)
    for folder in ("masks_human", "masks_machine"):
        save(tmp_path / folder, *names, size=5)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "0.png.json").write_text('{"objects": [{"classTitle": "cat", "points": {"exterior": []}}]}')
    with pytest.raises(
        ValueError, match=r"If the masks are those in \S*/masks_human or \S*/masks_machine, give masks="
    ):
        open_masked_source(tmp_path)
    with pytest.raises(ValueError, match="holds polygons of Supervisely"):
        open_masked_source(tmp_path / "img", masks=tmp_path / "ann")


def test_several_masks_beside_a_suffix_of_images_are_merged_as_advised(tmp_path):
    save(tmp_path / "images", *(f"{i}_photo.png" for i in range(3)))
    save(tmp_path / "masks", *(f"{i}_{kind}.png" for i in range(3) for kind in ("cell", "core")), size=5)
    with pytest.raises(
        ValueError, match="give image_suffix='_photo' and one mask_suffix of '_cell', '_core', or else ma"
    ):
        open_masked_source(tmp_path / "images", masks=tmp_path / "masks")
    options = {"masks": tmp_path / "masks", "image_suffix": "_photo", "masks_per_image": "classes"}
    assert open_masked_source(tmp_path / "images", **options).class_names == ("background", "cell", "core")


@pytest.mark.parametrize("opaque", [255, 128])
@pytest.mark.parametrize("per_image", ["objects", "classes"])
def test_objects_in_the_alpha_channel_of_files_of_their_own(tmp_path, per_image, opaque):
    save(tmp_path / "images", "a.png", "b.png", size=8)
    for name in ("a_x", "a_y", "b_x", "b_y"):
        pixels = np.zeros((8, 8, 4), dtype=np.uint8)
        pixels[slice(0, 2) if name.endswith("x") else slice(4, 8), :, 3] = opaque
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{name}.png")
    right = [0.25, 0.75] if per_image == "objects" else [0.25, 0.25, 0.5]
    count, found = share(tmp_path, tmp_path / "images", masks=tmp_path / "masks", masks_per_image=per_image)
    assert (count, found) == (2, right)
