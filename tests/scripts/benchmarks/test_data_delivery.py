"""The measurement of data delivery, on few images, so that it takes no time."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

from scripts.benchmarks import data_delivery
from scripts.benchmarks.first_batch import BATCH, example, ours

IMAGES = 400  # 7 batches


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, images):
    def png(image):
        file = io.BytesIO()
        Pillow.fromarray(image).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    path = tmp_path_factory.mktemp("data") / "train.parquet"
    columns = {"image": [png(image) for image in images], "label": [0, 1] * (IMAGES // 2)}
    Dataset.from_dict(columns, Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})).to_parquet(path)
    return path


def test_both_loaders_deliver_the_stored_images(parquet, images, tmp_path):
    stored = {image.tobytes() for image in images}
    batch = next(ours(str(parquet), str(tmp_path / "ours")))
    assert batch["image"].shape == (BATCH, 1, 8, 8)
    assert {image.numpy().tobytes() for image in batch["image"]} <= stored
    batch = next(example(str(parquet), str(tmp_path / "example")))
    assert batch["input"].shape == (BATCH, 3, 8, 8) and batch["input"].dtype == torch.float32
    levels = ((batch["input"][:, 0] + 1) * 127.5).round().to(torch.uint8)  # the inverse of (x / 255 - 0.5) / 0.5
    assert {image.numpy().tobytes() for image in levels} <= stored


@pytest.mark.slow  # imports everything in a new process
def test_a_process_reports_the_time_to_its_first_batch_and_keeps_its_cache(parquet, tmp_path):
    report = data_delivery.report("ours", parquet, tmp_path)
    assert 0 < report["imports"] < report["processor"]
    assert report["seconds"] > report["imports"] / 4  # several threads may take less wall-clock time than CPU time
    (kept,) = tmp_path.glob("unet_diffusion/*/images/pixels.bin")
    assert kept.stat().st_size == IMAGES * 8 * 8


def test_rounds_begin_without_a_cache_and_the_ratio_is_of_processor_seconds(parquet, monkeypatch):
    seen = []

    def report(name, data, cache):
        seen.append((name, cache.exists()))
        cache.mkdir(exist_ok=True)
        return {"processor": 4.0 if name == "example" else 1.0, "imports": 0.5, "seconds": 9.0}

    monkeypatch.setattr(data_delivery, "report", report)
    cold, warm = data_delivery.first_batch(parquet, rounds=2)
    assert seen == 2 * [("ours", False), ("example", False), ("ours", True), ("example", True)]
    assert cold.value == warm.value == 4 and cold.met and "cold" in cold.work and "warm" in warm.work


def test_the_share_that_waits_is_that_of_the_training_loop(parquet):
    share, alone = data_delivery.delivery(parquet, rounds=4)
    assert len(share.details["shares"]) == 4 and all(0 < each < 1 for each in share.details["shares"])
    assert share.met == (share.value <= 0.03)
    assert alone.value > 0 and alone.details["seconds"].keys() == {"ours", "example"}


def test_a_slow_loader_is_seen(monkeypatch):
    import time

    def slow(*_):
        while True:
            time.sleep(0.03)
            yield {}

    monkeypatch.setattr(data_delivery.DiffusionTask, "batches", slow)
    task = object.__new__(data_delivery.TimedTask)
    for _, _ in zip(range(6), task.batches(None, 0)):
        time.sleep(0.01)  # the work of a step
    assert all(share == pytest.approx(0.75, abs=0.25) and share > 0.5 for share in task.shares())
