import pytest

from unet_diffusion.atomic import merged_into, remove_leftovers, write_json, write_text, written_aside


def test_a_block_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with written_aside(tmp_path / "picture.png") as aside:
        assert aside.suffix == ".png" and aside.parent == tmp_path
        aside.write_bytes(b"x")
    assert (tmp_path / "picture.png").read_bytes() == b"x"


def test_merging_replaces_files_and_leaves_others(tmp_path):
    (tmp_path / "unet").mkdir()
    write_text(tmp_path / "unet" / "config.json", "old")
    write_text(tmp_path / "notes.txt", "mine")
    with merged_into(tmp_path) as aside:
        (aside / "unet").mkdir()
        (aside / "unet" / "config.json").write_text("new")
    assert (tmp_path / "unet" / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "unet"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "checkpoints" / ".writing-12-step-1").mkdir(parents=True)
    (tmp_path / ".writing-12-a.json").write_text("")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints"]
