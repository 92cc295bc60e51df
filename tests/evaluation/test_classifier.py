import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.tiny import power_cut
from unet_diffusion import UNet
from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.train_classifier import train_classifier
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.evaluation.classifier import CLASSIFIER_FOLDER, ImageClassifier
from unet_diffusion.evaluation.feature_networks import feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import frechet_distance, kernel_distance
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.tasks.classification import ClassificationTask, classification_loss
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics

HEIGHT, WIDTH = 7, 5
LEVELS = {"dark": (0, 60), "bright": (190, 250)}  # grey values


def images(folder: Path, count: int = 12, kind: str = "grey", flat: bool = False) -> Path:
    """Images of noise, `count` of each class in a folder of its name: dark and bright, or red and blue."""
    random = np.random.default_rng(0)
    for position, (name, (low, high)) in enumerate(LEVELS.items()):
        (folder / ("" if flat else name)).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = random.integers(low, high, (HEIGHT, WIDTH)).astype(np.uint8)
            if kind == "16 bit":
                pixels = pixels.astype(np.uint16) * 257
            if kind == "colour":
                pixels = random.integers(*LEVELS["dark"], (HEIGHT, WIDTH, 3)).astype(np.uint8)
                pixels[..., 2 * position] += 180
            Image.fromarray(pixels).save(folder / ("" if flat else name) / f"{name}-{index:02d}.png")
    return folder


def options(folder: Path, data: Path, **changes) -> TrainClassifier:
    training = TrainingConfig(
        steps=12,
        batch_size=8,
        learning_rate=2e-2,
        warmup_steps=1,
        ema_decay=0.5,
        log_every=3,
        validate_every=6,
        checkpoint_every=4,
        trackers=(),
    )
    source = DataConfig(data=str(data), validation_fraction=0.25, cache_dir=str(folder / "cache"))
    return replace(TrainClassifier(folder / "run", (8, 12), dropout=0.1, data=source, training=training), **changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainClassifier:
    folder = tmp_path_factory.mktemp("classifier")
    return options(folder, images(folder / "images"))


@pytest.fixture(scope="module")
def run(config) -> Path:
    return train_classifier(config)


def classifier(**changes) -> ImageClassifier:
    """A classifier whose last layer is not zero, as it is before training."""
    network = ImageClassifier(**{"in_channels": 1, "num_classes": 3, "widths": (4, 6), "dropout": 0.5, **changes})
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


# --- the network ---


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (9, 7), (16, 16)])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_images_of_any_size_have_features_that_feed_the_last_layer(size, channels):
    network, batch = classifier(in_channels=channels), torch.rand(2, channels, *size) * 2 - 1
    features = network.features(batch)
    assert features.shape == (2, 6) and features.isfinite().all()
    assert torch.equal(network(batch), network.head(features))


def test_an_image_is_judged_by_itself():
    network, batch = classifier(), torch.rand(4, 1, 9, 7) * 2 - 1
    torch.testing.assert_close(network.features(batch[1:2]), network.features(batch)[1:2])


def test_untrained_all_classes_are_equally_likely_so_the_loss_is_the_log_of_their_number():
    network = ImageClassifier(in_channels=1, num_classes=7, widths=(4,))
    loss = classification_loss(network(torch.rand(5, 1, 6, 6)), torch.tensor([0, 1, 6, 3, 2]))
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)


def test_every_parameter_learns():
    network = classifier()
    classification_loss(network(torch.rand(2, 1, 8, 8)), torch.tensor([0, 2])).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_the_loss_is_a_mean_over_images_however_they_are_spread_and_without_labels_zero():
    logits, labels = torch.randn(6, 3), torch.tensor([0, NO_LABEL, 2, 1, NO_LABEL, NO_LABEL])
    halves = [classification_loss(logits[part], labels[part]) for part in (slice(3), slice(3, 6))]
    whole = classification_loss(logits, labels)
    torch.testing.assert_close(sum(halves) / 2, whole)
    known = labels != NO_LABEL
    torch.testing.assert_close(classification_loss(logits[known], labels[known]) * 3 / 6, whole)
    assert classification_loss(logits[[1, 4]], labels[[1, 4]]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0"),
        ({"num_classes": 1}, "num_classes is 1, but must be at least 2"),
        ({"widths": ()}, r"widths is \(\)"),
        ({"widths": (8, 1)}, r"widths is \(8, 1\), but must be one or more integers of at least 2"),
        ({"widths": 8}, "widths is 8"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"class_names": ("a", "b")}, "class_names are 2, but num_classes is 3"),
        ({"accuracy": 1.5}, "accuracy is 1.5"),
    ],
)
def test_values_that_no_classifier_can_have_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        classifier(**wrong)


# --- training ---


@pytest.mark.parametrize("kind", ["colour", "16 bit"])
def test_classes_that_differ_are_learnt(kind, tmp_path):
    """They differ in colour at equal brightness, or, streamed, in brightness; guessing is right half the time."""
    config = options(tmp_path, images(tmp_path / "images", kind=kind))
    if kind == "16 bit":
        held_out = str(images(tmp_path / "held out", count=4, kind=kind))
        named = {"validation_data": held_out, "validation_fraction": 0}
        config.data = replace(config.data, streaming=True, image_size=5, **named)
    network = ImageClassifier.from_pretrained(train_classifier(config) / CLASSIFIER_FOLDER)
    assert network.config.accuracy == 1
    assert network.config.in_channels == (3 if kind == "colour" else 1)


def test_the_folder_holds_the_best_weights_which_say_their_data_classes_and_accuracy(config, run):
    for name in ("README.md", "curves.png", "hardest.png", "previews/step-00000012.png", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["widths"] == [8, 12]
    network = ImageClassifier.from_pretrained(run / CLASSIFIER_FOLDER).eval()
    held_out = load_images(config.data).validation
    hits = [
        network(held_out.pixel_range.to_model(item["image"])[None]).argmax().item() == item["label"]
        for item in map(held_out.fetch, range(len(held_out)))
    ]
    accuracies = [row["accuracy"] for row in read_metrics(run / "metrics.jsonl") if "accuracy" in row]
    assert network.config.accuracy == sum(hits) / len(hits) == max(accuracies) == 1
    assert network.config.class_names == ["bright", "dark"]
    assert network.config.data == f"{config.data.data} (train)"
    assert f"{config.data.data} (train)" in feature_network(str(run)).name


def test_an_interrupted_run_ends_as_an_undisturbed_one(config, run, tmp_path):
    """The loss raises in step 7, after the checkpoint of step 4; dropout draws the same numbers again."""
    again = replace(config, output=tmp_path / "run")
    with power_cut(ClassificationTask, 7):
        train_classifier(again)
    train_classifier(again)
    for name in ("model", "ema", "optimizer", "best"):
        ours, theirs = (load_file(x / f"checkpoints/step-00000012/{name}.safetensors") for x in (again.output, run))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_the_hardest_images_come_first_and_cost_accuracy(config, tmp_path):
    """One of the dark held-out images is bright."""
    held_out = images(tmp_path / "held out", count=5)
    stray = held_out / "dark" / "stray.png"
    (held_out / "bright" / "bright-03.png").rename(stray)
    data = replace(config.data, validation_data=str(held_out), validation_fraction=0)
    run = train_classifier(replace(config, output=tmp_path / "run", data=data))
    assert ImageClassifier.load_config(run / CLASSIFIER_FOLDER)["accuracy"] == 9 / 10
    first = np.asarray(Image.open(run / "hardest.png"))[2 : 2 + HEIGHT, 2 : 2 + WIDTH]
    assert np.array_equal(first, np.asarray(Image.open(stray).convert("RGB")))
    assert "held-out accuracy 0.900" in feature_network(str(run)).name


def test_unsuitable_data_are_refused_before_training(tmp_path):
    labelled, flat = images(tmp_path / "labelled"), images(tmp_path / "flat", flat=True)
    stream = {"streaming": True, "image_size": 8, "validation_fraction": 0}
    named = {"validation_data": str(flat), "validation_fraction": 0}
    for data, message in (
        ({"data": str(flat)}, "has no class labels, but a classifier learns them; name their column by label_column"),
        (stream, "streaming is set and no validation set is named, but previews"),
        (named, "none of the 24 images used of .*flat .* has a class label"),
        ({"data": str(labelled), "max_images": 8, "label_column": "absent"}, "absent"),
    ):
        config = options(tmp_path, labelled, training=TrainingConfig(trackers=()))
        with pytest.raises(ValueError, match=message):
            train_classifier(replace(config, data=replace(config.data, **data)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not a folder; choose another"):
        train_classifier(options(tmp_path, labelled, output=tmp_path / "file" / "run"))
    assert not (tmp_path / "run").exists()


# --- its features ---


def test_features_are_those_of_the_stored_levels(run):
    network = feature_network(str(run))
    trained = ImageClassifier.from_pretrained(run / CLASSIFIER_FOLDER).eval()
    stored = torch.randint(0, 256, (3, 1, 6, 9)) / 127.5 - 1
    expected = trained.features(stored).double()
    torch.testing.assert_close(features_of(network, stored), expected)
    torch.testing.assert_close(features_of(network, (stored + 0.9 / 255).clamp(-1, 1)), expected)  # not half a level
    assert not network.train().training and not any(parameter.requires_grad for parameter in network.parameters())


def test_distances_are_zero_for_equal_sets_and_grow_with_noise(run):
    network = feature_network(str(run))
    real, noise = torch.rand(80, 1, 8, 8) * 0.4 - 0.9, torch.randn(80, 1, 8, 8)
    same, slight, strong = (features_of(network, (real + amount * noise).clamp(-1, 1)) for amount in (0, 0.2, 0.6))
    assert frechet_distance(same, same).value == pytest.approx(0, abs=1e-8)
    for measure in (frechet_distance, kernel_distance):
        assert measure(same, same).value < measure(same, slight).value < measure(same, strong).value


def test_images_of_other_channels_are_refused(run):
    with pytest.raises(ValueError, match="the images have 3 channels, but classifier of .* takes 1 channel; choose"):
        features_of(feature_network(str(run)), torch.zeros(1, 3, 8, 8))


def test_a_folder_without_a_finished_classifier_is_refused(tmp_path):
    folder = tmp_path / CLASSIFIER_FOLDER

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            feature_network(str(tmp_path))

    refused("there is no classifier/config.json in it; give the folder of a finished run of train-classifier")
    UNet.from_preset("tiny").save_pretrained(folder)
    refused("is a UNet, but must be an ImageClassifier; give the folder")
    classifier().save_pretrained(folder)
    refused("does not say its data")
    classifier(data="mine").save_pretrained(folder)
    assert feature_network(str(tmp_path)).name == "classifier of mine, not validated"
    classifier(data="mine", accuracy=0.5).save_pretrained(folder)
    assert feature_network(str(tmp_path)).name == "classifier of mine, held-out accuracy 0.500"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "PictureClassifier"}))  # its former name
    assert feature_network(str(tmp_path)).name == "classifier of mine, held-out accuracy 0.500"
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    refused("cannot be read as safetensors")
    weights.unlink()
    torch.save(classifier().state_dict(), folder / "diffusion_pytorch_model.bin")
    refused("from safetensors, the only format")
    (folder / "config.json").write_text("[]")
    refused("must hold keys and values")
