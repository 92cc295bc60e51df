"""The table of the promises, and the fixtures that several of these tests share."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability import children
from tests.reliability.sandbox import Sandbox, save_models
from tests.reliability.table import (  # noqa: F401, hooks of pytest
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_terminal_summary,
)
from tests.reliability.tiny_runs import Options, into, tiny_runs, train


@pytest.fixture(scope="session")
def full(request) -> bool:
    """True if all cases are to run, with all repetitions."""
    return request.config.getoption("reliability_full", False)


@pytest.fixture(scope="session")
def only_full(full) -> None:
    """Skips a test that takes long."""
    if not full:
        pytest.skip("only with --reliability-full")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def sandbox(models, tmp_path) -> Sandbox:
    return Sandbox(tmp_path, models)


@dataclass(frozen=True)
class WholeRun:
    """A finished run that was not disturbed, and its options; `into` sets the output."""

    options: Options
    folder: Path


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> WholeRun:
    """A DDPM run of 8 steps."""
    work = tmp_path_factory.mktemp("whole")
    options = tiny_runs(work, steps=8)["ddpm"]
    assert children.run(work / "log", train, into(options, work / "run")) == ""
    return WholeRun(options, work / "run")
