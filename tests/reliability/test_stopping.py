"""A stop that goes to all processes of a job, as a scheduler or a service manager sends it."""

import os
import signal
import sys
import time

import pytest

from tests.support.scripts import SCRIPTS
from unet_diffusion.training.checkpoints import saved_checkpoints


@pytest.fixture(scope="module")
def children():
    sys.path.insert(0, str(SCRIPTS))  # as when scripts/faults.py is run
    from fault_checks import children

    yield children
    sys.path.remove(str(SCRIPTS))


@pytest.mark.slow
def test_a_stop_that_reaches_the_data_workers_too_still_saves(children, tmp_path):
    """Status 128 + SIGTERM, a checkpoint of the very step, and no process that is left."""
    from fault_checks.tiny_runs import into, tiny_runs, train

    options = into(tiny_runs(tmp_path, steps=2000)["ddpm"], tmp_path / "run", num_workers=1)
    options.training.checkpoint_every = 1000
    process = children.start(tmp_path / "log", train, options)
    while not list((tmp_path / "run").glob("previews/*.png")):
        assert process.exitcode is None, children.last_line(tmp_path / "log")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert children.end(process, 60) == f"it ended with status {128 + signal.SIGTERM}"
    assert len(saved_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    assert children.all_gone([process.pid], 5) == []
