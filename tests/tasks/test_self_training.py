"""Self-training: the loss, when it starts, resuming after a stop, and errors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import power_cut, squares
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_segmentation import make_task, settled_joint, train_segmentation
from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.tasks import self_training
from unet_diffusion.tasks.config import JointConfig, SegmentationConfig
from unet_diffusion.tasks.joint import JointTask
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.tasks.self_training import IMAGE, SelfTrainingTask, aligned, class_shares
from unet_diffusion.training.accelerator import RunContext, make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("self-training")
    squares(folder)
    (folder / "network.json").write_text(json.dumps({"channels": [8, 16], "head_channels": 8}))
    return folder


@pytest.fixture
def options(place, tmp_path) -> TrainSegmentation:
    images, masks = (str(place / name) for name in ("images", "masks"))
    return TrainSegmentation(
        data=MaskedDataConfig(data=images, masks=masks, channels=3, validation_fraction=0.25, max_labels=8),
        output=tmp_path / "run",
        model=str(place / "network.json"),
        segmentation=SegmentationConfig(preview_images=2),
        joint=JointConfig(self_training_weight=0.5, confidence=0.87),
        augmentation=AugmentationConfig(elastic=1.0),
        training=TrainingConfig(
            steps=16, batch_size=4, warmup_steps=1, log_every=2, validate_every=4, checkpoint_every=2, trackers=()
        ),
    )


def task_of(options: TrainSegmentation) -> SelfTrainingTask:
    task = make_task(options, load_masked(options.data, options.training.seed))
    assert isinstance(task, SelfTrainingTask)
    return task


def context(options: TrainSegmentation) -> RunContext:
    return RunContext(options.training, make_accelerator(options.training, options.output))


def batch_at(options: TrainSegmentation, task, step: int) -> dict[str, torch.Tensor]:
    return next(task.batches(context(options), step))


def generators() -> list[torch.Generator]:
    return [keyed_generator(7, i) for i in range(4)]


def undecided(task: SelfTrainingTask) -> None:
    """Weights with which some pixels are sure and some are not."""
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(task.network.segmentation_head.weight, std=0.3, generator=generator)


def test_the_loss_is_the_sum_computed_by_hand(options):
    task = task_of(options)
    undecided(task)
    batch, random = batch_at(options, task, step=7), generators()
    task.state = {"probabilities": 0.5 * torch.tensor([0.3, 0.7]), "weight": torch.tensor(0.5)}
    losses = task.loss(task.network, batch, generators())

    images, masks, *_ = augment(batch["image"] / 127.5 - 1, batch["mask"], options.augmentation, random)
    logits = task.network(images).logits
    valid = masks != IGNORE_INDEX
    each = F.cross_entropy(logits, masks, ignore_index=IGNORE_INDEX, reduction="none").sum((1, 2))
    supervised = (each / valid.sum((1, 2))).mean()

    unlabelled = batch[IMAGE] / 127.5 - 1
    probability = task.network(unlabelled).logits.softmax(dim=1)[:, 1]
    counts = task.train.class_counts()  # squares are uncut here
    share = (counts[1] / counts.sum()).item()
    odds = probability / (1 - probability)
    odds = odds * share / (1 - share) / (0.7 / 0.3)  # aligned by the running mean
    own = (odds > 1).long()
    own[(odds < 0.87 / 0.13) & (odds > 0.13 / 0.87)] = IGNORE_INDEX
    assert 0.1 < (own != IGNORE_INDEX).float().mean() < 0.9
    varied, own_masks, *_ = augment(unlabelled, own, replace(options.augmentation, colour=0.5), random)
    rows = task.network(varied).logits.log_softmax(dim=1)
    picked = rows.gather(1, own_masks.clamp(max=1)[:, None])[:, 0]
    unsupervised = -(picked * (own_masks != IGNORE_INDEX)).sum() / own_masks.numel()

    found = [losses[name].item() for name in ("segmentation_loss", "self_training_loss", "loss")]
    expected = [supervised.item(), unsupervised.item(), (supervised + 0.5 * unsupervised).item()]
    assert found == pytest.approx(expected, rel=1e-5)
    assert losses["sure"].item() == pytest.approx((own != IGNORE_INDEX).float().mean().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflow_teaches_nothing_and_is_forgotten(options, monkeypatch, value):
    """Its probabilities are NaN, of which the largest would be that of class 0."""
    task = task_of(options)
    batch = batch_at(options, task, step=7)
    before = task.state = {"probabilities": torch.tensor([0.3, 0.7]), "weight": torch.ones(())}
    logits = task.class_logits
    monkeypatch.setattr(task, "class_logits", lambda *given: logits(*given) * (1 if torch.is_grad_enabled() else value))
    losses = task.loss(task.network, batch, generators())
    assert losses["sure"] == losses["self_training_loss"] == 0
    task.finish_step(torch.tensor(False), context(options).accelerator)
    assert all(torch.equal(task.state[name], before[name]) for name in before)


def test_without_sure_pixels_the_loss_is_that_of_the_masks_alone(options):
    gradients = []
    for joint in (JointConfig(self_training_weight=9.0, confidence=0.999999), JointConfig()):
        torch.manual_seed(0)
        task = make_task(replace(options, joint=joint), load_masked(options.data, options.training.seed))
        undecided(task)
        losses = task.loss(task.network, batch_at(options, task, step=7), generators())
        if isinstance(losses, dict):
            assert losses["sure"] == losses["self_training_loss"] == 0
            losses = losses["loss"]
        losses.backward()
        gradients.append([parameter.grad for parameter in task.network.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_shares_are_those_of_masks_as_they_are_cut(options):
    options.data = replace(options.data, crop_size=6)  # so that the middle of the 16 pixels is seen more often
    train = load_masked(options.data, options.training.seed).train
    shares = class_shares(train)
    expected = torch.stack([(train[epoch, i]["mask"] == 1).float().mean() for epoch in range(200) for i in range(6)])
    assert shares.sum() == 1 and shares[1] == pytest.approx(expected.mean().item(), abs=0.05)
    whole = train.class_counts().float()
    assert shares[1] > 1.2 * (whole[1] / whole.sum())


def test_shares_come_from_images_all_over_the_set(options, tmp_path):
    """Of 600 images only the last 300 show the class."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(600):
        mask = np.zeros((8, 8), np.uint8)
        mask[:4] = index >= 300
        image = np.random.default_rng(index).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{index:03}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index:03}.png")
    data = MaskedDataConfig(
        data=str(tmp_path / "images"), masks=str(tmp_path / "masks"), validation_fraction=0, crop_size=8
    )
    assert class_shares(load_masked(data).train)[1] == pytest.approx(0.25, abs=0.01)


def test_a_class_that_no_counted_square_shows_keeps_its_share_in_whole_images(options, monkeypatch):
    options.data = replace(options.data, crop_size=2)
    train = load_masked(options.data, options.training.seed).train
    monkeypatch.setattr(self_training, "COUNTED", 1)  # so each image is cut once
    whole = train.class_counts().float() / train.class_counts().sum()

    def cut(key):
        return {"mask": torch.tensor([[shown, shown], [shown, IGNORE_INDEX]])}

    monkeypatch.setattr(type(train), "__getitem__", lambda self, key: cut(key))
    shown = 0
    assert torch.allclose(class_shares(train), torch.tensor([1.0, whole[1]]) / (1 + whole[1]))
    shown = IGNORE_INDEX
    assert torch.allclose(class_shares(train), whole)


def test_its_masks_come_from_the_whole_network(options, tmp_path):
    """A layer that drops everything in training would leave the head's bias alone."""
    (tmp_path / "network.json").write_text(
        json.dumps({"channels": [8, 16], "head_channels": 8, "norm": "batch", "dropout": 0.5})
    )
    task = task_of(replace(options, model=str(tmp_path / "network.json")))
    images = task.pixel_range.to_model(batch_at(options, task, step=7)[IMAGE])
    undecided(task)
    seen = []
    task.logits = lambda *arguments: seen.append(task.network.training) or SegmentationTask.logits(task, *arguments)
    task.network.train()
    task.own_loss(task.network, images, generators())
    assert seen == [False, True] and task.network.training
    expected = task.network.eval()(images).logits.softmax(dim=1).mean((2, 3)).sum(0)
    assert torch.allclose(task.seen[:-1], expected, atol=0.05)


def test_alignment_moves_the_means_and_keeps_the_sure():
    torch.manual_seed(0)
    probabilities = torch.randn(4, 3, 8, 8).mul(2).softmax(dim=1)
    means = probabilities.mean((0, 2, 3))
    found = aligned(probabilities, means, means)
    torch.testing.assert_close(found, probabilities)  # probabilities with the expected shares stay
    shares = torch.tensor([0.7, 0.2, 0.1])
    found = aligned(probabilities, shares, means)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4, 8, 8))
    before, after = ((each.mean((0, 2, 3)) - shares).abs().sum() for each in (probabilities, found))
    assert after < before / 2
    sure = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    means = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(aligned(sure, torch.tensor([0.2, 0.8]), means), sure)
    assert torch.equal(aligned(sure, torch.tensor([0.0, 1.0]), means), torch.zeros_like(sure))  # a class no mask has


def test_micro_batches_do_not_change_the_loss_or_the_running_mean(options):
    """Two halves of a batch have its loss, as a mean, and leave its running mean, also after a step before."""
    options.joint = replace(options.joint, confidence=0.6)
    task, accelerator = task_of(options), make_accelerator(options.training, options.output)
    undecided(task)
    task.network.eval()
    batch = batch_at(options, task, step=7)
    kept, lost = task.state, torch.tensor(False)
    for _ in range(2):
        losses, states = [], []
        for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
            task.state = kept
            each = [
                task.loss(task.network, {name: value[part] for name, value in batch.items()}, generators()[part])
                for part in parts
            ]
            losses.append(torch.stack([loss["self_training_loss"] for loss in each]).mean().item())
            task.finish_step(lost, accelerator)
            states.append(task.state)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name])
        kept = states[0]
    with torch.no_grad():
        expected = task.network(batch[IMAGE] / 127.5 - 1).logits.softmax(dim=1).mean((0, 2, 3))
    torch.testing.assert_close(task.mean_probabilities(), expected)  # of two equal steps
    task.loss(task.network, batch, generators())
    task.finish_step(torch.tensor(True), accelerator)
    assert all(torch.equal(task.state[name], states[1][name]) for name in kept)  # a lost step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_starts_after_a_tenth_of_the_steps(options, accumulate):
    options.training = replace(options.training, steps=25, accumulate=accumulate)
    task = task_of(options)
    batches = task.batches(context(options), 1)
    expected = [step >= 3 for step in range(1, 8) for _ in range(accumulate)]  # of 25 steps
    assert [IMAGE in next(batches) for _ in expected] == expected


def test_it_goes_on_in_a_run_that_is_resumed_with_more_steps(options):
    options.training = replace(options.training, steps=400)
    task = task_of(options)
    assert IMAGE not in batch_at(options, task, step=16)
    task.state = {**task.state, "weight": torch.tensor(0.1)}  # as in a checkpoint of 16 steps of 16
    assert IMAGE in batch_at(options, task, step=16)


def test_images_beyond_the_labels_are_used_and_held_out_ones_are_not(options):
    task = task_of(options)
    held_out = {task.validation[i]["image"].numpy().tobytes() for i in range(len(task.validation))}
    others = 12 - len(held_out)
    assert (len(task.train), len(task.images)) == (min(8, others), others)
    assert held_out.isdisjoint(task.images[i]["image"].numpy().tobytes() for i in range(others))
    assert "without masks" in task.describe(context(options), 7, [])


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_undisturbed_one(options, tmp_path):
    whole = train_segmentation(replace(options, output=tmp_path / "whole"))
    with power_cut(SelfTrainingTask, 6):
        train_segmentation(options)
    train_segmentation(options)
    for part in ("model", "task"):
        a, b = (load_file(run / f"checkpoints/step-00000016/{part}.safetensors") for run in (options.output, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert a["weight"] > 0
    logged = [series(read_metrics(run / "metrics.jsonl"), "self_training_loss") for run in (options.output, whole)]
    assert logged[0] == logged[1]
    assert [value > 0 for value in logged[0][1]] == [False] + 7 * [True]


def test_noise_prediction_and_self_training_add_up(options):
    options.joint = replace(options.joint, denoising_weight=0.3)
    task = make_task(options, load_masked(options.data, options.training.seed))
    assert isinstance(task, JointTask) and isinstance(task.segmentation, SelfTrainingTask)
    undecided(task.segmentation)
    losses = task.loss(task.network, batch_at(options, task, step=7), generators())
    parts = [losses[f"{name}_loss"].item() for name in ("segmentation", "self_training", "denoising")]
    assert min(parts) > 0
    assert losses["loss"].item() == pytest.approx(parts[0] + 0.5 * parts[1] + 0.3 * parts[2], rel=1e-5)


def test_without_a_weight_there_is_no_self_training(options):
    task = make_task(replace(options, joint=JointConfig()), load_masked(options.data, options.training.seed))
    assert type(task) is SegmentationTask


def test_options_and_networks_that_rule_out_self_training_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="augment is off, and self-training learns from the difference"):
        train_segmentation(replace(options, augment=False))
    valid = {"block": "plain", "norm": "none", "padding": "valid", "channels": [4, 8], "time_embedding": None}
    (tmp_path / "valid.json").write_text(json.dumps({**valid, "attention": [False, False]}))
    with pytest.raises(ValueError, match="the network has padding='valid'"):
        train_segmentation(replace(options, model=str(tmp_path / "valid.json")))
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"confidence is {wrong}, but must be a probability"):
            JointConfig(self_training_weight=1.0, confidence=wrong)
    with pytest.raises(ValueError, match="self_training_weight is -1.0, but must be a number of at least 0"):
        JointConfig(self_training_weight=-1.0)
    assert not options.output.exists()


def test_it_is_the_default_where_images_have_no_masks(options, tmp_path, capsys):
    """With weight 1 for up to ten masks and 10 / n for n."""
    few = replace(options, data=replace(options.data, max_labels=5), joint=JointConfig())
    everything = replace(few, data=replace(few.data, max_labels=None))
    named = replace(everything, joint=JointConfig(unlabelled=options.data.data))
    unpadded = tmp_path / "unpadded.json"
    unpadded.write_text(json.dumps({"channels": [8, 16], "padding": "valid"}))

    def weight(each: TrainSegmentation) -> float | None:
        return settled_joint(each, load_masked(each.data)).self_training_weight

    assert weight(few) == weight(named) == 1
    training = replace(options.training, validate_every=500)  # since nothing is held out
    assert weight(replace(named, data=replace(named.data, validation_fraction=0.0), training=training)) == 10 / 12
    assert weight(everything) == 0
    assert weight(replace(few, data=replace(few.data, max_labels=100))) == 0  # of 12
    assert weight(replace(few, segmentation=SegmentationConfig(learn="pixel_classifier"))) == 0
    assert weight(replace(few, augment=False, augmentation=AugmentationConfig())) == 0
    assert weight(replace(few, model=str(unpadded))) == weight(replace(few, model="ronneberger-2015")) == 0
    assert weight(replace(few, joint=JointConfig(self_training_weight=0.0))) == 0
    with pytest.raises(ValueError, match="so nothing learns from these images"):
        weight(replace(named, model=str(unpadded)))

    capsys.readouterr()
    run = train_segmentation(few)
    assert "also learns from its own masks of the images without masks, with a weight of 1;" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["joint"]["self_training_weight"] == 1
    assert series(read_metrics(run / "metrics.jsonl"), "self_training_loss")[1]
    assert weight(replace(few, model=str(run))) == 1
