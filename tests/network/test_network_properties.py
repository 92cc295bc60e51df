"""Properties of the network over the whole space of its configs, sizes and channel counts."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_diffusion import UNet

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
LARGEST_WIDTH = 9

NOT_COUNTS = [0, -1, True, 1.5, "3", [3], (), {}, math.nan]
NOT_SHARES = [-0.1, 1, 1.0, True, "0.1", None, [0.1], math.nan, math.inf]
WRONG: dict[str, list[Any]] = {  # values that the docstring of UNet rules out, whatever the other keys are
    "sample_size": [*NOT_COUNTS, None, (8,), (8, 8, 8), (8, 0), (8.0, 8), "ab"],
    "in_channels": [*NOT_COUNTS, None],
    "out_channels": NOT_COUNTS,
    "channels": [*NOT_COUNTS, None, (8,), (8, 1), (8, 8.0), (8, True), "88", ("8", "8")],
    "blocks_per_stage": [*NOT_COUNTS, None],
    "attention": [True, 1, "tf", (), (True,), (1, 0), (None, None), ("yes", "no"), {}, [[True], [False]]],
    "head_channels": [*NOT_COUNTS, None],
    "block": ["", "Residual", None, 1, ["residual"], {}],
    "norm": ["layer", None, True, ["group"]],
    "activation": ["gelu", None, 0],
    "padding": ["full", None, 1],
    "downsample": ["average", None],
    "upsample": ["bilinear", None],
    "dropout": NOT_SHARES,
    "time_embedding": ["learned", "", False, 1],
    "num_class_embeds": NOT_COUNTS,
    "label_dropout": NOT_SHARES,
    "num_classes": [*NOT_COUNTS, 1],
    "segmentation_timestep": [-1, "0", None, True, [0], math.nan, math.inf],
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs that the docstring of `UNet` allows, of networks small enough to run."""
    channels = draw(st.lists(st.integers(2, LARGEST_WIDTH), min_size=2, max_size=3))
    attention = draw(st.none() | st.lists(st.booleans(), min_size=len(channels), max_size=len(channels)))
    attends = attention or [False] * (len(channels) - 1) + [True]
    common = math.gcd(*(width for width, attend in zip(channels, attends) if attend)) or 32
    time_embedding = draw(st.sampled_from(["sinusoidal", "fourier", None]))
    classes = draw(st.none() | st.integers(1, 3)) if time_embedding else None
    out_channels = draw(st.none() | st.integers(1, 13))
    return {
        "sample_size": draw(st.integers(1, 40) | st.tuples(st.integers(1, 40), st.integers(1, 40))),
        "in_channels": draw(st.integers(1, 13)),
        "out_channels": out_channels,
        "channels": tuple(channels),
        "blocks_per_stage": draw(st.integers(1, 2)),
        "attention": None if attention is None else tuple(attention),
        "head_channels": draw(st.sampled_from([each for each in range(1, common + 1) if common % each == 0])),
        "block": draw(st.sampled_from(["residual", "plain"])),
        "norm": draw(st.sampled_from(["group", "batch", "none"])),
        "activation": draw(st.sampled_from(["silu", "relu"])),
        "padding": draw(st.sampled_from(["same", "valid"])),
        "downsample": draw(st.sampled_from(["max_pool", "conv"])),
        "upsample": draw(st.sampled_from(["transposed", "nearest"])),
        "dropout": draw(st.sampled_from([0, 0.0, 0.3])),
        "time_embedding": time_embedding,
        "num_class_embeds": classes,
        "label_dropout": draw(st.sampled_from([0.0, 0.2])) if classes else 0.0,
        "num_classes": draw(st.integers(2, 5) if out_channels is None else st.none() | st.integers(2, 5)),
        "segmentation_timestep": draw(st.sampled_from([0, 7, 0.5])) if time_embedding else 0,
    }


def call(unet: UNet, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of all heads of a network for an image."""
    config = unet.config
    heads = [head for head, module in (("noise", unet.noise_head), ("segmentation", unet.segmentation_head)) if module]
    labels = None if config.num_class_embeds is None else torch.zeros(len(x), dtype=torch.int64)
    timestep = None if config.time_embedding is None else 3
    output = unet(x, timestep, labels, head="both" if len(heads) == 2 else heads[0])
    return [output[name] for name in ("sample", "logits") if name in output]


@pytest.mark.slow
@PROPERTY
@given(config=configs(), height=st.integers(1, 17), width=st.integers(1, 17))
def test_every_valid_config_learns_at_every_size(config, height, width):
    unet = UNet(**config)
    for module in unet.modules():  # those that start at zero let no gradient through
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.1)
    size = (unet.smallest_side + height - 1, unet.smallest_side + width - 1)  # of a padded network, the size itself
    outputs = call(unet, torch.randn(2, config["in_channels"], *size))
    channels = [count for count in (config["out_channels"], config["num_classes"]) if count is not None]
    assert [output.shape for output in outputs] == [(2, count, *unet.output_size(*size)) for count in channels]
    sum(output.square().sum() for output in outputs).backward()
    wrong = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert wrong == []


@pytest.mark.slow
@PROPERTY
@given(config=configs())
def test_every_valid_config_comes_back_from_disk_bit_for_bit(config, tmp_path_factory):
    unet = UNet(**config).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("network")
    unet.save_pretrained(folder)
    loaded = UNet.from_pretrained(folder)
    plain = [json.loads(json.dumps({key: each.config[key] for key in config})) for each in (unet, loaded)]
    assert plain[0] == plain[1] == json.loads(json.dumps(config))
    assert json.loads((folder / "config.json").read_text()) | plain[0] == json.loads(
        (folder / "config.json").read_text()
    )
    x = torch.randn(1, config["in_channels"], unet.smallest_side + 5, unet.smallest_side + 2)
    with torch.no_grad():
        for one, other in zip(call(unet, x), call(loaded, x), strict=True):
            assert torch.equal(one, other)
    with torch.device("meta"):  # another one of the same config has the same parameters
        again = UNet.from_config(loaded.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in unet.named_parameters()}


@PROPERTY
@given(config=configs(), data=st.data())
def test_every_config_with_one_wrong_value_is_refused_by_its_name(config, data):
    key = data.draw(st.sampled_from(sorted(WRONG)))
    value = data.draw(st.sampled_from(WRONG[key]))
    with torch.device("meta"), pytest.raises(ValueError, match=rf"\b{key}\b") as error:
        UNet(**{**config, key: value})
    assert type(error.value) is ValueError  # raised by us, not by a library


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_every_wrong_value_is_refused_in_the_default_config(key, value):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"\b{key}\b"):
        UNet(**{"channels": (8, 8), "head_channels": 8, key: value})
