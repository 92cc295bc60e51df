"""The helpers of these tests notice failures."""

import contextlib
import io
import pickle
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from tyro import cli
from tyro.conf import OmitArgPrefixes

from tests.reliability import attacks
from tests.reliability.tiny_runs import ddpm_arguments, differences, into, tiny_runs, train


def test_a_run_that_ends_differently_is_distinguished_from_the_undisturbed_one(tmp_path):
    """Otherwise no test could find harm done by a kill."""
    options = tiny_runs(tmp_path, steps=2)["ddpm"]
    for name in ("whole", "other"):
        train(into(options, tmp_path / name))
    assert differences(tmp_path / "other", tmp_path / "whole") == []
    (tmp_path / "other" / ".writing-1-a").write_text("")
    with (tmp_path / "other" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    weights = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    found = differences(tmp_path / "other", tmp_path / "whole")
    assert found == ["unet/diffusion_pytorch_model.safetensors", "metrics.jsonl", "leftover .writing-1-a"]


def test_a_command_is_given_all_options_of_the_run(tmp_path):
    options = into(tiny_runs(tmp_path)["ddpm"], tmp_path / "run", num_workers=1)
    name, *arguments = ddpm_arguments(options)
    assert (name, cli(type(options), args=arguments, config=(OmitArgPrefixes,))) == ("train-ddpm", options)


def raise_key_error(_) -> None:
    raise KeyError("of a library")


def refuse_in_foreign_words(_) -> None:
    raise ValueError("wrong <_io.BytesIO object at 0x7f00>")


def test_only_a_sentence_for_the_user_counts_as_a_refusal(sandbox):
    def refuse(_) -> None:
        raise ValueError("size is 3; choose 4")

    assert sandbox.refusal(refuse, "size is 3", "choose") == "size is 3; choose 4"
    with pytest.raises(AssertionError, match="'too large' is missing"):
        sandbox.refusal(refuse, "too large")
    with pytest.raises(AssertionError, match="object at"):
        sandbox.refusal(refuse_in_foreign_words, "wrong")
    with pytest.raises(AssertionError, match="accepted"):
        sandbox.refusal(lambda _: None, "wrong")
    with pytest.raises(KeyError):
        sandbox.refusal(raise_key_error, "library")


@pytest.mark.parametrize(
    ("payload", "read"),
    [
        (attacks.raw, pickle.load),
        (attacks.saved, lambda file: torch.load(file, weights_only=False)),
        (attacks.objects, lambda file: np.load(file, allow_pickle=True)),
    ],
)
def test_the_payload_of_a_hostile_file_runs_where_a_pickle_is_read(payload, read, sandbox):
    content = payload(sandbox)
    assert not (sandbox.folder / attacks.MARKER).exists()
    read(io.BytesIO(content))
    assert (sandbox.folder / attacks.MARKER).is_file()


def test_pillow_alone_starts_ghostscript_for_postscript_of_any_name(sandbox):
    with attacks.ghostscript(sandbox), contextlib.suppress(OSError, subprocess.CalledProcessError):
        Image.open(sandbox.write("a.png", attacks.postscript(sandbox))).load()
    assert (sandbox.folder / attacks.MARKER).is_file()
