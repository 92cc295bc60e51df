import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from unet_diffusion.files import (
    check_absent,
    merged_into,
    remove_at_once,
    remove_leftovers,
    remove_leftovers_of,
    write_json,
    write_text,
    written_aside,
)


def test_a_block_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with written_aside(tmp_path / "image.png") as aside:
        assert aside.suffix == ".png" and aside.parent == tmp_path
        aside.write_bytes(b"x")
    assert (tmp_path / "image.png").read_bytes() == b"x"


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
    (tmp_path / ".writing-99999999-step-1").mkdir()
    for name in (".writing-99999999-a.json", f".writing-{os.getpid()}-b.json", ".writing-x7_k", "c.json"):
        (tmp_path / name).write_text("")
    living = tmp_path / f".writing-{os.getppid()}-d.json"
    living.write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"c.json", living.name}


def test_a_leftover_of_a_process_with_the_same_number_is_replaced(tmp_path):
    leftover = tmp_path / f".writing-{os.getpid()}-folder"
    leftover.mkdir()
    (leftover / "half").write_text("")
    with written_aside(tmp_path / "folder") as aside:
        aside.mkdir()
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_pipeline_that_is_replaced_has_no_index_until_all_of_it_is_there(tmp_path, monkeypatch):
    """The index is gone before the first file is replaced, and comes back after the last."""

    def export(text: str) -> None:
        with merged_into(tmp_path) as aside:
            for name in ("README.md", "model_index.json", "unet/weights"):
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_text(text)

    def watched(source, target) -> None:
        seen.append((tmp_path / "model_index.json").exists())
        replace(source, target)

    export("old")
    seen: list[bool] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", watched)
    export("new")
    assert seen == [False, False, False]
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"new"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what a descriptor is of")
def test_all_is_on_the_disk_before_the_renaming_and_the_renaming_at_the_end(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(source, target) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    with written_aside(tmp_path / "folder") as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("")
    written = {str(path) for path in (aside, aside / "inner", aside / "inner" / "file")}
    assert set(events[:3]) == written and events[3:] == ["renamed", str(tmp_path)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("disk full")])
def test_an_error_that_names_no_file_is_given_one(tmp_path, error):
    sentence = r"a\.json could not be written: .*(No space left on device|disk full)"
    with pytest.raises(OSError, match=sentence), written_aside(tmp_path / "a.json"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_names_its_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"), written_aside(tmp_path / "a.json"):
        (tmp_path / "absent").read_text()


def test_a_folder_whose_removal_is_cut_short_is_gone_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "step-1").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_at_once(tmp_path / "step-1")
    assert [path.name for path in tmp_path.iterdir()] == [f".writing-{os.getpid()}-removed-step-1"]


def test_existing_files_are_named_unless_they_may_be_overwritten(tmp_path):
    absent, existing = tmp_path / "a.json", tmp_path / "b.json"
    existing.touch()
    check_absent(absent, overwrite=False)
    check_absent(absent, existing, overwrite=True)
    with pytest.raises(ValueError, match="b.json exists already; set overwrite, or choose another output"):
        check_absent(absent, existing, overwrite=False)


def test_the_longest_names_are_written_aside_and_their_leftovers_removed(tmp_path):
    for name in ("n" * 251 + ".png", "é" * 125 + ".npy", "short.png"):
        with written_aside(tmp_path / name) as aside:
            aside.write_text(name)
            assert aside.suffix == Path(name).suffix
        of_living = tmp_path / aside.name.replace(str(os.getpid()), str(os.getppid()))
        for leftover in (of_living, tmp_path / aside.name.replace(str(os.getpid()), "99999999")):
            leftover.touch()
        remove_leftovers_of(tmp_path / name)
        assert set(tmp_path.iterdir()) == {tmp_path / name, of_living}
        remove_leftovers_of(tmp_path / name, alone=True)
        assert [path.read_text() for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
