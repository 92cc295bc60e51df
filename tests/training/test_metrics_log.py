import errno
import os
import re

import pytest
from PIL import Image

from unet_diffusion.training.metrics_log import MetricsLog, read_metrics, save_curves, series


def test_a_resumed_run_neither_misses_nor_doubles_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in (1, 2, 3):
        log.append(step, loss=step / 3)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the last line of a killed run
    log = MetricsLog(path, step=2)
    log.append(3, loss=1.0)
    assert read_metrics(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]


def test_series_leaves_out_rows_without_the_quantity():
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 3.0}, {"step": 2, "loss": 1.0}]
    assert series(rows, "loss") == ([1, 2], [2.0, 1.0])
    assert series(rows, "absent") == ([], [])


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \xff}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"line 2 of {path} is damaged; mend or remove it")):
        read_metrics(path)


def test_a_line_is_on_the_disk_when_it_is_written(tmp_path, monkeypatch):
    """Otherwise a power cut could keep a later checkpoint and lose the lines before it."""
    log, flushed, fsync = MetricsLog(tmp_path / "metrics.jsonl", step=0), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(log.path.read_text()), fsync(file)))
    log.append(1, loss=0.5)
    assert flushed == ['{"step": 1, "loss": 0.5}\n']


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="metrics.jsonl could not be written: .*No space left on device"):
        log.append(1, loss=0.5)


def test_curves_are_drawn_for_what_was_logged(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5)]
    save_curves(rows, tmp_path / "curves.png", {"loss": ("loss", "absent"), "nothing": ("absent",)})
    assert Image.open(tmp_path / "curves.png").size == (500, 320)
