"""The reduced set of damage: what is detected, and what a run does then."""

import sys

import pytest

from tests.support.scripts import SCRIPTS


@pytest.fixture(scope="module")
def state():
    sys.path.insert(0, str(SCRIPTS))  # as when scripts/faults.py is run
    from fault_checks import state

    yield state
    sys.path.remove(str(SCRIPTS))


@pytest.mark.slow
def test_nothing_is_ever_half_written(state, tmp_path):
    findings = list(state.checks(True, tmp_path))
    assert len(findings) == 9
    assert [finding for finding in findings if not finding.held] == []
