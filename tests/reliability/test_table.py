"""The table of the promises, from a run of pytest in a process of its own."""

import subprocess
import sys

from tests.support.scripts import SCRIPTS

TESTS = """
import pytest

PROMISE = "One"

@pytest.mark.parametrize("place", ["first", "second"])
def test_a_kill_in(place, record_property):
    record_property("fault", "kills")
    record_property("figure", "resumed")

def test_a_disk_that_is_full(record_property):
    record_property("figure", "a | b\\nc")

def test_what_breaks(record_property):
    record_property("figure", "1 of 2")
    assert not "lost"

@pytest.fixture
def absent():
    raise OSError("no space")

def test_what_cannot_be_set_up(absent):
    pass

def test_what_a_machine_lacks():
    pytest.skip("no GPU")
"""
ROWS = [
    "## One",
    "",
    "| fault | what happened | held |",
    "| --- | --- | --- |",
    "| kills | 2 resumed | yes |",
    "| a disk that is full | a \\| b c | yes |",
    "| what breaks | test_what_breaks: AssertionError: assert not 'lost' | **no** |",
    "| what cannot be set up | test_what_cannot_be_set_up: OSError: no space | **no** |",
    "| what a machine lacks | not tried: no GPU | - |",
]


def test_each_test_of_a_promise_has_a_row_and_a_broken_promise_shows_in_the_status(tmp_path):
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text("def test_of_no_promise(): pass")
    options = ["-p", "tests.reliability.table", "-p", "no:cacheprovider", "--reliability-table", tmp_path / "table.md"]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, "-c", "/dev/null", tmp_path]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPTS.parent)
    assert printed.returncode == 1, printed.stdout
    assert (tmp_path / "table.md").read_text().splitlines() == ROWS
    assert "\n".join(ROWS) in printed.stdout
