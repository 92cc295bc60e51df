"""Which files a command takes, with their places, and how their outputs are called."""

import os
import random
import time
from pathlib import Path

import pytest

from unet_diffusion.commands.inputs import find_inputs
from unet_diffusion.commands.output_names import output_names

ENDINGS = (".png", "-overlay.png")


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_of(*places: str, root: str = "/data") -> dict[str, str]:
    paths = [Path(root, place) for place in places]
    return dict(zip(places, output_names(paths, places, ENDINGS)))


@pytest.mark.parametrize(
    ("given", "places"),
    [
        (["in"], ["a/b/cell.tif", "a/cell.png", "cell.png"]),
        (["in/a/b/cell.tif"], ["cell.tif"]),
        (["in/*"], ["a/b/cell.tif", "a/cell.png", "cell.png", "notes.txt"]),
        (["in/*/cell.png"], ["a/cell.png"]),
        (["in/**/cell.*"], ["a/b/cell.tif", "a/cell.png", "cell.png"]),
        (["in/a/b/../cell.png", "in/a/cell.png"], ["cell.png"]),
        (["in/a/*/../cell.png"], ["b/cell.png"]),
        (["in/a", "in/cell.png", "in"], ["b/cell.tif", "cell.png", "cell.png"]),  # each once, as it was first named
    ],
)
def test_places_are_below_what_was_named(tmp_path, monkeypatch, given, places):
    monkeypatch.chdir(filled(tmp_path, "in/a/b/cell.tif", "in/a/cell.png", "in/cell.png", "in/notes.txt", "in/.x.png"))
    for named in (given, [str(tmp_path / each) for each in given]):
        found = find_inputs(named, tmp_path / "out")
        assert list(found.places) == places
        assert all(path.is_absolute() and path.is_file() for path in found.paths)


def test_results_are_not_taken_for_inputs(tmp_path):
    images = filled(tmp_path, "a/x.png", "b/x.png", "out/x.png", "out/deep/x.png", "c/out/x.png")
    (tmp_path / "b" / "link.png").symlink_to(tmp_path / "out" / "deep" / "x.png")
    (tmp_path / "b" / "other.png").symlink_to(tmp_path / "a" / "x.png")
    expected = ["a/x.png", "b/other.png", "b/x.png", "c/out/x.png"]
    assert list(find_inputs([str(images)], images / "out").places) == expected
    pattern = find_inputs([str(images / "**" / "*.png")], images / "out")
    assert sorted({*pattern.places} - {"b/link.png"}) == expected
    assert list(find_inputs([str(images / "out" / "deep")], images / "out").places) == ["x.png"]  # as it was named
    with pytest.raises(ValueError, match="there is no image outside of"):
        find_inputs([str(images / "out")], images / "out")


@pytest.mark.parametrize("given", ["out/x.png", "out/*.png", "out"])
def test_an_input_in_the_output_folder_is_not_called_missing(tmp_path, given):
    filled(tmp_path, "a/x.png", "out/x.png")
    inputs = [str(tmp_path / each) for each in ("a/x.png", given, "nowhere.png")]
    found = find_inputs(inputs, tmp_path / "out")
    assert found.places == ("x.png",)
    assert found.missing == (
        f"{inputs[1]}: it lies in the output folder, whose files are results; choose another output",
        f"{inputs[2]}: there is no such file, and no image in it",
    )


@pytest.mark.parametrize("kind", ["segment.jsonl", "upscale.jsonl", "sample.jsonl", "model_index.json"])
def test_results_of_other_calls_and_runs_are_left_out_unless_they_are_named(tmp_path, kind):
    names = {"x.png", "a/x.png", f"a/old/{kind}", "a/old/x.png", "a/old/deep/x-overlay.png", f"out/{kind}", "out/x.png"}
    filled(tmp_path, *names)
    old = tmp_path / "a" / "old"

    def found(*given: Path) -> tuple[set[str], tuple[Path, ...]]:
        inputs = find_inputs(map(str, given), tmp_path / "out")
        assert len(inputs.notes()) == len(inputs.results) and inputs.missing == ()
        return {str(path.relative_to(tmp_path)) for path in inputs.paths}, inputs.results

    plain, results = {"a/x.png", "x.png"}, {"a/old/x.png", "a/old/deep/x-overlay.png"}
    assert found(tmp_path) == found(tmp_path / "*") == (plain, (old,))
    assert found(tmp_path / "**" / "*.png") == (plain, (old,))
    assert found(tmp_path / "a" / "*") == ({"a/x.png"}, (old,))
    assert found(old) == found(old / "**" / "*.png") == (results, ())
    assert found(old / "x.png") == ({"a/old/x.png"}, ())
    assert found(tmp_path, old) == (plain | results, ())
    with pytest.raises(
        ValueError, match=r"no image outside of .*out\. 1 folder with a run or results of a command left out"
    ):
        find_inputs([str(tmp_path / "a" / "o*")], tmp_path / "out")


def test_links_to_folders_are_counted_and_not_followed(tmp_path):
    filled(tmp_path, "in/x.png", "in/a/y.png", "elsewhere/z.png")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    found = find_inputs([str(tmp_path / "in")], tmp_path / "out")
    assert found.places == ("a/y.png", "x.png")
    assert found.notes() == [
        f"2 folders behind links left out, such as {tmp_path}/in/a/loop; name such a folder itself to take it"
    ]
    named = find_inputs([str(tmp_path / "in"), str(tmp_path / "in" / "link")], tmp_path / "out")
    assert named.places == ("a/y.png", "x.png", "z.png") and named.links == (tmp_path / "in" / "a" / "loop",)


def test_masks_in_a_folder_of_inputs_are_left_out_unless_they_are_named(tmp_path):
    names = {
        "a.png",
        "a_mask.png",
        "b/images/c.png",
        "b/masks/c.tif",
        "b/Labels/c_seg.png",
        "gt/only.png",
        "d_mask.png",
    }
    filled(tmp_path, *names)

    def found(*given: Path) -> tuple[set[str], int]:
        inputs = find_inputs(map(str, given), tmp_path / "out")
        return {str(path.relative_to(tmp_path)) for path in inputs.paths}, len(inputs.masks)

    plain = {"a.png", "b/images/c.png", "gt/only.png", "d_mask.png"}
    assert found(tmp_path) == (plain, 3)
    assert found(tmp_path / "**" / "*.*") == (names, 0)
    assert found(tmp_path / "b" / "masks") == ({"b/masks/c.tif"}, 0)
    assert found(tmp_path, tmp_path / "a_mask.png") == (plain | {"a_mask.png"}, 2)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may list every folder")
def test_folders_that_cannot_be_listed_are_named(tmp_path):
    filled(tmp_path, "a/x.png", "b/x.png")
    (tmp_path / "b").chmod(0)
    try:
        found = find_inputs([str(tmp_path)], tmp_path / "out")
    finally:
        (tmp_path / "b").chmod(0o755)
    assert found.places == ("a/x.png",) and "b cannot be listed: Permission denied" in found.missing[0]


def test_outputs_are_called_like_their_inputs_and_those_of_one_name_keep_their_suffix():
    assert names_of("a/b/cell.tif", "a/cell.tif", "a.b.png", ".png", "no-suffix") == {
        "a/b/cell.tif": "a/b/cell",
        "a/cell.tif": "a/cell",
        "a.b.png": "a.b",
        ".png": ".png",
        "no-suffix": "no-suffix",
    }
    assert list(names_of("a/x.png", "a/x.tif", "b/x.png").values()) == ["a/x.png", "a/x.tif", "b/x"]
    assert list(names_of("x.png", "x-overlay.png").values()) == ["x.png", "x-overlay.png"]
    assert list(names_of("x.tif", "x.png/y.tif").values()) == ["x.tif", "x.png/y"]  # x.png is a folder


def test_names_never_clash_and_depend_on_no_other_order_or_number():
    """All names that a few letters allow, in any order: a name is the place, with suffix, or with a digest."""
    found = [
        folder + stem + suffix
        for folder in ("", "a/", "A/", "x.png/", "é/", "e\u0301/")
        for stem in ("x", "X", "x-overlay", "x.png", "x.png-overlay", "..", "x.tif")
        for suffix in (".png", ".tif", ".PNG", "")
        if stem + suffix != ".."
    ]
    places = list(dict.fromkeys(found))
    names = names_of(*places)
    outputs = [(name + ending).casefold().replace("e\u0301", "é") for name in names.values() for ending in ENDINGS]
    assert len(set(outputs)) == len(outputs)
    assert not any(part in ("", ".", "..") for output in outputs for part in output.split("/"))
    shuffled = random.Random(0).sample(places, len(places))
    assert names_of(*shuffled) == names
    for place, name in names_of(*places, *(f"other/{i}.png" for i in range(50))).items():
        assert names.get(place, name) == name


def test_names_are_made_in_linear_time():
    def seconds(count: int) -> float:
        places = [f"{i % 7}.png" for i in range(count)]
        paths = [Path(f"/data/{i}/{i % 7}.png") for i in range(count)]
        started = time.process_time()
        assert len(set(output_names(paths, places, ENDINGS))) == count
        return time.process_time() - started

    seconds(100)
    assert seconds(16_000) < 30 * seconds(2_000)  # by a square it would be 64 times as long
