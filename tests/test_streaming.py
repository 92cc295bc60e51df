"""A stream is divided over processes without overlap, resumes exactly, and survives broken pictures."""

import io
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from torch.utils.data import DataLoader

from unet_diffusion import streaming
from unet_diffusion.data import DataConfig, load_images, to_batch
from unet_diffusion.pixels import PixelRange

datasets.disable_progress_bars()


def png(value: int) -> dict:
    file = io.BytesIO()
    np.save(file, np.full((4, 6), value, dtype=np.uint8))
    return {"bytes": file.getvalue(), "path": f"{value}.npy"}


def arrow(folder, pictures, files=1) -> str:
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=["even", "odd"])})
    rows = Dataset.from_dict({"image": pictures, "label": [i % 2 for i in range(len(pictures))]}, features=features)
    rows.save_to_disk(folder / "saved", num_shards=files)
    return str(folder / "saved" / "*.arrow")


def stream(source, process_index=0, num_processes=1, seed=0, **options):
    config = DataConfig(data=source, streaming=True, image_size=4, **{"shuffle_buffer": 5, **options})
    return load_images(config, seed, process_index, num_processes).train


def numbers(images, count) -> list[int]:
    return [int(item["image"].max()) for item in islice(images, count)]


@pytest.mark.parametrize("files", [1, 2])  # one file: each process takes every second row; two: a file each
def test_processes_see_disjoint_pictures_and_together_all(tmp_path, files):
    source = arrow(tmp_path, [png(value) for value in range(20)], files)
    parts = [stream(source, rank, 2) for rank in range(2)]
    epochs = [numbers(part, 20) for part in parts]
    for start in (0, 10):
        seen = [epoch[start : start + 10] for epoch in epochs]
        assert sorted(seen[0] + seen[1]) == list(range(20))
    assert epochs[0][:10] != epochs[0][10:]  # another order in the second epoch
    assert numbers(stream(source, 0, 2), 20) == epochs[0]
    assert numbers(stream(source, 0, 2, seed=1), 20) != epochs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_equals_the_undisturbed_stream(tmp_path, workers):
    pictures = [png(value) for value in range(12)]
    pictures[4] = {"bytes": b"", "path": "four.png"}  # its place is taken by another
    source = arrow(tmp_path, pictures)
    options = {"crop_size": 4, "flip": True, "max_broken": 0.1}

    def seen(start: int, batches: int) -> list[tuple[int, int]]:
        images = stream(source, **options)
        images.start = start
        loader = DataLoader(images, batch_size=3, collate_fn=to_batch, num_workers=workers)
        pairs = (zip(batch["image"].amax((1, 2, 3)).tolist(), batch["label"].tolist()) for batch in loader)
        return [pair for batch in islice(pairs, batches) for pair in batch]

    undisturbed = seen(0, batches=13)
    assert set(undisturbed) == {(value, value % 2) for value in range(12) if value != 4}
    for start in (1, 7, 13, 25):
        assert seen(start, batches=4) == undisturbed[start : start + 12]


def test_cuts_are_resumed_too(tmp_path):
    ramp = io.BytesIO()
    np.save(ramp, np.tile(np.arange(30, dtype=np.uint8), (4, 1)))
    source = arrow(tmp_path, [{"bytes": ramp.getvalue(), "path": None}] * 6)
    undisturbed = [item["image"] for item in islice(stream(source, crop_size=4, flip=True), 20)]
    assert len({int(image.min()) for image in undisturbed}) > 5
    resumed = stream(source, crop_size=4, flip=True)
    resumed.start = 8
    assert all(torch.equal(a["image"], b) for a, b in zip(resumed, undisturbed[8:]))


def test_a_stream_says_what_a_set_says(tmp_path):
    source = arrow(tmp_path, [png(value) for value in range(4)])
    images = stream(source)
    assert (images.channels, images.height, images.width) == (1, 4, 4)
    assert images.pixel_range == PixelRange.full("uint8")
    assert images.class_names == ("even", "odd")
    assert stream(source).fingerprint == images.fingerprint != stream(source, max_images=3).fingerprint
    assert set(numbers(stream(source, max_images=3), 9)) == {0, 1, 2}
    sets = load_images(
        DataConfig(data=source, streaming=True, image_size=4, validation_data=source, cache_dir=str(tmp_path / "cache"))
    )
    assert len(sets.validation) == 4


def test_streams_that_cannot_go_on_say_why(tmp_path, caplog, monkeypatch):
    broken = {"bytes": b"", "path": "broken.png"}
    source = arrow(tmp_path, [png(1), broken, broken, png(2)])
    with pytest.raises(ValueError, match="max_broken=0.01"):
        numbers(stream(source), 4)
    assert "broken.png is empty" in caplog.text
    with monkeypatch.context() as context:  # a real loader takes 10 seconds to notice that its workers failed
        context.setattr(streaming, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
        with pytest.raises(ValueError, match="num_workers is 2"):
            numbers(stream(source), 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no usable picture"):
        stream(arrow(tmp_path / "none", [broken] * 3))
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="fewer processes"):
        numbers(stream(arrow(tmp_path / "one", [png(1)]), 1, 2), 1)
