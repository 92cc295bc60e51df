"""Tests of training and use on an NVIDIA GPU, skipped where there is none; all of them take a few minutes on one."""

from pathlib import Path

import pytest
import torch

DEVICE = "cuda"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cuda")
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """Chooses kernels that give the same numbers each time, as far as there are such kernels."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr("unet_diffusion.training.trainer.choose_kernels", lambda device: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
