"""Bad options, models and folders of runs: what a user is told of each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from fault_checks.attempts import WEIGHTS, Case, Place
from safetensors.torch import load_file, save_file

from unet_diffusion.saved_runs import load_unet
from unet_diffusion.training.checkpoints import saved_checkpoints, sha256

Attempt = Callable[[Place], None]


def option(*options: object) -> Attempt:
    """Trains with an option."""
    return lambda place: place.train(place.images() / "images", *options)


def weights(change: Callable[[dict[str, torch.Tensor]], None], use: str = "segment") -> Attempt:
    """Uses a saved model whose weights are changed."""

    def attempt(place: Place) -> None:
        model = place.model("segmentation" if use == "segment" else "generation")
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)
        if use == "segment":
            place.segment(place.images() / "images" / "0.png", model=model)
        elif use == "export":
            place.command("export", model, place.folder / "exported")
        else:
            load_unet(str(model), {})

    return attempt


def _narrowed(tensors: dict[str, torch.Tensor]) -> None:
    name = "stem.weight"
    tensors[name] = tensors[name][:, :, :1, :1].contiguous()


def replaced(name: str, text: str) -> Attempt:
    """Samples from a run of which one file is replaced."""

    def attempt(place: Place) -> None:
        model = place.model("generation")
        (model / name).write_text(text)
        place.sample(model)

    return attempt


def _cut_weights(place: Place) -> None:
    model = place.model("generation")
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5000])
    place.sample(model)


def _no_weights(place: Place) -> None:
    model = place.model("generation")
    (model / WEIGHTS).unlink()
    place.sample(model)


def _model_file(text: str) -> Attempt:
    return lambda place: option("--model", place.write("model.json", text))(place)


def resumed(*options: object) -> Attempt:
    """Goes on with a run of one step."""

    def attempt(place: Place) -> None:
        images = place.images() / "images"
        place.train(images, "--warmup-steps", 0)
        place.train(images, "--warmup-steps", 0, *options)

    return attempt


def later_checkpoint(place: Place) -> None:
    """Goes on with a run whose checkpoint says that a later version wrote it."""
    images = place.images() / "images"
    place.train(images)
    (checkpoint,) = saved_checkpoints(place.folder / "run" / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 99}))
    files = [file for file in checkpoint.iterdir() if file.name != "checksums.json"]
    (checkpoint / "checksums.json").write_text(json.dumps({file.name: sha256(file) for file in files}))
    place.train(images)


def _segment_into_file(place: Place) -> None:
    place.write("out", "")
    place.segment(place.images() / "images")


def changed_model(place: Place) -> None:
    """Goes on with a run whose model's file has other widths by now."""
    images = place.images() / "images"
    for width in (8, 16):
        model = place.write("model.json", json.dumps({"channels": [8, width], "head_channels": 8}))
        place.train(images, "--warmup-steps", 0, "--model", model, "--steps", width)


def output_not_utf8(place: Place) -> None:
    """An output folder whose name cannot be written into the model card."""
    place.train(place.images() / "images", "--output", os.fsdecode(os.fsencode(place.folder) + b"/sorti\xe9"))


def data_not_utf8(place: Place) -> None:
    """A folder of images whose name cannot be written into the model card."""
    folder = os.fsdecode(os.fsencode(place.folder) + b"/donn\xe9es")
    os.rename(place.images(), folder)
    place.train(Path(folder) / "images")


def _train_into_file(place: Place) -> None:
    place.write("run", "")
    place.train(place.images() / "images")


RUNS = [
    Case("unknown option", option("--frobnicate", 1), ("Unrecognized options: --frobnicate", "--help")),
    Case("unknown config value", _model_file('{"frobnicate": 1}'), ("no config value 'frobnicate'", "choose from")),
    Case("model file that is no JSON", _model_file("{"), (r"model\.json cannot be read as JSON", "repair it")),
    Case("model file that is a list", _model_file("[]"), (r"model\.json holds a list", "must hold keys and values")),
    Case("unknown preset", option("--model", "huge"), ("no preset 'huge'", "choose one of .*tiny")),
    Case("negative steps", option("--steps", -3), ("steps is -3", "at least 1")),
    Case("batch of none", option("--batch-size", 0), ("batch_size is 0", "at least 1")),
    Case("steps that are no number", option("--steps", "many"), ("--steps", "'many'")),
    Case(
        "device that is not here",
        lambda place: place.command(
            "sample", "--run", place.models / "generation", "--output", place.folder / "out", "--device", "tpu9"
        ),
        ("'tpu9'", "choose one"),
    ),
    Case(
        "resume with another network", resumed("--model", "small-32"), ("model is 'small-32'", "'tiny'", "same value")
    ),
    Case("resume with another seed", resumed("--seed", 3), ("seed is 3", "started with 0", "another output folder")),
    Case("checkpoint of a later version", later_checkpoint, ("has format 99", "reads format", "version that wrote it")),
    Case("run folder without a run", lambda place: place.sample(place.folder), ("no model_index.json", "finished run")),
    Case(
        "generation run for segmentation",
        lambda place: place.segment(place.images() / "images", model=place.models / "generation"),
        ("num_classes=None", "needs a head"),
    ),
    Case("model without weights", _no_weights, ("no file named .*safetensors", "get it again")),
    Case("weights cut short", _cut_weights, ("cannot be read as safetensors", "get it again")),
    Case(
        "weights of which one is missing",
        weights(lambda tensors: tensors.pop("stem.weight")),
        ("1 missing keys, such as stem.weight", "those of another network", "get it again"),
    ),
    Case(
        "weights to train on of which one is missing",
        weights(lambda tensors: tensors.pop("stem.weight"), "load"),
        ("1 missing keys, such as stem.weight",),
    ),
    Case("weights of another shape", weights(_narrowed), ("mismatched keys, such as .*stem.weight", "get it again")),
    Case(
        "weights that are NaN",
        weights(lambda tensors: tensors["stem.bias"].fill_(torch.nan)),
        (r"stem\.bias .* NaN", "get it again"),
    ),
    Case(
        "export of weights that are NaN",
        weights(lambda tensors: tensors["stem.bias"].fill_(torch.nan), "export"),
        (r"stem\.bias .* NaN", "get it again"),
    ),
    Case(
        "network config that is no JSON",
        replaced("unet/config.json", "{"),
        (r"config\.json cannot be read as JSON", "repair it"),
    ),
    Case("network config that is a list", replaced("unet/config.json", "[]"), ("holds a list", "repair it")),
    Case("model_index.json that is a list", replaced("model_index.json", "[]"), ("holds a list", "repair it")),
    Case("scheduler that is no JSON", replaced("scheduler/scheduler_config.json", "{"), ("valid JSON", "Get it again")),
    Case("output that is a file", _segment_into_file, ("out is not a folder", "choose another")),
    Case("run folder that is a file", _train_into_file, ("run is not a folder", "choose another")),
    Case(
        "opacity of 2",
        lambda place: place.command("segment", "--inputs", "a.png", "--opacity", 2),
        ("opacity is 2", "from 0 to 1"),
    ),
    Case("learning rate that is NaN", option("--learning-rate", "nan"), ("learning_rate is nan", "above 0")),
    Case("resume after the model's file has changed", changed_model, ("of another network", "another output folder")),
    Case("images enlarged beyond memory", option("--image-size", 10**8), ("out of memory", "smaller images")),
    Case("output folder that is not UTF-8", output_not_utf8, ("sorti.*UTF-8", "choose another")),
    Case("data folder that is not UTF-8", data_not_utf8, ("donn.*UTF-8", "rename it")),
]
