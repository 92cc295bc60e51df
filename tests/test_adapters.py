import json
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier, upsampled

CHANNELS, STRIDES = (8, 6, 4), (4, 2, 1)
SIZES = [(16, 16), (13, 22), (1, 1), (5, 3)]


def classifier(timesteps: tuple[int, ...] = (10, 200), **overrides) -> PixelClassifier:
    values = {"channels": CHANNELS, "strides": STRIDES, "stages": (0, 1, 2), "num_classes": 3, "hidden": (7, 5)}
    network = PixelClassifier(timesteps=timesteps, **{**values, **overrides})
    nn.init.normal_(network.head.weight)
    nn.init.normal_(network.bias)
    return network.eval()


def random_maps(size: tuple[int, int], batch: int = 2) -> tuple[Tensor, ...]:
    """Maps of the stages above for images of the given size, each at another scale."""
    sides = [[-(-side // stride) for side in size] for stride in STRIDES]
    return tuple(10**i * torch.randn(batch, width, *side) for i, (width, side) in enumerate(zip(CHANNELS, sides)))


def noise_predictor(**overrides) -> UNet:
    unet = UNet(**{"in_channels": 1, "out_channels": 1, "channels": (4, 6, 8), "head_channels": 8, **overrides})
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:
                nn.init.normal_(parameter, std=0.3)
    return unet.eval()


def interpolated(x: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Linear interpolation between the centres of the cells that map pixels stand for, along one axis at a time."""
    values = x.numpy()
    for axis, side in ((2, size[0]), (3, size[1])):
        centres = stride * np.arange(values.shape[axis]) + (stride - 1) / 2
        values = np.apply_along_axis(lambda line: np.interp(np.arange(side), centres, line), axis, values)  # noqa: B023
    return torch.from_numpy(values).float()


# --- what it computes ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_upsampling_interpolates_between_the_centres_of_the_cells(size, stride):
    x = torch.randn(1, 2, *(-(-side // stride) for side in size))
    torch.testing.assert_close(upsampled(x, stride, size), interpolated(x, stride, size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_it_equals_a_perceptron_on_all_features_upsampled_and_joined(size):
    """The reference: 2 timesteps x (8 + 6 + 4) normalised features at full size, one linear layer over all 36."""
    network = classifier()
    features = [random_maps(size) for _ in range(2)]
    joined = torch.cat(
        [
            interpolated(F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1), stride, size)
            for maps in features
            for x, stride in zip(maps, STRIDES)
        ],
        dim=1,
    )
    shares = [projection.linear.weight.flatten(1) for each in network.projections for projection in each]
    hidden = F.linear(joined.movedim(1, -1), torch.cat(shares, dim=1), network.bias.flatten())
    hidden = F.linear(hidden.relu(), network.layers[1].weight.flatten(1), network.layers[1].bias)
    expected = F.linear(hidden.relu(), network.head.weight.flatten(1), network.head.bias).movedim(-1, 1)
    assert joined.shape[1] == 36
    torch.testing.assert_close(network(features, size), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("top", "left"), [(4, 8), (12, 0)])
@torch.no_grad()
def test_a_window_gets_what_the_whole_image_gets_but_for_its_border(top, left):
    """Windows start at multiples of the largest stride; upsampling reads that far beyond a pixel at most."""
    network = classifier()
    features = [random_maps((33, 30)) for _ in range(2)]
    bottom, right, reach = 29, 26, max(STRIDES)
    cut = [
        [x[..., top // s : -(-bottom // s), left // s : -(-right // s)] for x, s in zip(maps, STRIDES)]
        for maps in features
    ]
    whole = network(features, (33, 30))[..., top:bottom, left:right]
    window = network(cut, (bottom - top, right - left))
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    torch.testing.assert_close(window[inside], whole[inside], rtol=0, atol=1e-5)
    assert not torch.allclose(window, whole, atol=1e-3)  # so the border does differ


def test_an_untrained_classifier_scores_all_classes_alike():
    network = PixelClassifier(CHANNELS, STRIDES, (0, 1, 2), (10,), num_classes=3)
    assert not network([random_maps((9, 9))], (9, 9)).any()


@torch.no_grad()
def test_the_scale_of_a_stage_does_not_matter():
    network, maps = classifier((10,)), random_maps((9, 9))
    scaled = (1000 * maps[0], maps[1], maps[2])
    torch.testing.assert_close(network([scaled], (9, 9)), network([maps], (9, 9)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_images_of_a_batch_do_not_affect_each_other():
    network = classifier().train()
    features = [random_maps((9, 12)) for _ in range(2)]
    alone = network([[x[:1] for x in maps] for maps in features], (9, 12))
    torch.testing.assert_close(network(features, (9, 12))[:1], alone, rtol=0, atol=1e-5)


def test_the_first_layer_starts_with_one_scale_whatever_the_number_of_maps():
    """He initialisation of 36 or 360 unit features: pre-activations of variance 2."""
    for count in (2, 20):
        network = PixelClassifier((64, 64), (1, 1), (0, 1), tuple(range(count)), num_classes=2, hidden=(500,))
        features = [[torch.randn(1, 64, 4, 4) for _ in range(2)] for _ in range(count)]
        network.layers = network.head = nn.Identity()
        assert network(features, (4, 4)).var().item() == pytest.approx(2, rel=0.1)


def test_every_parameter_gets_a_gradient():
    network = classifier()
    network([random_maps((9, 9)) for _ in range(2)], (9, 9)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


# --- the features of a network ---


def test_features_are_those_of_the_noisy_image_at_each_timestep():
    unet, scheduler = noise_predictor(), DDPMScheduler()
    network = PixelClassifier.beside(unet, 2, (10, 200), stages=(1,))
    clean, noises = torch.rand(2, 1, 9, 14) * 2 - 1, torch.randn(2, 2, 1, 9, 14)
    for timestep, noise, maps in zip((10, 200), noises, network.features(unet, scheduler, clean, noises)):
        abar = scheduler.alphas_cumprod[timestep]
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise  # Ho et al. 2020, eq. 4
        with torch.no_grad():
            (expected,) = unet(noisy, timestep, head="features").features[1:]
        assert len(maps) == 1
        assert not maps[0].requires_grad
        assert maps[0].shape == (2, unet.feature_info[1]["channels"], 9, 14)
        torch.testing.assert_close(maps[0], expected, rtol=0, atol=1e-5)


def test_the_network_runs_only_when_its_features_are_asked_for():
    unet, calls = noise_predictor(), []
    unet.register_forward_hook(lambda *_: calls.append(1))
    network = PixelClassifier.beside(unet, 2, (10, 20, 30))
    image = torch.zeros(1, 1, 8, 8)
    features = network.features(unet, DDPMScheduler(), image, [image] * 3)
    for expected in (1, 2, 3):
        next(features)
        assert len(calls) == expected


def test_maps_of_one_timestep_are_gone_before_the_next_are_made():
    """So that memory does not grow with the number of timesteps."""
    seen: list[weakref.ref] = []

    def stream() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(4):
            assert not any(reference() is not None for reference in seen)
            yield remembered(random_maps((8, 8)))

    def remembered(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.extend(weakref.ref(x) for x in maps)
        return maps

    with torch.no_grad():
        classifier((1, 2, 3, 4))(stream(), (8, 8))
    assert len(seen) == 4 * len(CHANNELS)


def test_gradients_reach_the_classifier_but_not_the_network():
    unet = noise_predictor()
    network = PixelClassifier.beside(unet, 2, (10, 20))
    nn.init.normal_(network.head.weight)
    image = torch.randn(1, 1, 8, 8)
    network(network.features(unet, DDPMScheduler(), image, [image] * 2), (8, 8)).sum().backward()
    assert network.projections[1][0].linear.weight.grad.any()
    assert all(parameter.grad is None for parameter in unet.parameters())


# --- what is saved ---


def test_saving_and_loading_gives_the_same_classifier(tmp_path):
    network = classifier()
    network.save_pretrained(tmp_path)
    loaded = PixelClassifier.from_pretrained(tmp_path)
    features = [random_maps((8, 8)) for _ in range(2)]
    torch.testing.assert_close(loaded(features, (8, 8)), network(features, (8, 8)), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("down_block_types") == [
        "these weights are loaded with PixelClassifier.from_pretrained, of unet_diffusion"
    ]
    assert {key: value for key, value in config.items() if not key.startswith("_")} == {
        "channels": [8, 6, 4],
        "strides": [4, 2, 1],
        "stages": [0, 1, 2],
        "timesteps": [10, 200],
        "num_classes": 3,
        "hidden": [7, 5],
    }


def test_the_names_of_the_weights_are_fixed():  # they are part of the checkpoint format
    network = PixelClassifier((8, 4), (2, 1), (0, 1), (10,), num_classes=3, hidden=(7, 5))
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == {
        "bias": (7, 1, 1),
        "projections.0.0.linear.weight": (7, 8, 1, 1),
        "projections.0.1.linear.weight": (7, 4, 1, 1),
        "layers.1.weight": (5, 7, 1, 1),
        "layers.1.bias": (5,),
        "head.weight": (3, 5, 1, 1),
        "head.bias": (3,),
    }


def test_a_classifier_beside_a_network_takes_what_the_network_says_of_its_features():
    config = PixelClassifier.beside(noise_predictor(), 2, [10]).config
    assert (config.stages, config.channels, config.strides) == ((0, 1), (6, 4), (2, 1))
    config = PixelClassifier.beside(noise_predictor(), 2, [10], stages=[1]).config
    assert (config.stages, config.channels, config.strides) == ((1,), (4,), (1,))


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": ()}, "timesteps are"),
        ({"timesteps": (10, 10)}, "each once"),
        ({"timesteps": (-1,)}, "at least 0"),
        ({"timesteps": (0.5,)}, "integers"),
        ({"stages": (0, 0, 1)}, "stages are .* each once"),
        ({"stages": (0, 1)}, "each stage has one number of channels"),
        ({"strides": (4, 2, 0)}, "each stage has one number of channels"),
        ({"hidden": ()}, "hidden is"),
        ({"hidden": (8, 0)}, "hidden is"),
        ({"num_classes": 1}, "num_classes is 1"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier(**{"timesteps": (10,), **arguments})


@pytest.mark.parametrize(
    ("change", "scheduler", "message"),
    [
        ({}, None, "no scheduler"),
        ({}, DDPMScheduler(num_train_timesteps=200), r"timesteps are \[10, 200\].*0 to 199"),
        ({"time_embedding": None, "num_classes": 2, "out_channels": None}, DDPMScheduler(), "time_embedding None"),
        ({"padding": "valid"}, DDPMScheduler(), "padding 'valid'"),
        ({"num_class_embeds": 4}, DDPMScheduler(), "label_dropout is 0"),
        ({"channels": (4, 8)}, DDPMScheduler(), "stages 0 to 0"),
        ({"channels": (4, 10, 8)}, DDPMScheduler(), "use the network that it was trained with"),
    ],
)
def test_networks_that_it_cannot_read_are_refused(change, scheduler, message):
    network = PixelClassifier.beside(noise_predictor(), 2, (10, 200))
    with pytest.raises(ValueError, match=message):
        network.check_trunk(noise_predictor(**change), scheduler)


def test_a_stage_that_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match="stages 0 to 1"):
        PixelClassifier.beside(noise_predictor(), 2, (10,), stages=(2,))


def test_maps_that_are_missing_or_of_another_size_are_refused():
    network = classifier()
    maps = random_maps((9, 9))
    with pytest.raises(ValueError, match="0 maps of a timestep, but the classifier takes 3"):
        network([maps], (9, 9))
    with pytest.raises(ValueError, match="2 maps of a timestep"):
        network([maps, maps[:2]], (9, 9))
    with pytest.raises(ValueError, match="map of stride 4 is 3x3, but the image is 13x9"):
        network([maps, maps], (13, 9))
