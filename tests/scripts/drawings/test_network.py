"""The drawing of a network has the numbers of the paper, which it reads from the modules."""

import json

import pytest
import torch
from PIL import Image

from scripts.drawings import network as script
from unet_diffusion import UNet

# Ronneberger, Fischer and Brox (2015), figure 1: channels and pixels a side of every map
PUBLISHED = {
    "encoder": (
        ((1, 572), (64, 570), (64, 568)),
        ((64, 284), (128, 282), (128, 280)),
        ((128, 140), (256, 138), (256, 136)),
        ((256, 68), (512, 66), (512, 64)),
    ),
    "bridge": ((512, 32), (1024, 30), (1024, 28)),
    "decoder": (
        ((1024, 56), (512, 54), (512, 52)),
        ((512, 104), (256, 102), (256, 100)),
        ((256, 200), (128, 198), (128, 196)),
        ((128, 392), (64, 390), (64, 388)),
    ),
}


def plain(level) -> tuple[tuple[int, int], ...]:
    assert all(shape.height == shape.width for shape in level)
    return tuple((shape.channels, shape.height) for shape in level)


def test_the_shapes_are_those_of_the_paper():
    with torch.device("meta"):
        shapes = script.read_shapes(UNet.from_preset("ronneberger-2015"), 572, 572)
    assert tuple(plain(level) for level in shapes.encoder) == PUBLISHED["encoder"]
    assert plain(shapes.bridge) == PUBLISHED["bridge"]
    assert tuple(plain(level) for level in shapes.decoder) == PUBLISHED["decoder"]
    assert [level[0].copied for level in shapes.decoder] == [512, 256, 128, 64]  # the white halves
    assert {name: plain([shape]) for name, shape in shapes.heads.items()} == {"segmentation_head": ((2, 388),)}


def test_a_noise_predictor_has_both_heads_and_shows_where_it_attends():
    with torch.device("meta"):
        unet = UNet.from_preset("small-32", num_classes=5)
        shapes = script.read_shapes(unet, 32, 32)
    assert {name: plain([shape]) for name, shape in shapes.heads.items()} == {
        "noise_head": ((3, 32),),
        "segmentation_head": ((5, 32),),
    }
    assert [level[-1].attended for level in (*shapes.encoder, shapes.bridge)] == [False, False, True, True]
    assert plain(shapes.bridge) == ((256, 4), (416, 4), (416, 4))


@pytest.mark.parametrize("config", [{"in_channels": 4}, {"padding": "valid", "block": "plain", "time_embedding": None}])
def test_the_drawing_is_an_image(tmp_path, config):
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [4, 8, 12], "head_channels": 4, **config}))
    file = script.draw(script.DrawNetwork(model=str(network), side=44, output=tmp_path / "network.png"))
    image = Image.open(file).convert("L")
    assert image.width > image.height > 300
    assert image.getextrema()[0] < 100 and image.getpixel((0, 0)) == 255
