"""Cases of commands and documents: trackers, schedulers, loading, and other pipelines."""

import pytest
from accelerate import tracking

from unet_diffusion import cli
from unet_diffusion.training.accelerator import check_trackers
from unet_diffusion.training.config import TrainingConfig


@pytest.fixture
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])


@pytest.mark.parametrize("trackers", [["wandb"], ["wandb", "tensorboard"], ["tensorboard", "wandb"]])
def test_a_tracker_that_is_not_installed_is_refused_before_training(field, only_tensorboard, tmp_path, trackers):
    folder, _ = field("pictures_of_red_discs")
    command = ["train-ddpm", "--data", str(folder), "--output", str(tmp_path / "run"), "--trackers", *trackers]
    with pytest.raises(SystemExit, match="trackers has 'wandb', but wandb is not installed here; pip install wandb"):
        cli.main(command)
    assert not (tmp_path / "run").exists()


def test_the_tracker_of_the_default_is_named_too_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="tensorboard is not installed here; pip install tensorboard, or leave it out"):
        check_trackers(TrainingConfig().trackers)


def test_an_unknown_tracker_is_refused_with_those_that_there_are(only_tensorboard):
    with pytest.raises(ValueError, match="trackers has 'wanbd', but must be among all, aim, tensorboard, wandb, .*"):
        check_trackers(("tensorboard", "wanbd"))
    with pytest.raises(ValueError, match="trackers is 'wandb', but must be a tuple of names"):
        TrainingConfig(trackers="wandb")


def test_trackers_that_are_there_are_taken(only_tensorboard, monkeypatch):
    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory = "mine", False

        def __init__(self):
            pass

        @property
        def tracker(self):
            return None

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    check_trackers(("tensorboard", "all", "mine", Mine()))
    check_trackers(())
