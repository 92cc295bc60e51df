"""Few labels: every method, resuming after a stop, the images that are used, and the arithmetic of the differences."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Semaphore

import numpy as np
import pytest
import torch
from datasets import load_dataset

from scripts import NETWORKS
from scripts.experiments.label_efficiency import __main__ as script
from scripts.experiments.label_efficiency import training
from scripts.experiments.label_efficiency.efficientnet_unet import EfficientNetUNet
from scripts.experiments.label_efficiency.experiment import SetFacts, set_facts
from scripts.experiments.label_efficiency.networks import monai_features, parameters, untrained_peer
from scripts.experiments.label_efficiency.summary import add_row, paired_difference, read_rows, row_of
from scripts.experiments.label_efficiency.training import (
    TimedTrainer,
    pretrain,
    pretraining_run,
    steps_of,
    train_and_test,
)
from scripts.experiments.pace import WARM
from scripts.experiments.timed_trainer import SECONDS
from tests.support.blobs import blobs
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.sets import load_images
from unet_diffusion.evaluation.feature_networks import EfficientNetLite0
from unet_diffusion.files import INDEX, write_json
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.self_training import IMAGE, START

TINY = {"channels": [8, 16, 24], "head_channels": 8}


def make_set(folder, train: int = 5) -> None:
    folder.mkdir()
    for name, count in (("train", train), ("validation", 2), ("test", 3)):
        blobs(folder, name, count)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    make_set(folder / "squares")
    return folder


@pytest.fixture
def options(data, tmp_path):
    network = tmp_path / "network.json"
    network.write_text(json.dumps(TINY))
    return script.LabelEfficiency(
        data,
        tmp_path / "out",
        sets=("squares",),
        methods=("scratch",),
        labels=(2,),
        seeds=(0,),
        crop_size=16,
        steps=2,
        batch_size=2,
        network=network,
        pretraining_steps=2,
        pretraining_batch_size=2,
    )


def rows_of(options) -> list[dict]:
    return json.loads(options.results.read_text())


@pytest.mark.slow
def test_every_method_gives_a_row_and_a_second_call_trains_nothing(options, monkeypatch):
    methods = script.LabelEfficiency.__dataclass_fields__["methods"].default
    options = replace(options, methods=methods, crop_size=32)
    text = script.label_efficiency(options)
    rows = rows_of(options)
    assert [row["method"] for row in rows] == list(options.methods)
    for row in rows:
        assert 0 <= row["mean_iou"] <= 1 and 0 <= row["validation_mean_iou"] <= 1
        assert len(row["images"]) == 3 and all(0 <= each <= 1 for each in row["images"])
        assert row["seconds"] > 0 and (row["pretraining_seconds"] > 0) == ("pretraining" in row["config"])
        assert text.count(f"| {row['method']} | ") == (2 if row["method"] == "scratch" else 3)
    assert len({row["pretraining_seconds"] for row in rows}) == 2  # none, and that of the one noise predictor
    counts = {row["method"]: row["parameters"] for row in rows}
    assert counts["monai"] == pytest.approx(counts["scratch"], rel=0.05)
    assert (options.output / "label_efficiency.png").stat().st_size > 0
    monkeypatch.setattr(script, "train_and_test", None)
    assert script.label_efficiency(options) == text
    assert (options.output / "label_efficiency.md").read_text() == text


@pytest.mark.slow
def test_only_added_runs_are_trained(options, monkeypatch):
    trained, train = [], script.train_and_test

    def recorded(options, run):
        trained.append((run.labels, run.seed, run.config["training"]["learning_rate"]))
        return train(options, run)

    monkeypatch.setattr(script, "train_and_test", recorded)
    script.label_efficiency(options)
    script.label_efficiency(replace(options, seeds=(0, 1)))
    assert trained == [(2, 0, 1e-3), (2, 1, 1e-3)]
    text = script.label_efficiency(replace(options, learning_rate=1e-2))
    assert trained[2:] == [(2, 0, 1e-2)]
    assert len(rows_of(options)) == 3
    assert f"| scratch | {rows_of(options)[2]['mean_iou']:.3f} |" in text  # the runs of these options alone
    assert len(list(options.output.rglob("unet/*.safetensors"))) == 3  # the weights, but no state of the optimizer
    assert not list(options.output.rglob("checkpoints"))


def test_a_run_reads_what_its_method_uses(options):
    facts = SetFacts(images=5, channels=3, num_classes=2)

    def changed(method: str, **values) -> bool:
        return replace(options, **values).config("squares", method, facts) != options.config("squares", method, facts)

    fine_tuned = ("pretrained", "pretrained_self_training", "joint")
    for method in ("scratch", "self_training", *fine_tuned, "pixel_classifier", "imagenet"):
        assert changed(method, steps=3) and changed(method, crop_size=8) and changed(method, inverted_sets=("squares",))
        assert changed(method, pretraining_steps=3) == (method in (*fine_tuned, "pixel_classifier"))
        assert changed(method, pretraining_batch_size=3) == (method in (*fine_tuned, "pixel_classifier"))
        assert changed(method, trunk_rate=0.5) == changed(method, timestep=9.0) == (method in fine_tuned)
        assert changed(method, denoising_weight=0.5) == (method == "joint")
        assert changed(method, confidence=0.5) == changed(method, self_training_weight=2.0)
        assert changed(method, confidence=0.5) == (method in ("self_training", "pretrained_self_training"))
    assert options.augmentation_of("squares").invert == 0
    assert replace(options, inverted_sets=("squares",)).augmentation_of("squares").invert == 0.5


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_seconds_add_up(options, monkeypatch):
    options = replace(options, steps=3, validate_every=1)
    (run,) = options.runs()
    whole = script.train_and_test(replace(options, output=options.output / "whole", results=None), run)
    step = TimedTrainer._train_step

    def dies(self, batches):
        if self.step == 2:
            raise KeyboardInterrupt
        step(self, batches)
        self.cpu_seconds += 100

    monkeypatch.setattr(TimedTrainer, "_train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        script.label_efficiency(options)
    monkeypatch.setattr(TimedTrainer, "_train_step", step)
    script.label_efficiency(options)
    (row,) = rows_of(options)
    assert 200 < row.pop("seconds") < 300
    assert row == {name: value for name, value in whole.items() if name != "seconds"}


def test_the_labelled_images_are_the_first_rows_and_know_all_classes(options, data):
    (run,) = options.runs()
    script.train_and_test(options, run)
    saved = json.loads((options.output / run.folder / "config.json").read_text())["data"]
    assert saved["max_labels"] == 2 and saved["num_classes"] == 2
    chosen = load_masked(replace(options.masked("squares", 2, 2), crop_size=None)).train
    rows = load_dataset("parquet", data_files=str(data / "squares" / "train.parquet"), split="train")
    assert len(chosen) == 2 and len(rows) == 5
    for index in range(2):
        assert np.array_equal(chosen[0, index]["image"].permute(1, 2, 0), rows[index]["image"])
        assert np.array_equal(chosen[0, index]["mask"], rows[index]["mask"])


def test_another_draw_labels_other_images_and_knows_the_same_classes(options, data):
    options = replace(options, draws=(0, 3))
    first, other = options.runs()
    assert first.folder != other.folder and first.config == other.config
    row = script.train_and_test(options, other)
    assert row["draw"] == 3
    rows = load_dataset("parquet", data_files=str(data / "squares" / "train.parquet"), split="train")
    order = np.random.default_rng(3).permutation(5)
    assert set(order[:2]) != {0, 1}
    chosen = load_masked(replace(options.masked("squares", 2, 2, draw=3), crop_size=None)).train
    images = [np.asarray(chosen[0, index]["image"].permute(1, 2, 0)) for index in range(2)]
    for index, image in zip(order, images):
        assert np.array_equal(image, rows[int(index)]["image"])
    saved = json.loads((options.output / other.folder / "config.json").read_text())["data"]
    assert saved["data"] == str(options.drawn("squares", 3))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_nothing_is_taken_over_from_other_files_under_the_same_path(options, tmp_path, part):
    (tmp_path / "sets").mkdir()
    make_set(tmp_path / "sets" / "squares")
    options = replace(options, data=tmp_path / "sets", methods=("pretrained",), draws=(3,))
    (before,) = options.runs()
    predictor, drawn = pretraining_run(options, "squares").output, options.drawn("squares", 3)
    blobs(options.data / "squares", part, 6)
    (after,) = options.runs()
    assert after.folder != before.folder
    assert (pretraining_run(options, "squares").output != predictor) == (part == "train")
    assert (options.drawn("squares", 3) != drawn) == (part == "train")
    chosen = load_masked(options.masked("squares", None, 2, draw=3)).train
    assert len(chosen) == (6 if part == "train" else 5)


def test_rows_from_before_files_were_named_are_those_of_their_runs(options):
    (run,) = options.runs()
    assert run.config["files"] != "0"
    former = {**vars(run), "config": {key: value for key, value in run.config.items() if key != "files"}}
    assert row_of([former], run) is former
    assert row_of([{**vars(run), "config": run.config | {"files": "0"}}], run) is None
    assert row_of([{**former, "config": former["config"] | {"crop_size": 9}}], run) is None


@pytest.mark.slow
def test_a_run_has_the_steps_that_fit_into_its_minutes_less_those_of_the_noise_predictor(options, monkeypatch):
    monkeypatch.setattr(training, "PACED", 12)
    monkeypatch.setattr(TimedTrainer, "durations", lambda trainer, steps: [1.0] * steps)
    monkeypatch.setattr(training, "pretrain", lambda options, name: (str(options.network), 42.0))
    options = replace(options, minutes=1.0, methods=("scratch", "pretrained"), steps=9, optimizer="muon")
    script.label_efficiency(options)
    scratch, pretrained = rows_of(options)
    assert (scratch["steps"], pretrained["steps"]) == (60, 18)
    assert 0 < scratch["best_step"] <= 60 and scratch["best_step"] % 3 == 0
    for row in (scratch, pretrained):
        assert row["config"]["minutes"] == 1 and "steps" not in row["config"]["training"]
        assert row["config"]["training"]["optimizer"] == "muon"


@pytest.mark.slow
def test_a_noise_predictor_takes_its_share_of_the_minutes(options, monkeypatch):
    monkeypatch.setattr(TimedTrainer, "durations", lambda trainer, steps: [2.0] * steps)
    options = replace(options, minutes=1.0, pretraining_share=0.3)
    folder, seconds = pretrain(options, "squares")
    assert json.loads((Path(folder) / "config.json").read_text())["training"]["steps"] == 9  # 18 seconds of 2
    assert pretrain(options, "squares") == (folder, seconds)


def test_a_noise_predictor_that_another_process_trains_is_waited_for(options, monkeypatch):
    folder, started, go_on = pretraining_run(options, "squares").output, Semaphore(0), Event()

    def trains(trainer):
        started.release()
        go_on.wait(20)
        write_json(folder / SECONDS, {"2": 5.0})
        write_json(folder / INDEX, {})

    monkeypatch.setattr(TimedTrainer, "run", trains)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pretrain, options, "squares")
        assert started.acquire(timeout=60)
        second = pool.submit(pretrain, options, "squares")
        assert not started.acquire(timeout=2)
        go_on.set()
        assert first.result() == second.result() == (str(folder), 5.0)
    assert not started.acquire(blocking=False)


def test_a_noise_predictor_that_leaves_no_time_is_refused(options):
    options = replace(options, methods=("pretrained",), minutes=2.0, pretraining_share=0.9)
    (run,) = options.runs()
    message = "minutes is 2, .* noise predictor took 130 CPU seconds; give more minutes, or a smaller pretraining_share"
    with pytest.raises(ValueError, match=message):
        steps_of(2.0, run, None, None, 130.0)


def test_the_pace_of_self_training_counts_its_first_steps_alike(options, monkeypatch):
    """Steps with and without images that have no mask are measured in the proportion of the run."""
    options = replace(options, methods=("self_training",), minutes=1.0)
    (run,) = options.runs()
    facts = set_facts(options.masked("squares"))
    masked = options.masked("squares", 2, facts.num_classes)
    config = TrainSegmentation(
        masked,
        options.output / "run",
        str(options.network),
        joint=options.joint(run.method),
        training=options.training(0),
    )
    seen = []

    def durations(trainer, steps):
        batches = trainer.task.batches(trainer.context, 0)
        seen.extend([IMAGE in next(batches) for _ in range(steps)])
        return [1.0] * steps

    monkeypatch.setattr(TimedTrainer, "durations", durations)
    assert steps_of(1.0, run, config, facts, 20.0) == 40
    counted = seen[WARM:]
    assert counted.count(False) / len(counted) == START


def test_patience_ends_a_run(options):
    options = replace(options, steps=40, validate_every=1, patience=1, learning_rate=1e-9)  # nothing becomes better
    (run,) = options.runs()
    row = script.train_and_test(options, run)
    assert row["steps"] < 40 and row["config"]["patience"] == 1


@pytest.mark.slow
def test_all_labels_are_those_of_the_set_and_larger_numbers_are_left_out(options):
    assert [run.labels for run in replace(options, labels=("all", 3, 6, 5)).runs()] == [3, 5]
    runs = replace(options, labels=(3, "all"), draws=(2, 1)).runs()
    assert [(run.draw, run.labels) for run in runs] == [(2, 3), (2, 5), (1, 3)]  # all are the same in every draw
    with pytest.raises(ValueError, match=r"labels is \(6, 7\), but squares has 5 training images; give smaller"):
        replace(options, labels=(6, 7)).runs()


@pytest.mark.slow
def test_the_noise_predictor_learns_from_all_training_images_and_no_others(options, tmp_path):
    sets = load_images(pretraining_run(options, "squares").data)
    assert len(sets.train) == 5 and sets.validation is None
    weights = []
    for name, train, others in (("a", 5, 2), ("b", 5, 4), ("c", 6, 2)):
        make_set(tmp_path / name, train)
        for part in ("validation", "test"):
            blobs(tmp_path / name, part, others)
        folder, seconds = pretrain(replace(options, data=tmp_path, sets=(name,), output=tmp_path / "out"), name)
        assert seconds > 0
        weights.append(load_unet(folder, {}).state_dict()["stem.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_pretrained_runs_start_from_the_noise_predictor(options):
    options = replace(options, methods=("pretrained",), learn="head", timestep=7.0)
    (run,) = options.runs()
    train_and_test(options, run)
    folder, _ = pretrain(options, "squares")  # which is there
    before, after = load_unet(folder, {}), load_unet(str(options.output / run.folder), {})
    assert after.config.segmentation_timestep == 7
    for name, weights in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weights, rtol=0, atol=0)


@pytest.mark.parametrize("network", ["quarter-width.json", "half-width.json", "segmentation-2m.json", "fruits64.json"])
def test_the_peer_has_as_many_parameters_within_5_percent(network):
    path = NETWORKS / network
    ours = load_unet(str(path), {"in_channels": 3, "out_channels": None, "num_classes": 3})
    theirs = untrained_peer("monai", 3, 3, monai_features(path, 3, 3))
    assert parameters(theirs) == pytest.approx(parameters(ours), rel=0.05)


def test_a_network_too_small_for_an_equal_peer_is_refused(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps({"channels": [2, 2], "head_channels": 2, "block": "plain"}))
    with pytest.raises(ValueError, match="but the nearest MONAI network .* more than 5% off; give a larger network"):
        monai_features(tmp_path / "small.json", 3, 2)


@pytest.fixture(scope="module")
def imagenet():
    torch.manual_seed(0)
    return EfficientNetUNet(3, 4)


def test_the_encoder_is_that_of_imagenet(imagenet):
    known = EfficientNetLite0().eval()
    kept = imagenet.encoder.state_dict()
    assert all(torch.equal(known.network.state_dict()[name], weights) for name, weights in kept.items())
    deepest = []
    known.network._blocks[-1].register_forward_hook(lambda module, inputs, output: deepest.append(output))
    levels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        known(levels)
        maps = imagenet.eval().maps(levels / 127.5 - 1)
    torch.testing.assert_close(maps[-1], deepest[0], rtol=1e-3, atol=1e-4)
    assert [each.shape[2] for each in maps] == [224, 112, 56, 28, 14, 7]


def test_gradients_reach_every_weight_and_the_statistics_stay(imagenet):
    before = {name: buffer.clone() for name, buffer in imagenet.named_buffers()}
    imagenet.train().logits(torch.rand(2, 3, 32, 32) * 2 - 1).square().mean().backward()
    assert all(weights.grad is not None and weights.grad.abs().sum() > 0 for weights in imagenet.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in imagenet.named_buffers())
    imagenet.zero_grad()


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_images_of_every_size_get_scores_of_their_size(imagenet, size):
    assert imagenet.eval()(torch.zeros(1, 3, *size)).logits.shape == (1, 4, *size)


def test_learnt_weights_are_loaded_and_not_those_of_imagenet(imagenet, tmp_path):
    weights = imagenet.encoder._conv_stem.weight
    before = weights.detach().clone()
    with torch.no_grad():
        weights += 1
    imagenet.save_pretrained(tmp_path)
    loaded = type(imagenet).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    torch.testing.assert_close(loaded.state_dict(), imagenet.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        weights.copy_(before)


def test_grey_images_are_seen_as_grey_colours(imagenet):
    grey = type(imagenet)(1, 4)
    grey.load_state_dict(imagenet.state_dict())
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        same = grey.eval().logits(image), imagenet.eval().logits(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(*same)
    with pytest.raises(ValueError, match="in_channels is 4, but must be 1 or 3; convert the images"):
        type(imagenet)(4, 2)
    with pytest.raises(ValueError, match=r"widths is \(8, 12\), but must be 5 multiples of 8"):
        type(imagenet)(3, 2, (8, 12))


def row(seed: int, *images: float | None) -> dict:
    return {"seed": seed, "images": list(images)}


def test_the_paired_difference_and_its_interval_with_one_seed():
    # differences 0.1, 0.1, 0.4: mean 0.2, standard error 0.1; Student's 97.5% point with 2 degrees is 4.3027
    found = paired_difference([row(0, 0.5, 0.6, 0.9, None)], [row(0, 0.4, 0.5, 0.5, 0.1)])
    assert found == pytest.approx((0.2, 0.43027), abs=1e-5)


def test_the_paired_difference_and_its_interval_with_two_seeds():
    # d = [[0.1, 0.3], [0.3, 0.5]]: both pairs of means are 0.2 and 0.4, so each adds 0.02 / 2 to the variance, with one
    # degree of freedom each, so two in all; a seed that only one of the two has is left out
    ours = [row(0, 0.1, 0.3), row(1, 0.4, 0.6), row(5, 0, 0)]
    base = [row(1, 0.1, 0.1), row(0, 0, 0), row(7, 1, 1)]
    assert paired_difference(ours, base) == pytest.approx((0.3, 4.302653 * 0.02**0.5), abs=1e-5)


def test_draws_of_the_labelled_images_count_once_each_however_many_seeds_they_have():
    # draw 0: means over the seeds d = [0.1, 0.3]; draw 1: [0.3, 0.5]; so the interval is that of two seeds above
    ours = [row(0, 0.0, 0.3), row(1, 0.2, 0.3), row(0, 0.3, 0.5) | {"draw": 1}]
    base = [row(0, 0, 0), row(1, 0, 0), row(0, 0, 0) | {"draw": 1}, row(1, 0, 0) | {"draw": 1}]
    assert paired_difference(ours, base) == pytest.approx((0.3, 4.302653 * 0.02**0.5), abs=1e-5)


def test_a_difference_that_is_not_known_is_nan_and_an_exact_one_has_no_interval():
    assert paired_difference([row(0, 0.5)], [row(1, 0.5)]) == pytest.approx((float("nan"),) * 2, nan_ok=True)
    assert paired_difference([row(0, 0.5)], [row(0, 0.25)]) == pytest.approx((0.25, float("nan")), nan_ok=True)
    assert paired_difference([row(0, 0.5, 0.75)], [row(0, 0.25, 0.5)]) == (0.25, 0)


def full(method: str, labels: int, seed: int, mean_iou: float) -> dict:
    costs = {"seconds": 2.0, "pretraining_seconds": 0.0, "parameters": 1234}
    keys = {"data": "squares", "method": method, "labels": labels, "mean_iou": mean_iou}
    return keys | costs | row(seed, mean_iou, mean_iou)


def test_few_labels_are_compared_with_many_from_scratch():
    rows = [full("scratch", 10, 0, 0.5), full("scratch", 40, 0, 0.75), full("pretrained", 10, 0, 0.875)]
    text = script.summary(rows)
    assert "Difference of each method with 10 labels from scratch with 40:" in text
    assert "| scratch | -0.250 +- 0.000 |" in text and "| pretrained | +0.125 +- 0.000 |" in text
    assert "with 10 labels" not in script.summary(rows[::2])


def test_a_run_has_one_row_however_often_it_is_added(tmp_path):
    path, row = tmp_path / "rows.json", {**full("scratch", 1, 0, 0.5), "data": "squares", "config": {"steps": 9}}
    for each in (row, {**row, "mean_iou": 0.6}, {**row, "draw": 1}, {**row, "draw": 0}):
        add_row(path, each)
    assert read_rows(path) == [row, {**row, "draw": 1}]  # earlier rows do not name their draw, which is 0
    assert len(path.read_text().splitlines()) == 4


def test_the_table_shows_mean_and_range_over_seeds():
    rows = [full("scratch", 1, 0, 0.5), full("scratch", 1, 1, 0.75), full("scratch", 9, 0, 0.8)]
    text = script.summary([rows[2], full("monai", 9, 0, 0.7)])
    assert "| scratch | 0.800 |" in text
    text = script.summary([*rows, full("monai", 9, 0, 0.7)])
    assert "| method | 1 label | 9 labels |" in text
    assert "| scratch | 0.625 (0.500 to 0.750) | 0.800 (1 of 2 runs) |" in text
    assert "| monai |  | 0.700 (1 of 2 runs) |" in text
    three = script.summary([*rows, full("scratch", 9, 2, 0.9)])
    assert "| scratch | 0.625 (0.500 to 0.750, 2 of 3 runs) | 0.850 (0.800 to 0.900, 2 of 3 runs) |" in three
    assert "| monai |  | -0.100 +- 0.000 |" in text and "| monai | 1,234 | 2 |  |" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sets": ()}, r"sets is \(\), but must name one or more"),
        ({"sets": ("circles",)}, "sets names 'circles', but there is no .*train.parquet; give data or other sets"),
        ({"methods": ("magic",)}, "methods is 'magic', but must be one of 'scratch', 'self_training'"),
        ({"labels": (2, 2)}, r"labels is \(2, 2\), but must name one or more, each once"),
        ({"labels": (0,)}, "labels is 0, but each must be a number of at least 1, or 'all'"),
        ({"labels": ("some",)}, "labels is 'some', but each must be"),
        ({"seeds": (-1,)}, "seeds is -1, but each must be at least 0"),
        ({"draws": (-1,)}, "draws is -1, but each must be at least 0"),
        ({"minutes": 0.0}, "minutes is 0.0, but must be above 0"),
        ({"pretraining_share": 1.0}, "pretraining_share is 1.0, but must be above 0 and below 1"),
        ({"patience": 0}, "patience is 0, but must be an integer of at least 1"),
        ({"crop_size": 0}, "crop_size is 0, but must be at least 1"),
        ({"methods": ("monai",)}, "crop_size is 16, but MONAI's network needs at least 32"),
        ({"pretraining_steps": 0}, "pretraining_steps is 0, but must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but must be a number above 0"),
        ({"timestep": 1000.0}, "timestep is 1000.0, but must be from 0 to below 1000"),
        ({"trunk_rate": 0.0}, "trunk_rate is 0.0, but must be above 0"),
        ({"denoising_weight": 0.0}, "denoising_weight is 0.0, but must be above 0; for masks alone"),
        ({"self_training_weight": 0.0}, "self_training_weight is 0.0, but must be above 0; for masks alone"),
        ({"confidence": 1.0}, "confidence is 1.0, but must be a probability"),
        ({"learn": "head", "methods": ("joint",)}, "learn is 'head', but joint training moves the trunk"),
    ],
)
def test_wrong_options_are_refused(options, values, message):
    with pytest.raises(ValueError, match=message):
        replace(options, **values)


def test_invalid_networks_and_results_files_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="network is .*nowhere.json, but must be a JSON file"):
        replace(options, network=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="results is .*network.json, but it does not hold a list of runs"):
        script.label_efficiency(replace(options, results=tmp_path / "network.json"))
