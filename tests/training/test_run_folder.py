import multiprocessing
import time

import pytest

from unet_diffusion.training import run_folder
from unet_diffusion.training.run_folder import claim, only_run_in


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


def test_a_run_from_before_options_were_renamed_resumes(tmp_path):
    """Options named after pictures are now named after images."""
    claim(tmp_path / "run", {"diffusion": {"preview_pictures": 36, "validation_pictures": 256}})
    claim(tmp_path / "run", {"diffusion": {"preview_images": 36, "validation_images": 256}})
    claim(tmp_path / "other", {"diffusion": {"preview_pictures": 36}})
    with pytest.raises(ValueError, match="preview_images is 12, but the run in .* was started with 36"):
        claim(tmp_path / "other", {"diffusion": {"preview_images": 12}})
