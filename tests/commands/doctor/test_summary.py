"""The summary says what the files hold: counts, sizes, channels, values, and each class with its share."""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from unet_diffusion.checks import Question
from unet_diffusion.commands.doctor import examination, row_facts
from unet_diffusion.commands.doctor.examination import examine, present
from unet_diffusion.commands.doctor.summary import Section, Summary, Table
from unet_diffusion.commands.doctor.understanding import describe_masks
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.encoding import MaskEncoding

datasets.disable_progress_bars()


def noise(number: int, shape=(8, 8)) -> np.ndarray:
    """Returns an image with the lowest value 3 and the highest 250."""
    values = np.random.default_rng(number).integers(3, 251, shape, dtype=np.uint8)
    values.flat[:2] = 3, 250
    return values


def write(folder: Path, images) -> str:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    return str(folder)


def plain(tmp_path, images, **options) -> DataConfig:
    return DataConfig(data=write(tmp_path / "images", images), cache_dir=str(tmp_path / "cache"), **options)


def masked(tmp_path, masks, images=None, **options) -> MaskedDataConfig:
    images = [noise(number, mask.shape[:2]) for number, mask in enumerate(masks)] if images is None else images
    return MaskedDataConfig(
        data=write(tmp_path / "images", images),
        masks=write(tmp_path / "masks", masks),
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def quarter(row: int, value: int) -> np.ndarray:
    """Returns a mask of 8 x 8 pixels of which two rows have a value, and the others 0."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[row : row + 2] = value
    return mask


def test_lines_align_columns_and_indent_tables_and_notes():
    table = Table(("class", "name", "pixels"), (("0", "background", "91.4%"), ("1", "cell", "8.6%")))
    summary = Summary((Section("data: 18 images", ("2 left out",)), Section("masks: binary", ("split",), table)))
    assert summary.lines() == (
        "data: 18 images",
        "  2 left out",
        "masks: binary",
        "  class  name        pixels",
        "  0      background   91.4%",
        "  1      cell          8.6%",
        "  split",
    )
    assert str(summary) == "\n".join(summary.lines())
    assert table.without("name").header == ("class", "pixels")


def of_masks(config: MaskedDataConfig) -> tuple[str, ...]:
    """The lines of the summary that are about the masks."""
    lines = examine(config).summary.lines()
    return lines[next(place for place, line in enumerate(lines) if line.startswith("masks:")) :]


def test_images_are_counted_with_size_channels_and_values(tmp_path):
    config = plain(tmp_path, [noise(number) for number in range(4)], validation_fraction=0.25)
    assert examine(config).summary.lines() == (
        f"data: {config.data} (train): 4 images of 8x8, 1 channel of uint8, values 3 to 250",
        "  about 25% of them are held out for validation",
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("labels", ["folders", "column"])
def test_classes_are_counted_among_the_images_that_are_used(tmp_path, streaming, labels):
    """`max_images` takes the first images, which in class folders are those of the first class."""
    folder = Path(write(tmp_path / "set", [noise(number) for number in range(8)]))
    if labels == "folders":
        origin = "the subfolders are the classes"
        for number in range(8):
            (folder / "ab"[number // 4]).mkdir(exist_ok=True)
            (folder / f"{number}.png").rename(folder / "ab"[number // 4] / f"{number}.png")
    else:
        origin = "the classes are in the column label"
        rows = [f"{number}.png,{'ab'[number // 4]}" for number in range(8)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    options = {"image_size": 8, "cache_dir": str(tmp_path / "cache")} | ({"streaming": True} if streaming else {})
    for most, counts, warned in ((3, "a (3 images), b (0)", True), (5, "a (4 images), b (1)", False)):
        report = examine(DataConfig(data=str(folder), max_images=most, **options))
        assert f"  {origin}: {counts}" in report.summary.lines()
        found = [finding for finding in report.findings if "max_images" in finding.sentence]
        assert [(finding.severity, finding.examples) for finding in found] == [("warning", ("b",))] * warned
        assert not warned or "max_images is 3, but the first images of " in found[0].sentence


def test_it_is_said_what_is_held_out(tmp_path):
    folder = Path(write(tmp_path / "videos", [noise(number) for number in range(4)]))
    for name in "ab":
        (folder / name).mkdir()
        for number in range(2):
            (folder / f"{number + 2 * (name == 'b')}.png").rename(folder / name / f"{number}.png")
    cache = str(tmp_path / "cache")
    grouped = DataConfig(data=str(folder), group_column="folder", validation_fraction=0.5, cache_dir=cache)
    assert examine(grouped).summary.lines()[-2:] == (
        "  the images are grouped by folder: 2 groups of 2 images",
        "  about 50% of the groups are held out for validation",
    )
    alone = plain(tmp_path / "alone", [noise(0)], validation_fraction=0.5)
    assert examine(alone).summary.lines()[1] == (
        "  none of them is held out for validation, since there is one image or all are equal"
    )


def test_different_sizes_and_channels_are_named(tmp_path):
    images = [noise(0), noise(1, (4, 6)), noise(2, (20, 10)), noise(3, (8, 8, 3))]
    config = plain(tmp_path, images, crop_size=4, validation_fraction=0)
    (line,) = examine(config).summary.lines()
    assert line.endswith(
        "4 images of 6x4 to 10x20 (3 sizes), 1 channel of uint8 or 3 channels of uint8, values 3 to 250"
    )


def test_images_that_cannot_be_used_are_counted_in_the_summary(tmp_path):
    config = plain(tmp_path, [noise(0), noise(1)], validation_fraction=0)
    (Path(config.data) / "2.png").write_bytes(b"no image")
    report = examine(config)
    assert report.summary.lines()[0].endswith(", values 3 to 250, 1 of them cannot be used")
    (example,) = report.errors[0].examples
    assert example.startswith(f"row 2: {config.data}/2.png cannot be decoded")  # so the file is named once


def test_named_validation_and_unlabelled_images_have_sections_of_their_own(tmp_path):
    validation = write(tmp_path / "others", [noise(9)])
    config = masked(tmp_path, [quarter(row, 255) for row in (0, 2)], class_names=("background", "cell"))
    config.validation_data, config.validation_masks = validation, write(tmp_path / "their masks", [quarter(4, 255)])
    lines = examine(config, unlabelled=write(tmp_path / "more", [noise(5), noise(6)])).summary.lines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == [
        f"data: {config.data} (train): 2 images of 8x8, 1 channel of uint8, values 3 to 250",
        f"validation: {validation} (train): 1 image of 8x8, 1 channel of uint8, values 3 to 250",
        f"unlabelled: {tmp_path / 'more'} (train): 2 images of 8x8, 1 channel of uint8, values 3 to 250",
        f"masks: {config.masks}: 2 masks, 2 classes (binary)",
        f"validation masks: {config.validation_masks}: 1 mask, 2 classes (binary)",
    ]


def test_each_class_has_its_value_name_share_and_number_of_images(tmp_path):
    masks = [quarter(0, 1), quarter(2, 1), quarter(4, 2), quarter(6, 255)]
    config = masked(tmp_path, masks, class_names=("background", "cell", "nucleus", "debris"))
    assert of_masks(config) == (
        f"masks: {config.masks}: 4 masks, 4 classes (indices)",
        "  class  value  name        pixels  images",
        "  0      0      background   75.0%       4",
        "  1      1      cell         12.5%       2",
        "  2      2      nucleus       6.2%       1",
        "         255    ignored       6.2%       1",
    )


def test_colours_are_shown_as_they_are_written_in_mask_colours(tmp_path):
    coloured = [np.stack([quarter(row, 255), *[np.zeros((8, 8), np.uint8)] * 2], -1) for row in (0, 2, 4)]
    assert of_masks(masked(tmp_path, coloured))[1:] == (
        "  class  value    pixels  images",
        "  0      #000000   75.0%       3",
        "  1      #ff0000   25.0%       3",
    )


def test_values_without_a_class_have_a_line(tmp_path):
    config = masked(tmp_path, [quarter(0, 1), quarter(2, 1), quarter(4, 7)], num_classes=2)
    report = examine(config)
    assert report.summary.lines()[-1] == "         7      no class    8.3%       1"
    assert "outside the classes" in report.refusal


def test_values_of_unclear_meaning_are_listed(tmp_path):
    many = np.arange(3, 131, 2, dtype=np.uint8).reshape(8, 8)
    config = masked(tmp_path, [many, many.T, many[::-1].copy()])
    lines = of_masks(config)
    assert lines[0].endswith("3 masks, whose values have no certain meaning")
    assert lines[1:3] == ("  value  pixels  images", "  3        1.6%       3")
    assert lines[-1] == "  and 52 more values"
    assert examine(config).refusal


def test_what_an_encoding_notes_and_names_is_shown():
    facts = [row_facts.RowFacts("row 0", keys=[(0, 63), (9, 1)], mask_size=(8, 8))]
    encoding = MaskEncoding({0: 0, 9: 1}, 2, kind="binary", class_names=("ground", "cat"), notes=("split at 5",))
    assert describe_masks("masks", "set", facts, encoding, None).lines() == [
        "masks: set: 1 mask, 2 classes (binary)",
        "  class  value  name    pixels  images",
        "  0      0      ground   98.4%       1",
        "  1      9      cat       1.6%       1",
        "  split at 5",
    ]
    rare = [row_facts.RowFacts("row 0", keys=[(0, 99_999), (9, 1)])]
    assert describe_masks("masks", "set", rare, encoding, None).lines()[3].split()[3] == "<0.01%"


def test_instance_maps_are_shown_as_one_class(tmp_path):
    config = masked(tmp_path, [quarter(0, 7), quarter(2, 9)], mask_encoding="instances")
    assert of_masks(config) == (
        f"masks: {config.masks}: 2 masks, 2 classes (instances)",
        "  class  value    pixels  images",
        "  0      0         75.0%       2",
        "  1      above 0   25.0%       2",
    )


def test_only_the_first_images_of_a_stream_are_examined(tmp_path, monkeypatch):
    monkeypatch.setattr(row_facts, "STREAMED", 3)
    config = plain(tmp_path, [noise(number) for number in range(5)], streaming=True, image_size=8)
    for number in range(2):
        (Path(config.data) / f"{number}.png").write_bytes(b"no image")
        report = examine(config)
        assert bool(report.refusal) is (number > 0)  # as the stream itself: one broken image of the first 100 is borne
    (line,) = report.summary.lines()
    assert ": the first 3 images of a stream of 8x8, 1 channel of uint8" in line
    assert "2 of the 3 images" in report.refusal and "/0.png cannot be decoded" in report.refusal
    assert not (tmp_path / "cache" / "unet_diffusion").exists()  # nothing was stored


def test_a_run_prints_what_was_understood_and_what_looks_wrong(tmp_path, capsys):
    config = plain(tmp_path, [noise(0), noise(1), np.full((8, 8), 9, np.uint8)])
    summary = present(config)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{summary}\nwarning: images of {config.data} (train) that are constant")
    assert present(config, quiet=True) == summary
    assert capsys.readouterr().out == ""


def test_a_name_that_the_terminal_cannot_show_keeps_no_run_from_starting(tmp_path, monkeypatch):
    config = plain(tmp_path / "细胞", [noise(0), noise(1)])
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    present(config)
    assert b"\\u7ec6\\u80de/images (train): 2 images" in terminal.buffer.getvalue()


def test_an_error_refuses_a_run_after_the_summary_is_printed(tmp_path, capsys):
    config = plain(tmp_path, [noise(0), noise(1, (4, 6))])
    with pytest.raises(ValueError, match=r"cannot be trained on.\nerror: the sizes of the images .* differ"):
        present(config)
    assert capsys.readouterr().out.startswith("data: ")


def test_a_question_of_all_files_is_asked_once(tmp_path, monkeypatch):
    def decode(source, axes):
        raise Question(
            "are the channels first or last? Give axes='CHW' or 'HWC'.", f"{source['path']} has shape (3, 8, 8)"
        )

    monkeypatch.setattr(row_facts, "decode", decode)
    config = plain(tmp_path, [noise(0), noise(1)])
    report = examine(config, errors_only=True)
    assert report.errors == ()
    assert str(report.questions[0]).splitlines() == [
        f"question: are the channels first or last? Give axes='CHW' or 'HWC'. It concerns 2 images of {config.data} "
        "(train).",
        f"    row 0: {config.data}/0.png has shape (3, 8, 8)",
        f"    row 1: {config.data}/1.png has shape (3, 8, 8)",
    ]
    assert str(report).endswith("0 errors, 1 question, 0 warnings, 0 notes")
    with pytest.raises(ValueError, match="before these questions are answered.\nquestion: are the channels"):
        present(config)


def test_questions_about_mask_files_and_about_all_values(tmp_path, monkeypatch):
    def ask(*_, **__):
        raise Question("masks hold 0, 38. Give mask_encoding='binary' or 'palette'.")

    config = masked(tmp_path, [quarter(row, 38) for row in (0, 2, 4)])
    monkeypatch.setattr(examination, "agreed_encoding", ask)
    report = examine(config)
    assert report.errors == ()
    assert str(report.questions[0]) == "question: masks hold 0, 38. Give mask_encoding='binary' or 'palette'."
    assert [line.split() for line in of_masks(config)[2:]] == [["0", "75.0%", "3"], ["38", "25.0%", "3"]]
    monkeypatch.setattr(row_facts, "_note_mask", ask)
    config.cache_dir = str(tmp_path / "another")
    (per_file, *_) = examine(config).questions
    assert per_file.sentence.endswith(f"It concerns 3 masks of {config.data} (train).")
    assert per_file.examples == ("row 0 (0.png)", "row 1 (1.png)", "row 2 (2.png)")


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_that_are_the_images_are_reported(tmp_path, channels):
    shape = (8, 8) if channels == 1 else (8, 8, 3)
    images = [np.random.default_rng(number).integers(0, 2, shape, dtype=np.uint8) * 255 for number in range(3)]
    warning = "are equal to their images; name the masks by masks, mask_suffix or mask_column"
    assert warning in str(examine(masked(tmp_path / "same", images, images)))
    assert warning not in str(examine(masked(tmp_path / "other", [*images[:2], images[0]], images)))


def test_masks_that_hardly_differ_are_reported_but_not_objects_that_move(tmp_path):
    rows, columns = np.ogrid[:64, :64]

    def disc(shift: int, radius: int) -> np.ndarray:
        return ((columns - 32 - shift) ** 2 + (rows - 32) ** 2 <= radius**2).astype(np.uint8) * np.uint8(255)

    warning = "nearly the same for all images. Such masks often mark the field of view"
    view = [disc(shift, 29) for shift in (0, 1, 0, 1)]
    assert warning in str(examine(masked(tmp_path / "view", view)))
    for name, others in {
        "moving": [disc(6 * shift, 20) for shift in (-1, 0, 1, 2)],
        "small": [disc(shift, 5) for shift in (0, 1, 0, 1)],
        "two": view[:2],
        "street": [np.where(rows + columns < 6, 0, disc(9 * shift, 9) // 255 + 1) for shift in (-2, 0, 1, 2)],
    }.items():
        assert warning not in str(examine(masked(tmp_path / name, others))), name


def test_classes_that_never_occur_take_one_line(tmp_path):
    masks = [quarter(row, 38) for row in (0, 2, 4)]
    config = masked(tmp_path, masks, mask_encoding="indices", num_classes=40)
    (warning,) = examine(config).findings
    assert str(warning) == (f"warning: classes 1 to 37, 39 do not occur in the masks of {config.data} (train).")
    config.class_names = tuple(f"c{label}" for label in range(39)) + ("tumour",)
    assert "c37, tumour) do not occur" in str(examine(config))


def test_classes_between_others_at_soft_edges_are_suspected_but_not_hard_edges(tmp_path):
    rows, columns = np.ogrid[:64, :64]

    def discs(side: int, *values: int) -> np.ndarray:
        mask, unit = np.zeros((side, side), dtype=np.uint8), side // 8
        for place, value in enumerate(values):
            y, x = np.ogrid[:side, :side]
            mask[(x - (2 * place + 1) * unit) ** 2 + (y - 4 * unit) ** 2 <= (unit - 1) ** 2] = value
        return mask

    def resized(mask: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(mask).resize((64, 64), how))

    small, large = discs(32, 1, 2, 3, 1), discs(128, 4, 3, 2, 1)
    layers = (np.ogrid[:64, :64][0] // 2 % 9).astype(np.uint8).repeat(64, axis=1)
    ring = np.select([np.hypot(rows - 32, columns - 32) < radius for radius in (20, 21)], [2, 1], 0).astype(np.uint8)
    ring[:4] = 3
    soft = [resized(mask, Image.Resampling.BILINEAR) for mask in (small, large)]
    hard = [discs(64, 3, 1, 2, 4), resized(small, Image.Resampling.NEAREST), layers, ring]
    for number, (mask, warned) in enumerate([*((mask, True) for mask in soft), *((mask, False) for mask in hard)]):
        images = [np.full((64, 64), value, dtype=np.uint8) for value in range(3)]
        config = masked(tmp_path / str(number), [mask] * 3, images, mask_encoding="indices")
        assert ("often lie as thin lines between" in str(examine(config))) == warned, number
