"""The script that injects faults: what it prints and writes, and the faults in numbers, reduced."""

import json

import pytest

from tests.support.scripts import SCRIPTS, load_script


@pytest.fixture(scope="module")
def faults():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return load_script("faults")


def test_lost_numbers_and_half_precision(faults, tmp_path):
    found = list(faults.checked("numbers", True, tmp_path))
    assert len(found) >= 7
    assert [finding for finding in found if not finding.held] == []


def test_a_broken_promise_is_told_written_and_returned(faults, tmp_path, monkeypatch, capsys):
    def broken(reduced, work):
        yield faults.Finding("One", "a | b", "1 of 2", held=False)
        raise OSError("no space")

    def kept(reduced, work):
        work.joinpath("file").write_text("")
        yield faults.Finding("Two", "c", "2 of 2", held=True)

    monkeypatch.setattr(faults, "PARTS", {"broken": broken, "kept": kept})
    assert not faults.run(faults.Faults(tmp_path / "both", only=("broken", "kept"), reduced=True))
    assert faults.run(faults.Faults(tmp_path / "one", only=("kept",)))
    assert (tmp_path / "both" / "faults.md").read_text().splitlines()[2:] == [
        "| One | a \\| b | 1 of 2 | **no** |",
        "| broken | the check itself | OSError: no space | **no** |",
        "| Two | c | 2 of 2 | yes |",
    ]
    written = json.loads((tmp_path / "both" / "faults.json").read_text())
    assert [finding["held"] for finding in written["findings"]] == [False, False, True]
    assert written["reduced"] and written["seconds"].keys() == {"broken", "kept"}
    assert capsys.readouterr().out.splitlines()[:2] == [
        "BROKEN a | b: 1 of 2",
        "BROKEN the check itself: OSError: no space",
    ]


def test_unknown_parts_are_refused(faults, tmp_path):
    with pytest.raises(ValueError, match="only is 'kill', but must be among kills, state"):
        faults.Faults(tmp_path, only=("kill",))
