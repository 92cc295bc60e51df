"""The doctor finds each planted fault, reports nothing on healthy sets, and separates errors from warnings."""

import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tyro
from datasets import Dataset, Features
from PIL import Image

from tests.support.image_files import npy
from unet_diffusion.commands.doctor import row_facts as doctor_facts
from unet_diffusion.commands.doctor.command import doctor
from unet_diffusion.commands.doctor.examination import examine, present
from unet_diffusion.commands.options.doctor import Doctor
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked

datasets.disable_progress_bars()

FIELD = datasets.Image(decode=False)
ROWS = 10


def field(value) -> dict | None:
    return value if value is None else {"bytes": value if isinstance(value, bytes) else npy(value), "path": None}


def save(folder, **columns) -> str:
    rows = {name: [field(value) for value in values] for name, values in columns.items()}
    Dataset.from_dict(rows, features=Features(dict.fromkeys(rows, FIELD))).save_to_disk(folder)
    return str(folder)


def healthy(seed=0, classes=2) -> tuple[list, list]:
    """Ten different images with masks of two classes, without any fault."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (ROWS, 12, 14), dtype=np.uint8)
    return list(images), list(generator.integers(0, classes, (ROWS, 12, 14)).astype(np.uint8))


@pytest.fixture
def look(tmp_path):
    def look(data, plain=False, **options):
        options = {"cache_dir": str(tmp_path / "cache"), **options}
        kind = DataConfig if plain else MaskedDataConfig
        return examine(kind(data=data, **options))

    return look


def sentences(report, severity) -> str:
    return "\n".join(str(finding) for finding in report.findings if finding.severity == severity)


def test_a_healthy_set_has_no_errors_and_no_warnings(tmp_path, look):
    images, masks = healthy()
    report = look(save(tmp_path / "set", image=images, mask=masks))
    assert report.findings == () and report.refusal == ""
    assert str(report).endswith("0 errors, 0 questions, 0 warnings, 0 notes")
    plain = look(save(tmp_path / "plain", image=images), plain=True)
    assert plain.findings == ()


BINARY = np.array([0, 255], dtype=np.uint8)
OVERLAPPING = np.ones((12, 14, 2), dtype=np.uint8)
NOT_A_NUMBER = np.full((12, 14), np.nan, dtype=np.float32)


def plant(fault: str, images: list, masks: list) -> None:
    """Puts one fault into row 3, or into all rows if it is a fault of the whole set."""
    if fault == "0/255 as indices":
        masks[:] = [BINARY[mask] for mask in masks]
    elif fault == "values outside":
        masks[3] = masks[3] + 6
    elif fault == "mask size":
        masks[3] = masks[3][:, :9]
    elif fault == "empty mask":
        masks[3] = masks[3] * 0
    elif fault == "one class":
        masks[3] = masks[3] * 0 + 1
    elif fault == "unreadable":
        images[3] = npy(images[3])[:90]
    elif fault == "channels":
        images[3] = np.repeat(images[3][:, :, None], 3, axis=2)
    elif fault == "duplicate":
        images[3], masks[3] = images[5], masks[5]
    elif fault == "missing mask":
        masks[3] = None
    elif fault == "colours":
        masks[:] = [np.array([(0, 0, 0), (255, 0, 0)], dtype=np.uint8)[mask] for mask in masks]
    elif fault == "multi-label":
        masks[3] = OVERLAPPING
    elif fault == "NaN":
        images[3] = NOT_A_NUMBER
    elif fault == "dark 16 bits":
        images[:] = [image.astype(np.uint16) for image in images]
    elif fault == "floats":
        images[:] = [image.astype(np.float32) for image in images]
    elif fault == "constant":
        images[3] = images[3] * 0 + 7
    elif fault == "image sizes":
        images[3], masks[3] = images[3][:8], masks[3][:8]
    elif fault == "rare class":
        masks[:] = [mask * 0 for mask in masks]
        masks[3][0, :5] = 1
    elif fault == "ignored":
        masks[3] = masks[3] * 0 + 255
    elif fault == "mixed binary":
        masks[3] = BINARY[masks[3]]
    elif fault == "many values":
        masks[:] = [mask + np.arange(168, dtype=np.uint8).reshape(12, 14) for mask in masks]
    else:
        raise AssertionError(fault)


INDICES = {"mask_encoding": "indices"}
FAULTS = [
    ("0/255 as indices", INDICES, "error", "hold 0 and 255, and 255 is taken for pixels to ignore.*'binary'"),
    (
        "values outside",
        {"num_classes": 2},
        "error",
        r"outside the classes, which are 0..1: 1.\n    row 3: 6..7",
    ),
    (
        "mask size",
        {},
        "error",
        r"another size than their image: 1. [^\n]*nearest neighbour[^\n]*\n    row 3: mask 9x12, image 14x12",
    ),
    ("empty mask", {}, "note", r"empty, class 0 everywhere: 1 of 10.\n    row 3"),
    ("one class", {}, "warning", r"all one class: 1.\n    row 3: class 1"),
    (
        "unreadable",
        {},
        "error",
        r"1 of the 10 images of .* cannot be read; max_broken=0.01 .*\n    row 3: .*cannot be decoded",
    ),
    ("channels", {}, "error", r"another number of channels.*: 1 \(found: 1, 3\).*\n    row 3: 3 channels"),
    ("duplicate", {}, "warning", r"duplicates inside a split.*: 1\..*\n    row 3 of .* = row 5 of"),
    ("missing mask", {}, "error", r"have no mask: 1.*\n    row 3"),
    ("colours", INDICES, "error", r"'indices', but masks hold the colours \(255, 0, 0\); use 'palette'"),
    ("multi-label", {}, "error", r"row 3: the mask has 2 channels of uint8, and they overlap at 168 pixels"),
    ("NaN", {}, "error", "row 3: .*NaN"),
    ("dark 16 bits", {}, "error", "question: .*only 0 to 255 of 0 to 65535.*value_range 0 255 if the data have 8 bits"),
    ("dark 16 bits", {"value_range": (0, 4095)}, "note", "16-bit images .* no more levels than 8 bits hold: 10"),
    ("dark 16 bits", {"value_range": (0, 99)}, "warning", "outside value_range 0 to 99, which are clipped: 10"),
    ("floats", {}, "error", "floats from 0 to 255.*give value_range"),
    ("constant", {}, "warning", r"constant.*: 1.\n    row 3: 7 everywhere"),
    ("image sizes", {}, "error", r"sizes .* differ \(2\).*\n    14x12: 9 images\n    14x8: 1 image"),
    ("image sizes", {"crop_size": 4}, "note", "2 different sizes"),
    ("rare class", {}, "warning", "set loss='both'.*\n    class 1: 0.30%"),
    ("rare class", {"num_classes": 3}, "warning", "class 2 does not occur in the masks of"),
    ("ignored", {}, "warning", r"ignored \(255\) everywhere: 1.\n    row 3"),
    ("mixed binary", {}, "error", r"9 masks of 0 and 1, and 1 of 0 and 255.*'binary' and mask_threshold=1"),
    ("mixed binary", INDICES, "warning", r"hold only 0 and 255, while others hold class indices: 1.*\n    row 3"),
    ("many values", {}, "error", r"masks hold 0..168, which would be 169 classes.*'instances'"),
]


@pytest.mark.parametrize(("fault", "options", "severity", "message"), FAULTS)
def test_each_planted_fault_is_found(tmp_path, look, fault, options, severity, message):
    images, masks = healthy()
    plant(fault, images, masks)
    report = look(save(tmp_path / "set", image=images, mask=masks), **options)
    found = report.refusal if severity == "error" else sentences(report, severity)  # an error or a question
    assert re.search(message, found), str(report)
    if severity != "error":
        assert not report.refusal, str(report)


@pytest.mark.parametrize(
    "fault", ["0/255 as indices", "values outside", "mask size", "unreadable", "channels", "missing mask", "colours",
              "multi-label", "NaN", "dark 16 bits", "floats", "image sizes", "many values"],
)  # fmt: skip
def test_errors_of_the_doctor_stop_a_run(tmp_path, fault):
    images, masks = healthy()
    plant(fault, images, masks)
    options = next(options for name, options, *_ in FAULTS if name == fault)
    source = save(tmp_path / "set", image=images, mask=masks)
    config = MaskedDataConfig(data=source, cache_dir=str(tmp_path / "cache"), validation_split="train", **options)
    with pytest.raises(ValueError):
        load_masked(config)
    with pytest.raises(ValueError, match="cannot be trained on.*\n(error|question): "):
        present(config)


def test_several_faults_are_found_at_once(tmp_path, look):
    images, masks = healthy()
    plant("unreadable", images, masks)
    masks[4], masks[6], images[7] = None, masks[6][:5], images[8]
    report = look(save(tmp_path / "set", image=images, mask=masks))
    text = str(report)
    for part in ("cannot be read", "have no mask", "another size than their image", "inside a split", "contradict"):
        assert part in text
    assert text.index("error:") < text.index("warning:")
    assert text.endswith("3 errors, 0 questions, 2 warnings, 0 notes")


def test_few_broken_rows_are_only_a_warning(tmp_path, look):
    images, masks = healthy()
    plant("unreadable", images, masks)
    source = save(tmp_path / "set", image=images, mask=masks)
    assert not look(source, max_broken=0.1).errors
    assert "cannot be read" in sentences(look(source, max_broken=0.1), "warning")


def test_duplicates_across_splits_and_masks_that_contradict(tmp_path, look):
    images, masks = healthy()
    others, other_masks = healthy(seed=1)
    others[2] = images[6]
    train = save(tmp_path / "train", image=images, mask=masks)
    validation = save(tmp_path / "validation", image=others, mask=other_masks)
    warnings = sentences(look(train, validation_data=validation), "warning")
    assert "duplicates across splits, equal pixel by pixel: 1." in warnings
    assert "row 6 of " in warnings
    assert "contradict" in warnings
    plain = look(train, plain=True, validation_data=validation)
    assert "duplicates across splits" in str(plain)
    assert "duplicates across splits, equal pixel by pixel: 10." in str(look(train, validation_data=train))


def test_validation_masks_are_judged_by_the_classes_of_training(tmp_path, look):
    images, masks = healthy()
    others, other_masks = healthy(seed=1, classes=4)
    train = save(tmp_path / "train", image=images, mask=masks)
    report = look(train, validation_data=save(tmp_path / "validation", image=others, mask=other_masks))
    assert len(report.errors) == 1
    assert "values outside the classes, which are 0..1" in str(report.errors[0])
    assert len(report.errors[0].examples) == ROWS
    assert "and 5 more" in str(report)


def test_masks_without_images_palettes_and_orientation(tmp_path, look):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    images, masks = healthy()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down: the size does not show it
    for number, (image, mask) in enumerate(zip(images, masks)):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png", exif=exif if number == 2 else None)
        indexed = Image.fromarray(mask, mode="P")
        indexed.putpalette([0, 0, 0, *((255, 0, 0) if number != 4 else (0, 0, 255))])
        indexed.save(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "images" / "9.png").unlink()
    report = look(str(tmp_path / "images"), masks=str(tmp_path / "masks"))
    assert "have no image: 1.\n    9.png" in sentences(report, "warning")
    assert "row 4 (4.png): index 1 is (0, 0, 255), but was (255, 0, 0) before" in sentences(report, "error")
    assert "state an EXIF orientation" in sentences(report, "note")
    assert "row 2 (2.png)" in sentences(report, "note")


def test_instance_maps_are_examined_too(tmp_path, look):
    images, masks = healthy()
    maps = [mask.astype(np.uint16) * 400 for mask in masks]
    maps[3] = maps[3][:4]
    source = save(tmp_path / "set", image=images, mask=masks, cells=maps)
    report = look(source, instances_column="cells")
    assert "row 3: its instance map has 14x4 pixels, but the image has 14x12" in sentences(report, "error")
    maps[3] = maps[2]
    source = save(tmp_path / "maps", image=images, mask=maps)
    report = look(source, mask_encoding="instances")
    assert not report.errors
    found = sentences(report, "warning")  # these masks are scattered pixels, all of one number
    assert "with objects in several separate pieces: 9" in found and "row 0: 1 of 1" in found
    numbered = np.arange(12 * 14, dtype=np.uint16).reshape(12, 14)
    source = save(tmp_path / "numbered", image=images, mask=[numbered] * len(images))
    assert "separate pieces" not in sentences(look(source, mask_encoding="instances"), "warning")


def test_masks_that_contradict_their_instance_maps_are_found(tmp_path, look):
    mask = np.zeros((12, 14), dtype=np.uint8)
    mask[2:6, 2:7], mask[8:10, 2:7], mask[2:6, 9:13] = 1, 1, 2  # 20 and 10 pixels of class 1, and 16 of class 2
    numbers = np.zeros(mask.shape, dtype=np.uint16)
    numbers[2:6, 2:7] = 1  # the other object of class 1 has no number, and class 2 has no objects
    images, masks = healthy()[0], [mask] * ROWS
    found = sentences(
        look(save(tmp_path / "a", image=images, mask=masks, cells=[numbers] * ROWS), instances_column="cells"),
        "warning",
    )
    assert "33% of the pixels of class 1 in" in found and "no number in the instance maps" in found
    assert "class 2" not in found and "background" not in found
    numbers = numbers.copy()
    numbers[8:10, 2:7], numbers[8:11, 9:13] = 2, 3
    found = sentences(
        look(save(tmp_path / "b", image=images, mask=masks, cells=[numbers] * ROWS), instances_column="cells"),
        "warning",
    )
    assert f"have numbers at {12 * ROWS} pixels that the masks call background" in found
    assert "no number in" not in found


def test_a_second_examination_decodes_nothing(tmp_path, look, monkeypatch):
    images, masks = healthy()
    source = save(tmp_path / "set", image=images, mask=masks)
    first = look(source)
    monkeypatch.setattr(doctor_facts, "decode", lambda *_: pytest.fail("decoded again"))
    assert str(look(source, crop_size=4)) == str(first)


def test_the_command_takes_data_as_a_positional_argument_and_can_report_errors_only(tmp_path):
    images, masks = healthy()
    plant("constant", images, masks)
    source = save(tmp_path / "set", image=images, mask=masks)
    cache = ["--cache-dir", str(tmp_path / "cache")]
    options = tyro.cli(Doctor, args=[source, *cache])
    assert "constant" in str(doctor(options))
    assert doctor(tyro.cli(Doctor, args=[source, "--errors-only", *cache])).findings == ()
    plain = doctor(tyro.cli(Doctor, args=[source, "--plain", "--max-labels", "4", *cache]))
    assert plain.summary.lines()[0].startswith(f"data: {source} (train): 4 images of 14x12, ")
    with pytest.raises(ValueError, match="no such file or folder"):
        doctor(Doctor(data="/absent/folder"))


def test_the_command_takes_subfolders_for_classes_if_told_so(tmp_path):
    images, _ = healthy()
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(images[0]).save(tmp_path / name / "1.png")
    arguments = [str(tmp_path), "--plain", "--cache-dir", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match="If they are classes, give label_column 'label'"):
        doctor(tyro.cli(Doctor, args=arguments))
    told = doctor(tyro.cli(Doctor, args=[*arguments, "--label-column", "label"]))
    assert "  the subfolders are the classes: images (1 image), masks (1)" in told.summary.lines()
    with pytest.raises(ValueError, match="label_column is 'label', but it is for images without masks; add plain"):
        Doctor(data=str(tmp_path), label_column="label")


def test_frames_that_are_not_read_are_counted(tmp_path, look):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 90, 200)]
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            first = Image.fromarray(np.arange(number, number + 64, dtype=np.uint8).reshape(8, 8))
            more = frames[1:] if number else []
            first.save(tmp_path / folder / f"{number}.gif", save_all=True, append_images=more)
    plain = look(str(tmp_path / "images"), plain=True)
    assert sentences(plain, "note").endswith("of which only the first is read: 1.\n    row 1 (1.gif): 2 more")
    both = look(str(tmp_path / "images"), masks=str(tmp_path / "masks"))
    assert re.search("masks of .* with further frames .*: 1.\n    row 1 .*: 2 more", sentences(both, "warning"))


@pytest.mark.slow
def test_real_sets_are_healthy(shared_data, look):
    for name, options in (
        ("isbi2012", {"max_labels": 3}),
        ("dsb2018", {"max_labels": 5, "instances_column": "instances"}),
        ("wbc", {"max_labels": 5}),
    ):
        assert not look(str(shared_data / name), **options).errors


@pytest.mark.parametrize("encoding", ["indices", "palette", "instances"])
def test_each_file_is_read_once_by_the_doctor_and_once_by_a_run(tmp_path, monkeypatch, encoding):
    """Palette and orientation come from the same bytes as the pixels: a URL is downloaded only once."""
    images, masks = healthy()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, while the masks follow the stored pixels
    for name, pixels, options in (("images", images, {"exif": exif}), ("masks", masks, {})):
        (tmp_path / name).mkdir()
        for index, values in enumerate(pixels):
            image = Image.fromarray(values).convert("L" if name == "images" else "P")
            image.save(tmp_path / name / f"{index}.png", **options)
    names = [f"{folder}/{index}.png" for folder in ("images", "masks") for index in range(ROWS)]
    reads: Counter[str] = Counter()
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        reads[path.relative_to(tmp_path).as_posix()] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    config = MaskedDataConfig(
        data=str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        mask_encoding=encoding,
        cache_dir=str(tmp_path / "cache"),
    )
    examine(config)
    assert reads == dict.fromkeys(names, 1)
    reads.clear()
    load_masked(config)
    assert reads == dict.fromkeys(names, 1)
