"""Each bad option, model or run ends in a sentence that says the value, the rule and the fix."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reliability.sandbox import WEIGHTS, Attempt, Sandbox, cases
from unet_diffusion.files import check_output
from unet_diffusion.saved_runs import load_unet, read_object, saved_components
from unet_diffusion.training.checkpoints import saved_checkpoints, sha256

PROMISE = "Bad input"


def option(*options: object) -> Attempt:
    """Trains with an option."""
    return lambda sandbox: sandbox.train(sandbox.images() / "images", *options)


def weights(change: Callable[[dict[str, torch.Tensor]], None], use: str = "segment") -> Attempt:
    """Changes the weights of a saved model, then uses it."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model("segmentation" if use == "segment" else "generation")
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)
        if use == "segment":
            sandbox.segment(sandbox.images() / "images" / "0.png", model=model)
        elif use == "export":
            sandbox.command("export", model, sandbox.folder / "exported")
        else:
            load_unet(str(model), {})

    return attempt


def _narrowed(tensors: dict[str, torch.Tensor]) -> None:
    name = "stem.weight"
    tensors[name] = tensors[name][:, :, :1, :1].contiguous()


def replaced(name: str, text: str) -> Attempt:
    """Replaces one file of a run, then samples from it."""

    def attempt(sandbox: Sandbox) -> None:
        model = sandbox.model("generation")
        (model / name).write_text(text)
        sandbox.sample(model)

    return attempt


def _cut_weights(sandbox: Sandbox) -> None:
    model = sandbox.model("generation")
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:5000])
    sandbox.sample(model)


def _no_weights(sandbox: Sandbox) -> None:
    model = sandbox.model("generation")
    (model / WEIGHTS).unlink()
    sandbox.sample(model)


def _model_file(text: str) -> Attempt:
    return lambda sandbox: option("--model", sandbox.write("model.json", text))(sandbox)


def resumed(*options: object) -> Attempt:
    """Resumes a run of one step with other options."""

    return lambda sandbox: sandbox.train(sandbox.trained(), *options)


def _later_checkpoint(sandbox: Sandbox) -> None:
    """Resumes a run whose checkpoint was written by a later version."""
    images = sandbox.trained()
    (checkpoint,) = saved_checkpoints(sandbox.folder / "run" / "checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 99}))
    files = [file for file in checkpoint.iterdir() if file.name != "checksums.json"]
    (checkpoint / "checksums.json").write_text(json.dumps({file.name: sha256(file) for file in files}))
    sandbox.train(images)


def _segment_into_file(sandbox: Sandbox) -> None:
    sandbox.write("out", "")
    sandbox.segment(sandbox.images() / "images")


def _changed_model(sandbox: Sandbox) -> None:
    """Resumes a run after the widths in its model's file have changed."""
    images = sandbox.images() / "images"
    for width in (8, 16):
        model = sandbox.write("model.json", json.dumps({"channels": [8, width], "head_channels": 8}))
        sandbox.train(images, "--warmup-steps", 0, "--model", model, "--steps", width)


def _output_not_utf8(sandbox: Sandbox) -> None:
    """An output folder whose name cannot be written to the model card."""
    sandbox.train(sandbox.images() / "images", "--output", os.fsdecode(os.fsencode(sandbox.folder) + b"/sorti\xe9"))


def _data_not_utf8(sandbox: Sandbox) -> None:
    """A folder of images whose name cannot be written to the model card."""
    folder = os.fsdecode(os.fsencode(sandbox.folder) + b"/donn\xe9es")
    os.rename(sandbox.images(), folder)
    sandbox.train(Path(folder) / "images")


def _train_into_file(sandbox: Sandbox) -> None:
    sandbox.write("run", "")
    sandbox.train(sandbox.images() / "images")


RUNS = [
    ("unknown option", option("--frobnicate", 1), "Unrecognized options: --frobnicate", "--help"),
    ("unknown config value", _model_file('{"frobnicate": 1}'), "no config value 'frobnicate'", "choose from"),
    ("model file that is not JSON", _model_file("{"), r"model\.json cannot be read as JSON", "repair it"),
    ("model file that is a list", _model_file("[]"), r"model\.json holds a list", "must hold keys and values"),
    ("unknown preset", option("--model", "huge"), "no preset 'huge'", "choose one of .*tiny"),
    ("negative steps", option("--steps", -3), "steps is -3", "at least 1"),
    ("batch size of 0", option("--batch-size", 0), "batch_size is 0", "at least 1"),
    ("steps that are not a number", option("--steps", "many"), "--steps", "'many'"),
    (
        "device that this machine lacks",
        lambda sandbox: sandbox.command(
            "sample", "--run", sandbox.models / "generation", "--output", sandbox.folder / "out", "--device", "tpu9"
        ),
        "'tpu9'",
        "choose one",
    ),
    ("resume with another network", resumed("--model", "small-32"), "model is 'small-32'", "'tiny'", "same value"),
    ("resume with another seed", resumed("--seed", 3), "seed is 3", "started with 0", "another output folder"),
    ("checkpoint of a later version", _later_checkpoint, "has format 99", "reads format", "version that wrote it"),
    ("run folder without a run", lambda sandbox: sandbox.sample(sandbox.folder), "no model_index.json", "finished run"),
    (
        "generation run for segmentation",
        lambda sandbox: sandbox.segment(sandbox.images() / "images", model=sandbox.models / "generation"),
        "num_classes=None",
        "needs a head",
    ),
    ("model without weights", _no_weights, "no file named .*safetensors", "get it again"),
    ("weights cut short", _cut_weights, r"cannot be read as safetensors", "get it again"),
    (
        "weights with one missing",
        weights(lambda tensors: tensors.pop("stem.weight")),
        "1 missing keys, such as stem.weight",
        "those of another network",
        "get it again",
    ),
    (
        "weights to train on with one missing",
        weights(lambda tensors: tensors.pop("stem.weight"), "load"),
        "1 missing keys, such as stem.weight",
    ),
    ("weights of another shape", weights(_narrowed), "mismatched keys, such as .*stem.weight", "get it again"),
    (
        "weights that are NaN",
        weights(lambda tensors: tensors["stem.bias"].fill_(torch.nan)),
        r"stem\.bias .* NaN",
        "get it again",
    ),
    (
        "export of weights that are NaN",
        weights(lambda tensors: tensors["stem.bias"].fill_(torch.nan), "export"),
        r"stem\.bias .* NaN",
        "get it again",
    ),
    (
        "network config that is not JSON",
        replaced("unet/config.json", "{"),
        r"config\.json cannot be read as JSON",
        "repair it",
    ),
    ("network config that is a list", replaced("unet/config.json", "[]"), "holds a list", "repair it"),
    ("model_index.json that is a list", replaced("model_index.json", "[]"), "holds a list", "repair it"),
    (
        "scheduler config that is not JSON",
        replaced("scheduler/scheduler_config.json", "{"),
        "valid JSON",
        "Get it again",
    ),
    ("output that is a file", _segment_into_file, "out is not a folder", "choose another"),
    ("run folder that is a file", _train_into_file, "run is not a folder", "choose another"),
    (
        "opacity of 2",
        lambda sandbox: sandbox.command("segment", "--inputs", "a.png", "--opacity", 2),
        "opacity is 2",
        "from 0 to 1",
    ),
    ("learning rate that is NaN", option("--learning-rate", "nan"), "learning_rate is nan", "above 0"),
    ("resume after the model's file has changed", _changed_model, "to another network", "another output folder"),
    ("images enlarged beyond the memory", option("--image-size", 10**8), "out of memory", "smaller images"),
    ("output folder whose name is not UTF-8", _output_not_utf8, "sorti.*UTF-8", "choose another"),
    ("data folder whose name is not UTF-8", _data_not_utf8, "donn.*UTF-8", "rename it"),
]


@pytest.mark.parametrize(("attempt", "says"), cases(RUNS))
def test_bad_options_models_and_runs(attempt, says, sandbox, request, record_property):
    record_property("fault", request.node.callspec.id)
    record_property("figure", sandbox.refusal(attempt, *says))


def test_a_run_names_its_components_and_a_JSON_file_that_holds_no_keys_is_refused(models, tmp_path):
    found = saved_components(models / "generation")
    assert found["unet"] == ("unet_diffusion.unet", "UNet") and found["scheduler"][1] == "DDPMScheduler"
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(ValueError, match="holds a int, but must hold keys and values"):
        read_object(tmp_path / "a.json")


def test_output_folders_that_can_be_made_are_accepted_and_not_made(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder; choose another"):
        check_output(tmp_path / "file" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="link is not a folder"):
        check_output(tmp_path / "link")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_place_where_nothing_can_be_made_is_refused_though_its_rights_allow_it():
    """Root has all rights, also in /proc and on media that are mounted read-only."""
    with pytest.raises(ValueError, match="output is /proc/runs/new, but /proc cannot be written to; change its rights"):
        check_output(Path("/proc/runs/new"))


def test_checking_an_output_leaves_nothing_behind(tmp_path):
    check_output(tmp_path)
    assert list(tmp_path.iterdir()) == []
