"""A run spread over several processes is the same run; the rest of the promise is tried by `scripts/faults.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def processes() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # as when the script is run
    from fault_checks import processes

    yield processes
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def place(processes, tmp_path):
    place = processes.Place(tmp_path)
    place.make()
    return place


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_each_image_is_seen_once_an_epoch_in_the_same_order_by_any_number_of_processes(processes, place, kind):
    assert processes.once_an_epoch(place, kind).held


@pytest.mark.slow
def test_two_processes_with_two_micro_batches_learn_masks_as_one_with_one(processes, place):
    """With augmentation, which leaves another number of ignored pixels in each image; 3 are held out for both."""
    one = processes.train(place, "segmentation", 1)
    two = processes.train(place, "segmentation", 2, accumulate=2)
    found = processes.distance(two, one)
    assert found.held, found
    other = processes.distance(processes.train(place, "segmentation", 1, "--seed", "1", name="other"), one)
    assert not other.held
    assert other.lines and other.files and other.learning_rate == 0


@pytest.mark.slow
def test_the_reduced_checks_hold(processes, tmp_path):
    broken = [finding for finding in processes.checks(True, tmp_path) if not finding.held]
    assert not broken
