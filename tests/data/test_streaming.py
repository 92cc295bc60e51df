"""A stream is the same for any number of processes, resumes exactly, and survives broken images."""

import io
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from torch.utils.data import DataLoader

from unet_diffusion.data import streaming
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.sets import load_images
from unet_diffusion.images.pixel_range import PixelRange

datasets.disable_progress_bars()


def png(value: int) -> dict:
    file = io.BytesIO()
    np.save(file, np.full((4, 6), value, dtype=np.uint8))
    return {"bytes": file.getvalue(), "path": f"{value}.npy"}


def arrow(folder, images, files=1) -> str:
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=["even", "odd"])})
    rows = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(len(images))]}, features=features)
    rows.save_to_disk(folder / "saved", num_shards=files)
    return str(folder / "saved" / "*.arrow")


def stream(source, process_index=0, num_processes=1, seed=0, **options):
    config = DataConfig(data=source, streaming=True, image_size=4, **{"shuffle_buffer": 5, **options})
    return load_images(config, seed, process_index, num_processes).train


def numbers(images, count) -> list[int]:
    return [int(item["image"].max()) for item in islice(images, count)]


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (2, 5, 13)])  # of the files
def test_processes_see_disjoint_images_and_together_all(tmp_path, sizes):
    """Also where files hold unequal numbers of rows and an epoch ends within a batch."""
    ends = np.cumsum(sizes)
    for file, (end, size) in enumerate(zip(ends, sizes)):
        (tmp_path / str(file)).mkdir()
        arrow(tmp_path / str(file), [png(value) for value in range(end - size, end)])
    source = str(tmp_path / "*" / "saved" / "*.arrow")
    whole = numbers(stream(source), 48)
    for start in (0, 20):
        assert sorted(whole[start : start + 20]) == list(range(20))
    assert whole[:20] != whole[20:40]  # the second epoch has another order
    assert numbers(stream(source, seed=1), 48) != whole
    for processes, batch_size in ((2, 4), (4, 2), (2, 2), (3, 1)):
        parts = []
        for rank in range(processes):
            part = stream(source, rank, processes)
            part.batch_size = batch_size
            parts.append(iter(part))
        together = []
        while len(together) < 48:
            for part in parts:
                together += numbers(part, batch_size)
        assert together[:48] == whole


def test_a_broken_image_has_the_same_substitute_in_every_process(tmp_path):
    images = [png(value) for value in range(12)]
    images[4] = images[5] = {"bytes": b"", "path": "broken.png"}
    source, options = arrow(tmp_path, images), {"crop_size": 4, "flip": True, "max_broken": 0.1}
    whole = [item["image"] for item in islice(stream(source, **options), 30)]
    parts = [iter(stream(source, rank, 3, **options)) for rank in range(3)]
    for place, image in enumerate(whole):
        assert torch.equal(next(parts[place % 3])["image"], image)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_equals_the_undisturbed_stream_with_a_worker_process_or_without(tmp_path, workers):
    images = [png(value) for value in range(12)]
    images[4] = {"bytes": b"", "path": "four.png"}  # another image takes its place
    source = arrow(tmp_path, images)
    options = {"crop_size": 4, "flip": True, "max_broken": 0.1}

    def seen(start: int, batches: int) -> list[tuple[int, int]]:
        streamed = stream(source, **options)
        streamed.start = start
        loader = DataLoader(streamed, batch_size=3, collate_fn=to_batch, num_workers=workers if start else 0)
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


def test_a_stream_has_the_attributes_of_a_set(tmp_path):
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


def test_streams_that_cannot_continue_say_why(tmp_path, caplog, monkeypatch):
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
    with pytest.raises(ValueError, match="no usable image"):
        stream(arrow(tmp_path / "none", [broken] * 3))


def test_a_stream_that_breaks_off_is_named(tmp_path):
    """The second of two Parquet files is cut in the middle of its rows."""
    rows = Dataset.from_dict({"image": [png(value) for value in range(40)]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    for index in range(2):
        rows.shard(2, index).to_parquet(tmp_path / f"{index}.parquet", batch_size=4)
    content = bytearray((tmp_path / "1.parquet").read_bytes())
    content[100:2000] = bytes(1900)  # the footer, which locates the columns, is intact
    (tmp_path / "1.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="(?s)which cannot be read: .* It is damaged or incomplete; get it again"):
        numbers(stream(str(tmp_path / "*.parquet")), 40)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    images = stream(arrow(tmp_path, [png(value) for value in range(8)]))
    images.class_names = ("even",)
    with pytest.raises(ValueError, match="a label of .* is 1, but there are 1 classes"):
        numbers(images, 8)
