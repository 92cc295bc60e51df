from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from unet_diffusion import UNet
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.tasks.config import SegmentationConfig
from unet_diffusion.tasks.segmentation import LEARN, SegmentationTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series
from unet_diffusion.training.trainer import Trainer

NETWORK = {"in_channels": 1, "channels": (8, 16), "head_channels": 8, "num_classes": 2}


class Halves(torch.utils.data.Dataset):
    """Images of noise, brighter where the mask is 1: everywhere right of a column."""

    channels, weights = 1, None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def class_counts(self) -> torch.Tensor:
        return torch.tensor([1, 1])

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        mask = (torch.arange(8) > 1 + index % 5).long().expand(8, 8)
        noise = torch.randint(0, 60, (1, 8, 8), generator=torch.Generator().manual_seed(index))
        return {"image": (noise + 150 * mask).to(torch.uint8), "mask": mask.clone()}


def halves() -> SimpleNamespace:
    return SimpleNamespace(
        train=Halves(8),
        validation=Halves(3),
        num_classes=2,
        class_names=None,
        palette=None,
        pixel_range=PixelRange.full("uint8"),
    )


def network(**changes) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**NETWORK, **changes})


def train(tmp_path, config: SegmentationConfig, steps: int = 2, network_=None, **options) -> SegmentationTask:
    training = TrainingConfig(
        steps=steps, batch_size=4, warmup_steps=0, schedule="constant", validate_every=1, trackers=(), **options
    )
    task = SegmentationTask(network_ or network(), halves(), config)
    resolved = {"data": {"data": "halves"}, "training": vars(training)}
    Trainer(task, training, tmp_path, resolved, make_accelerator(training, tmp_path)).run()
    return task


def part_of(name: str) -> str:
    return "head" if name.startswith(LEARN["head"]) else "decoder" if name.startswith(LEARN["decoder"]) else "rest"


@pytest.mark.parametrize(
    ("learn", "moving"),
    [("everything", {"head", "decoder", "rest"}), ("decoder", {"head", "decoder"}), ("head", {"head"})],
)
def test_only_the_part_that_learns_moves_and_the_noise_head_never_does(tmp_path, learn, moving):
    before = {name: value.clone() for name, value in network().named_parameters()}
    task = train(tmp_path, SegmentationConfig(learn=learn), steps=3)  # a branch that starts at zero opens after a step
    moved = {n for n, value in task.network.named_parameters() if not torch.equal(value, before[n])}
    assert {part_of(name) for name in moved} == moving
    assert not any(name.startswith("noise_head.") for name in moved)
    learning = {name for name, parameter in task.network.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in learning} == moving


def test_the_first_step_of_adam_moves_the_trunk_by_its_share_of_the_learning_rate(tmp_path):
    # Adam's first step is the learning rate times the gradient's sign, so the furthest a weight goes is the rate.
    before = {name: value.clone() for name, value in network().named_parameters()}
    task = train(tmp_path, SegmentationConfig(trunk_rate=0.1), steps=1, learning_rate=1e-2)
    furthest = {"head": 0.0, "trunk": 0.0}
    for name, value in task.network.named_parameters():
        part = "head" if part_of(name) == "head" else "trunk"
        furthest[part] = max(furthest[part], (value - before[name]).abs().max().item())
    assert furthest["head"] == pytest.approx(1e-2, rel=1e-3)
    assert furthest["trunk"] == pytest.approx(1e-3, rel=1e-3)


def test_a_frozen_trunk_drops_nothing_and_gathers_no_statistics(tmp_path):
    start = network(block="plain", norm="batch", dropout=0.5)
    statistics = {name: value.clone() for name, value in start.named_buffers() if "running" in name}
    task = train(tmp_path, SegmentationConfig(learn="head"), network_=start)
    assert statistics and all(torch.equal(dict(start.named_buffers())[name], statistics[name]) for name in statistics)
    batch = {"image": Halves(1)[0]["image"][None], "mask": Halves(1)[0]["mask"][None]}
    task.network.train()
    losses = {task.loss(task.network, batch, []).item() for _ in range(3)}
    assert len(losses) == 1


def test_the_weights_of_the_best_validation_are_exported(tmp_path):
    # at this high rate the network learns, then diverges; whatever it does, the best of all validations is exported
    task = train(tmp_path, SegmentationConfig(), steps=12, learning_rate=0.2, ema_decay=0.0)
    scores = series(read_metrics(tmp_path / "metrics.jsonl"), "mean_iou")[1]
    assert scores[-1] < max(scores)
    pipe = SegmentationPipeline.from_pretrained(tmp_path)
    assert task.validate(pipe.unet, make_accelerator(TrainingConfig(), tmp_path))["mean_iou"] == max(scores)


def test_a_run_out_of_patience_says_so_and_goes_on_with_more_of_it(tmp_path, caplog):
    nothing_learns = {"learning_rate": 1e-12, "checkpoint_every": 100}
    config = SegmentationConfig(patience=3)
    train(tmp_path, config, steps=50, **nothing_learns)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == 4  # the first validation sets the score, three do not raise it
    train(tmp_path, config, steps=60, **nothing_learns)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    ended = "the run ended at step 4 of {}, since 3 validations in a row were not better than that of step 1; with a "
    assert [each[: len(ended)] for each in caplog.messages] == [ended.format(steps) for steps in (50, 60)]
    train(tmp_path, SegmentationConfig(patience=5), steps=60, **nothing_learns)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 6


def test_the_timestep_is_saved_with_the_network(tmp_path):
    train(tmp_path, SegmentationConfig(timestep=50))
    assert SegmentationPipeline.from_pretrained(tmp_path).unet.config.segmentation_timestep == 50


def test_a_timestep_is_one_of_the_noise_predictor():
    scheduler = DDPMScheduler(num_train_timesteps=100)
    SegmentationTask(network(), halves(), SegmentationConfig(timestep=99), scheduler=scheduler)
    with pytest.raises(ValueError, match="timestep is 100, but must be from 0 to 99"):
        SegmentationTask(network(), halves(), SegmentationConfig(timestep=100), scheduler=scheduler)


def test_a_timestep_needs_a_network_with_a_timestep_embedding():
    with pytest.raises(ValueError, match="time_embedding is None"):
        SegmentationTask(network(time_embedding=None, out_channels=None), halves(), SegmentationConfig(timestep=5))


@pytest.mark.parametrize(
    "values",
    [
        {"loss": "focal"},
        {"learn": "encoder"},
        {"trunk_rate": 0.0},
        {"trunk_rate": 1.5},
        {"learn": "head", "trunk_rate": 0.5},
        {"patience": 0},
        {"preview_images": 0},
    ],
)
def test_values_without_a_meaning_are_refused(values):
    with pytest.raises(ValueError, match=f"{list(values)[-1]} is"):
        replace(SegmentationConfig(), **values)


def test_freezing_returns_the_modules_in_which_nothing_learns():
    start = network()
    frozen = SegmentationTask(start, halves(), SegmentationConfig(learn="decoder")).frozen
    assert all(module in frozen for module in (start.stem, start.time_embed, start.encoder, start.bridge))
    assert start.decoder not in frozen and start not in frozen


def test_a_network_that_needs_a_class_is_refused_before_training():
    """Images to segment have no class; a network that also learnt images without one is welcome."""
    needs = {"num_class_embeds": 3, "out_channels": 1}
    with pytest.raises(ValueError, match=r"a class for every image \(label_dropout is 0\), and images to segment"):
        SegmentationTask(network(**needs), halves(), SegmentationConfig())
    SegmentationTask(network(**needs, label_dropout=0.1), halves(), SegmentationConfig())
