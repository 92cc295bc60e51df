import multiprocessing
import os
import time

import pytest

from unet_diffusion.data.record import DataRecord
from unet_diffusion.training import run_folder
from unet_diffusion.training.run_folder import UNCHANGED, claim, only_run_in, started_with


def hold(folder, seconds: float) -> None:
    with only_run_in(folder):
        time.sleep(seconds)


def holder(folder, seconds: float):
    process = multiprocessing.get_context("fork").Process(target=hold, args=(folder, seconds))
    process.start()
    while not (folder / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # from the file to the lock on it
    return process


def test_a_second_process_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "WORKERS_END", 0.2)
    process = holder(tmp_path, 60)
    with pytest.raises(RuntimeError, match="another process is training in"), only_run_in(tmp_path):
        pass
    process.kill()
    process.join()
    with only_run_in(tmp_path):
        pass


def test_a_folder_that_orphaned_workers_still_hold_is_waited_for(tmp_path):
    """A process that releases the lock after a second stands for the workers; PyTorch's workers need five."""
    process = holder(tmp_path, 1)
    started = time.monotonic()
    with only_run_in(tmp_path):
        assert 0.3 < time.monotonic() - started < 5
    process.join()


def test_a_run_from_before_some_options_resumes_without_them(tmp_path):
    before = {"joint": {"denoising_weight": 0.0}, "augmentation": {"flip": True}}
    now = {"joint": {**before["joint"], "self_training_weight": 0.0, "confidence": 0.9}}
    now["augmentation"] = {**before["augmentation"], "invert": 0.0, "colour": 0.0}
    now["data"] = {"mask_prefix": None, "image_suffix": None, "masks_per_image": "one"}
    claim(tmp_path / "run", before)
    claim(tmp_path / "run", now)
    changes = (("joint", "self_training_weight", 1.0), ("augmentation", "invert", 0.5), ("augmentation", "colour", 0.3))
    for section, key, value in (*changes, ("data", "masks_per_image", "objects")):
        claim(tmp_path / key, before)
        with pytest.raises(ValueError, match=key):
            claim(tmp_path / key, {**now, section: {**now[section], key: value}})


def test_an_option_that_shares_its_name_with_one_of_another_command_must_not_change(tmp_path):
    """`scale` decides nothing in a training that generates, but here it is that of the augmentation."""
    claim(tmp_path, {"augmentation": {"scale": [0.8, 1.25]}})
    with pytest.raises(ValueError, match=r"scale is \[0.2, 5.0\], but the run in .* was started with \[0.8, 1.25\]"):
        claim(tmp_path, {"augmentation": {"scale": [0.2, 5.0]}})


def test_a_run_from_before_options_were_renamed_resumes(tmp_path):
    """Options named after pictures are now named after images."""
    claim(tmp_path / "run", {"diffusion": {"preview_pictures": 36, "validation_pictures": 256}})
    claim(tmp_path / "run", {"diffusion": {"preview_images": 36, "validation_images": 256}})
    claim(tmp_path / "other", {"diffusion": {"preview_pictures": 36}})
    with pytest.raises(ValueError, match="preview_images is 12, but the run in .* was started with 36"):
        claim(tmp_path / "other", {"diffusion": {"preview_images": 12}})


def test_files_of_a_folder_without_a_run_are_not_replaced(tmp_path):
    """Such as a folder of notes and figures; a record alone is what a start leaves that was killed."""
    for name in ("README.md", "data.json", "curves.png", "metrics.jsonl", "model_index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}\n')
        with pytest.raises(ValueError, match=rf"which holds no run .*, but {name}, which a run would replace or go on"):
            claim(folder, {"steps": 3}, DataRecord())
        assert (folder / name).read_text() == '{"mine": 1}\n' and len([*folder.iterdir()]) == 1
    for name in ("unet", "scheduler", "classifier"):  # such as a saved network
        (tmp_path / "saved" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="but unet, scheduler, classifier, which a run would replace or go on from"):
        claim(tmp_path / "saved", {"steps": 3})
    (tmp_path / "stopped" / "checkpoints" / "step-00000002").mkdir(parents=True)  # of a run whose options are gone
    (tmp_path / "stopped" / "checkpoints" / "step-00000002" / "state.json").touch()
    with pytest.raises(ValueError, match="but checkpoints, which a run would replace or go on from"):
        claim(tmp_path / "stopped", {"steps": 3})
    DataRecord(fingerprint="a").write(tmp_path)
    claim(tmp_path, {"steps": 3}, DataRecord(fingerprint="b"))
    assert DataRecord.read(tmp_path).fingerprint == "b"


def test_the_number_of_threads_is_that_of_the_first_start(tmp_path):
    for threads in (8, 1, 4):
        claim(tmp_path, {"steps": 3, "threads": threads})
        assert started_with(tmp_path)["threads"] == 8


def test_weights_that_a_run_needs_but_does_not_keep_must_not_change(tmp_path):
    claim(tmp_path / "new", {"model": "runs/mine", UNCHANGED: "a"})
    claim(tmp_path / "new", {"model": "runs/mine", UNCHANGED: "a"})
    with pytest.raises(ValueError, match="the weights of runs/mine have changed since the run in .* was started"):
        claim(tmp_path / "new", {"model": "runs/mine", UNCHANGED: "b"})
    claim(tmp_path / "old", {"model": "runs/mine"})  # from a version that did not note them
    claim(tmp_path / "old", {"model": "runs/mine", UNCHANGED: "b"})


def test_what_a_living_process_writes_in_the_folder_stays(tmp_path):
    """Such as an export or samples into the folder of the run."""
    (tmp_path / "samples").mkdir()
    kept = [tmp_path / f".writing-{os.getppid()}-onnx", tmp_path / "samples" / ".writing-99999999-0.png"]
    for path in (*kept, tmp_path / ".writing-99999999-config.json"):
        path.write_text("")
    claim(tmp_path, {"steps": 3})
    assert sorted(tmp_path.rglob(".writing-*")) == sorted(kept)
