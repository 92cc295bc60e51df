"""Fixtures of all tests: one thread per process, so that results do not depend on the machine, and the shared data."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # what "auto" stands for, on every machine

# Fixtures import torch: the process that hands tests to others needs none, and would keep them waiting.

import gc  # noqa: E402
import importlib.util  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
SHARED_DATA = SHARED / "data"
FIELD_CASES = SHARED / "field" / "make.py"


def pytest_collection_finish() -> None:
    """Takes all that was imported out of the search for garbage, which each training makes at its end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def field_cases() -> ModuleType:
    """The module that builds the files of cases from public bug reports."""
    if not FIELD_CASES.is_file():
        pytest.skip("the cases from public bug reports are not beside this checkout")
    spec = importlib.util.spec_from_file_location("field_cases", FIELD_CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def field(field_cases, tmp_path) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Builds a case by its name; returns the folder of its files and what is right for them."""

    def build(name: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / name
        folder.mkdir()
        return folder, getattr(field_cases, name)(folder)

    return build


@pytest.fixture(params=["contiguous_format", "channels_last"])
def layout(request, monkeypatch) -> Any:
    """Makes training use each layout of weights, a `torch.memory_format`: those of a CPU and of CUDA."""
    import torch

    memory_format = getattr(torch, request.param)
    monkeypatch.setattr("unet_diffusion.training.trainer.memory_layout", lambda device: memory_format)
    return memory_format
