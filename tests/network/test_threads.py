"""The number of threads: all on an idle machine, fewer beside other programs, the former one in a resumed run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from unet_diffusion.network import threads
from unet_diffusion.network.threads import fastest_threads
from unet_diffusion.training import accelerator
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig


@pytest.fixture
def eight(monkeypatch):
    """A machine on which PyTorch computes in 8 threads, and nobody has said in how many."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({8: 1.0, 4: 1.1, 2: 1.5, 1: 3.0}, 8),
        ({8: 1.0, 4: 0.7, 2: 0.8, 1: 3.0}, 8),  # not clearly slower
        ({8: 9.0, 4: 1.1, 2: 1.0, 1: 3.0}, 2),
        ({8: 9.0, 4: 9.0, 2: 9.0, 1: 3.0}, 1),
    ],
)
def test_fewer_threads_are_taken_only_if_they_are_clearly_faster(eight, monkeypatch, seconds, expected):
    monkeypatch.setattr(threads, "_seconds", seconds.__getitem__)
    assert fastest_threads() == expected
    assert torch.get_num_threads() == 8  # the trial changes nothing


def test_a_stated_number_is_not_tried(eight, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(threads, "_seconds", None)
    assert fastest_threads() == 8


def test_a_trial_takes_the_number_that_it_times(eight, monkeypatch):
    monkeypatch.setattr(threads, "TRIAL", 0.0)
    assert threads._seconds(2) > 0 and torch.get_num_threads() == 2


def test_a_training_takes_the_fastest_number_and_a_resumed_one_its_own(eight, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(accelerator, "fastest_threads", lambda: 2)
    make_accelerator(TrainingConfig(), tmp_path)
    assert torch.get_num_threads() == 2
    assert "computes in 2 threads instead of 8, since other programs use the processor" in caplog.text
    torch.set_num_threads(8)
    (tmp_path / "config.json").write_text(json.dumps({"threads": 1}))
    make_accelerator(TrainingConfig(), tmp_path)
    assert torch.get_num_threads() == 1 and "computes in 1 thread instead of 8, as when" in caplog.text
    torch.set_num_threads(8)
    (tmp_path / "config.json").write_text(json.dumps({"threads": 16}))  # of a larger machine
    make_accelerator(TrainingConfig(), tmp_path)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize("stated", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_commands_let_waiting_threads_sleep_before_torch_is_imported_unless_that_is_stated(stated):
    code = (
        "import os, sys; from unet_diffusion.cli import answers\n"
        "with answers('x'): print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], env=kept | stated, capture_output=True, text=True, check=True)
    expected = stated.get("GOMP_SPINCOUNT", None if stated else "10000")
    assert result.stdout.split() == [str(expected), "False"]
