"""What was understood of files from the field is said before any work: by the doctor, and by every training."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from unet_diffusion import cli
from unet_diffusion.commands.doctor.examination import examine
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedDataConfig

datasets.disable_progress_bars()

SHORT = ["--batch-size", "2", "--steps", "1", "--warmup-steps", "1"]


@pytest.fixture
def doctor(tmp_path, capsys):
    """Runs the command; returns whether a run may start, and what was printed."""

    def doctor(*arguments) -> tuple[bool, str]:
        accepted = True
        try:
            cli.run("doctor", [*map(str, arguments), "--cache-dir", str(tmp_path / "cache")])
        except SystemExit as ended:
            assert ended.code == 1
            accepted = False
        return accepted, capsys.readouterr().out

    return doctor


@pytest.fixture
def network(tmp_path) -> str:
    path = tmp_path / "network.json"
    path.write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return str(path)


def table(text: str) -> list[list[str]]:
    """Returns the cells of the printed table, without its header."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.split()[-2:] == ["pixels", "images"])
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("  ") or "%" not in line:
            break
        rows.append(line.split())
    return rows


def shown(share: float) -> str:
    return f"{share:.1%}"


def test_pages_of_a_stack_are_called_channels(field, doctor):
    folder, right = field("imagej_stacks")
    accepted, text = doctor(folder / "five_pages", "--plain")
    assert accepted
    assert f"4 images of 48x48, {right['channels']['five_pages']} channels of uint8" in text


def test_one_image_is_not_said_to_be_held_out_in_part(field, doctor):
    folder, _ = field("one_two_or_three_pictures")
    for count in (1, 2):
        accepted, text = doctor(folder / f"images_{count}", "--masks", folder / f"masks_{count}")
        assert accepted
        assert ("about 10% of them are held out" in text) == (count > 1)


def test_files_that_are_not_read_are_counted_by_their_ending(field, doctor):
    folder, right = field("folder_mostly_of_formats_not_read")
    accepted, text = doctor(folder / "phone", "--plain")
    assert accepted
    assert f"{right['read']} images of 32x32, 3 channels of uint8" in text
    assert f"{right['left_out']} .heic" in text.lower()


@pytest.mark.parametrize(
    ("masks", "values", "encoding"),
    [("value_38", ["0", "38"], "binary"), ("values_20_40_60", ["0", "20", "40", "60"], "palette")],
)
def test_values_with_gaps_are_shown_with_their_shares(field, doctor, masks, values, encoding):
    folder, right = field("grey_masks_with_gaps_between_values")
    accepted, text = doctor(folder / "images", "--masks", folder / masks, "--mask-encoding", encoding)
    assert accepted
    classes = [
        [str(label), value, shown(share), "12"] for label, (value, share) in enumerate(zip(values, right[masks]))
    ]
    assert table(text) == classes


@pytest.mark.parametrize(("masks", "values"), [("value_38", ["0", "38"]), ("values_20_40_60", ["0", "20", "40", "60"])])
def test_what_values_with_gaps_mean_is_asked_beside_their_shares(field, doctor, masks, values):
    folder, right = field("grey_masks_with_gaps_between_values")
    accepted, text = doctor(folder / "images", "--masks", folder / masks)
    assert not accepted
    assert table(text) == [[value, shown(share), "12"] for value, share in zip(values, right[masks])]


def test_classes_without_pixels_take_no_line(field, doctor):
    folder, right = field("grey_masks_with_gaps_between_values")
    _, text = doctor(folder / "images", "--masks", folder / "value_38", "--mask-encoding", "indices")
    assert table(text) == [[value, value, shown(share), "12"] for value, share in zip(("0", "38"), right["value_38"])]
    assert "classes 1 to 37 do not occur" in text


def test_names_stand_beside_their_colours(field, doctor):
    folder, right = field("voc_colour_masks_with_labelmap")
    names, colours = (
        right["colours"],
        [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in right["colours"].values()],
    )
    mapping = [str(word) for pair in zip(colours, range(3)) for word in pair]
    data = [folder / "JPEGImages", "--masks", folder / "SegmentationClass", "--class-names", *names]
    accepted, text = doctor(*data, "--mask-colours", *mapping)
    assert accepted
    rows = zip(range(3), colours, names, right["shares"])
    assert table(text) == [[str(label), colour, name, shown(share), "12"] for label, colour, name, share in rows]


def test_masks_of_the_field_of_view_are_suspected(field, doctor):
    folder, right = field("retinal_pictures_paired_by_number")
    _, text = doctor(folder / "images", "--masks", folder / "mask", "--mask-suffix", "_mask")
    assert table(text)[1][-2:] == [shown(right["field_of_view"][1]), "8"]
    assert "warning: the masks of" in text and "often mark the field of view" in text


def test_images_given_as_masks_are_suspected(field, tmp_path):
    folder, _ = field("binary_masks_saved_as_jpeg")
    images = str(folder / "images")
    with pytest.raises(ValueError, match="the folder of the images"):
        examine(MaskedDataConfig(data=images, masks=images, cache_dir=str(tmp_path / "cache")))
    copied = shutil.copytree(images, tmp_path / "copied")
    report = examine(MaskedDataConfig(data=images, masks=str(copied), cache_dir=str(tmp_path / "cache")))
    assert report.refusal
    assert "all masks of" in str(report) and "are equal to their images" in str(report)


def test_each_broken_file_is_named_once(field, doctor):
    folder, _ = field("imagej_stacks")
    accepted, text = doctor(folder / "z_stack", "--plain")
    assert not accepted
    assert [text.count(f"{number}.tif") for number in range(4)] == [1, 1, 1, 1]


def test_arrays_with_channels_first_are_asked_about_or_read_right(field, doctor):
    folder, _ = field("arrays_with_channels_first")
    accepted, text = doctor(folder / "channels_first", "--plain")
    assert "48x64, 3 channels" in text if accepted else "(3, 64, 48)" in text


def test_train_ddpm_prints_the_summary_and_keeps_it(field, network, tmp_path, capsys):
    folder, _ = field("pictures_of_red_discs")
    run, data = tmp_path / "run", str(folder / "size_16")
    options = ["--model", network, "--cache-dir", str(tmp_path / "cache"), "--preview-images", "1", *SHORT]
    cli.run("train-ddpm", ["--output", str(run), "--data", data, *options])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"data: {data} (train): 36 images of 16x16, 3 channels of uint8, values 30 to 230"
    assert printed[-1] == str(run)
    summary = json.loads((run / "data.json").read_text())["summary"]
    assert printed[: len(summary)] == summary
    assert "\n## Data\n\n```text\n" + "\n".join(summary) + "\n```\n\n## Training\n" in (run / "README.md").read_text()


def test_train_segmentation_prints_the_summary_before_it_refuses(field, network, tmp_path, capsys):
    folder, right = field("grey_masks_with_gaps_between_values")
    masks = ["--masks", str(folder / "value_38"), "--output", str(tmp_path / "run")]
    data = ["--data", str(folder / "images"), *masks, "--model", network, "--cache-dir", str(tmp_path / "cache")]
    cli.run("train-segmentation", [*data, "--mask-encoding", "binary", "--class-names", "ground", "disc", *SHORT])
    text = capsys.readouterr().out
    assert [row[2:4] for row in table(text)] == [
        [name, shown(share)] for name, share in zip(("ground", "disc"), right["value_38"])
    ]
    assert text.strip().splitlines()[0] in (tmp_path / "run" / "README.md").read_text()
    Image.new("L", (10, 10)).save(folder / "value_38" / "000.png")
    with pytest.raises(SystemExit, match=r"cannot be trained on.\nerror: masks .* of another size"):
        cli.run("train-segmentation", [*data, "--mask-encoding", "binary", *SHORT])
    assert capsys.readouterr().out.startswith("data: ")


def test_a_stream_is_examined_at_its_beginning(field, tmp_path):
    folder, _ = field("pictures_of_red_discs")
    config = DataConfig(
        data=str(folder / "size_16"), streaming=True, image_size=16, cache_dir=str(tmp_path / "cache"), max_images=9
    )
    (line, *_) = examine(config).summary.lines()
    assert line.endswith("the first 9 images of a stream of 16x16, 3 channels of uint8, values 30 to 230")


def test_the_summary_names_the_folder_of_the_masks(field, doctor):
    folder, _ = field("fiji_masks_with_inverting_lut")
    _, text = doctor(folder / "images", "--masks", folder / "masks")
    assert f"masks: {Path(folder / 'masks')}: 12 masks, 2 classes (binary)" in text
