import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unet_diffusion import UNet, UNetOutput

SMALL = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "head_channels": 8}


def small(**overrides) -> UNet:
    return UNet(**{**SMALL, **overrides})


def randomised(unet: UNet) -> UNet:
    """The network with weights in its zero-initialised layers, so that a test of values covers all of it."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.abs().max() == 0:
                nn.init.normal_(parameter, std=0.05)
    return unet


def count(unet: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unet.parameters())


# --- the network of 2015 ---


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])  # both readings of the up-convolution
def test_ronneberger_2015_has_the_published_layout(upsample):
    with torch.device("meta"):  # shapes only
        unet = UNet.from_preset("ronneberger-2015", in_channels=1, num_classes=2, upsample=upsample)
        logits = unet(torch.empty(1, 1, 572, 572)).logits
    convolutions = [m for m in unet.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert logits.shape == (1, 2, 388, 388)
    assert len(convolutions) == 23
    assert count(unet) == 31_030_658
    assert unet.noise_head is None


def test_unpadded_network_says_what_it_needs():
    with torch.device("meta"):
        unet = UNet.from_preset("ronneberger-2015")
        assert unet(torch.empty(1, 1, 188, 188)).logits.shape[-2:] == (4, 4)
        with pytest.raises(ValueError, match="sample is 187x572.*at least 188 pixels a side; pad it, or set padding"):
            unet(torch.empty(1, 1, 187, 572))


@pytest.mark.parametrize("block", ["plain", "residual"])
@pytest.mark.parametrize("blocks_per_stage", [1, 2])
@pytest.mark.parametrize("downsample", ["max_pool", "conv"])
def test_output_size_of_unpadded_networks_is_what_forward_gives(block, blocks_per_stage, downsample):
    unet = small(padding="valid", block=block, blocks_per_stage=blocks_per_stage, downsample=downsample, norm="none")
    smallest = unet.smallest_side
    for height, width in [(smallest, smallest), (smallest + 1, smallest + 7)]:
        out = unet(torch.randn(1, 1, height, width), 0).sample
        assert tuple(out.shape[-2:]) == unet.output_size(height, width)


def test_ronneberger_initialisation_keeps_the_scale_of_the_signal():
    """He et al. 2015: with variance 2 / fan-in and ReLU the second moment stays the same through the layers."""
    unet = UNet.from_preset("ronneberger-2015", channels=(64, 128, 256), attention=(False,) * 3).eval()
    x = torch.randn(1, 1, 92, 92)
    power = []
    for conv in [unet.encoder[0].blocks.blocks[0].conv1, unet.encoder[0].blocks.blocks[0].conv2]:
        x = conv(x)
        power.append(x.square().mean().item())
        x = x.relu()
    assert power[0] == pytest.approx(2.0, rel=0.35)  # one input channel: 9 taps, so the weights' own spread shows
    assert power[1] == pytest.approx(power[0], rel=0.15)


def test_two_dropouts_end_the_contracting_path_of_plain_networks():
    unet = UNet.from_preset("ronneberger-2015", channels=(4, 8, 16, 32), attention=(False,) * 4)
    rates = {name: m.p for name, m in unet.named_modules() if isinstance(m, nn.Dropout)}
    assert [name.split(".blocks")[0] for name, rate in rates.items() if rate > 0] == ["encoder.2", "bridge"]


# --- sizes and channels ---


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "options", [{}, {"downsample": "conv", "upsample": "nearest", "block": "plain", "norm": "none"}]
)
def test_every_size_and_channel_count_passes_forward_and_backward(channels, options):
    unet = small(in_channels=channels, out_channels=channels, channels=(8, 16, 16), **options)
    for size in [(1, 1), (1, 2), (3, 1), (7, 9), (15, 16), (31, 33), (67, 129)]:
        x = torch.randn(1, channels, *size)
        out = unet(x, 5).sample
        assert out.shape == x.shape
        unet.zero_grad()
        (out - 1).square().mean().backward()
        assert unet.noise_head.weight.grad.isfinite().all()


@settings(deadline=None, max_examples=25)
@given(height=st.integers(1, 67), width=st.integers(1, 129), batch=st.integers(1, 3))
def test_any_size_comes_back(height, width, batch):
    x = torch.randn(batch, 1, height, width)
    assert small()(x, 3).sample.shape == x.shape


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 5), (1, 1)])
def test_pooling_rounds_up_as_ceil_mode_does(size):
    x = torch.randn(2, 8, *size, requires_grad=True)
    ours, expected = small().encoder[0].downsample(x), nn.MaxPool2d(2, ceil_mode=True)(x)
    assert torch.equal(ours, expected)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((pooled * weight).sum(), x)[0] for pooled in (ours, expected)]
    assert torch.equal(*gradients)


def test_odd_sizes_stay_aligned_with_the_image():
    """One row and column of zeros more change nothing away from that edge."""
    unet = randomised(small(norm="none", attention=(False, False))).eval()
    x = torch.randn(1, 1, 32, 32)
    odd = torch.zeros(1, 1, 33, 33)
    odd[..., :32, :32] = x
    torch.testing.assert_close(unet(odd, 1).sample[..., :16, :16], unet(x, 1).sample[..., :16, :16])


def test_an_untrained_network_predicts_something_small():
    """Not zero, with which nothing but the noise head would learn in the first step."""
    for block in ("residual", "plain"):
        unet = small(block=block)
        prediction = unet(torch.randn(4, 1, 16, 16), 1).sample
        assert 0.1 < prediction.square().mean().sqrt() < 1
        prediction.square().mean().backward()
        assert unet.time_embed is not None and unet.decoder[-1].blocks.blocks[0].conv2.weight.grad.abs().max() > 0


def test_every_parameter_gets_a_gradient():
    unet = small(num_classes=3, num_class_embeds=4, label_dropout=0.1)
    x, labels = torch.randn(2, 1, 16, 16), torch.tensor([0, 3])
    randomised(unet)
    output = unet(x, 1, labels, head="both")
    (output.sample.square().mean() + output.logits.square().mean()).backward()
    assert [name for name, parameter in unet.named_parameters() if parameter.grad is None] == []


# --- timesteps and classes ---


@pytest.mark.parametrize(
    "timestep",
    [
        7,
        7.0,
        torch.tensor(7),
        torch.tensor([7]),
        torch.tensor([7, 7]),
        torch.tensor([7, 7], dtype=torch.int32),
        torch.tensor(7.0, dtype=torch.float64),
        torch.tensor([7.0], dtype=torch.float32),
    ],
    ids=repr,
)
def test_every_form_of_a_timestep_means_the_same(timestep):
    unet = randomised(small())
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(unet(x, timestep).sample, unet(x, torch.tensor([7, 7])).sample, rtol=0, atol=0)


def test_a_fractional_timestep_is_not_truncated():
    unet = randomised(small())
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(unet(x, 0.5).sample, unet(x, 0).sample)


def test_fourier_embedding_takes_noise_levels_down_to_zero():
    unet = randomised(small(time_embedding="fourier"))
    x = torch.randn(1, 1, 8, 8)
    assert unet(x, 0.0).sample.isfinite().all()
    assert not torch.equal(unet(x, 0.5).sample, unet(x, 50.0).sample)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_class_labels_may_be_integers_of_any_width(dtype):
    unet, x, labels = small(num_class_embeds=4), torch.randn(2, 1, 16, 16), torch.tensor([3, 1])
    randomised(unet)
    assert torch.equal(unet(x, 1, labels.to(dtype)).sample, unet(x, 1, labels).sample)


def test_missing_class_means_the_null_class_where_label_dropout_trained_it():
    unet = randomised(small(num_class_embeds=3, label_dropout=0.1))
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(unet(x, 1).sample, unet(x, 1, torch.tensor([3, 3])).sample, rtol=0, atol=0)
    with pytest.raises(ValueError, match="label_dropout is 0"):
        small(num_class_embeds=3)(x, 1)
    with pytest.raises(ValueError, match="num_class_embeds is None"):
        small()(x, 1, torch.tensor([0, 1]))


# --- heads ---


def test_segmentation_head_is_added_beside_the_noise_head():
    unet = small()
    before = set(unet.state_dict())
    assert unet.to_segmentation(num_classes=3) is unet
    assert set(unet.state_dict()) - before == {"segmentation_head.weight", "segmentation_head.bias"}
    assert unet.config.num_classes == 3
    x = torch.randn(2, 1, 9, 7)
    assert unet(x).logits.shape == (2, 3, 9, 7)
    assert unet(x, 5, head="noise").sample.shape == (2, 1, 9, 7)
    assert unet(x, 5, head="both").keys() == {"sample": 0, "logits": 0}.keys()
    assert unet.to_diffusion()(x, 5).keys() == {"sample": 0}.keys()


def test_segmentation_runs_at_its_configured_timestep():
    unet = randomised(small(num_classes=2, segmentation_timestep=40))
    x = torch.randn(1, 1, 8, 8)
    expected = unet(x, 40, head="segmentation").logits
    torch.testing.assert_close(unet(x, head="segmentation").logits, expected, rtol=0, atol=0)


def test_another_number_of_classes_needs_replace():
    unet = small(num_classes=2)
    with pytest.raises(ValueError, match="replace=True"):
        unet.to_segmentation(3)
    assert unet.to_segmentation(3, replace=True)(torch.zeros(1, 1, 8, 8)).logits.shape[1] == 3
    with pytest.raises(ValueError, match="number of classes"):
        small().to_segmentation()


def test_instances_add_two_channels_and_leave_the_classes_bit_for_bit(tmp_path):
    unet = randomised(small(num_classes=3))
    x = torch.randn(2, 1, 9, 7)
    classes, weights = unet(x, head="segmentation").logits, unet.state_dict()
    unet.to_segmentation(instances=True)
    assert unet.state_dict().keys() - weights == {"instance_head.weight", "instance_head.bias"}
    logits = unet(x).logits
    assert logits.shape == (2, 5, 9, 7) and torch.equal(logits[:, :3], classes)
    assert torch.equal(unet.to_segmentation()(x).logits, logits)  # calls that do not mention them keep them
    unet.register_to_config(object_diameter=12.5, object_min_area=7)
    unet.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert (loaded.config.num_classes, loaded.config.instances) == (3, True)
    assert (loaded.config.object_diameter, loaded.config.object_min_area) == (12.5, 7)
    assert torch.equal(loaded(x, head="segmentation").logits, logits)
    unet.to_segmentation(3, instances=False)
    assert unet.state_dict().keys() == weights.keys() and torch.equal(unet(x).logits, classes)
    assert (unet.config.instances, unet.config.object_diameter, unet.config.object_min_area) == (False, None, None)


def test_a_first_head_can_have_instances_and_a_replaced_one_keeps_them():
    unet = small().to_segmentation(2, instances=True)
    assert unet(torch.zeros(1, 1, 8, 8)).logits.shape[1] == 4
    assert unet.to_segmentation(3, replace=True)(torch.zeros(1, 1, 8, 8)).logits.shape[1] == 5
    assert unet(torch.zeros(1, 1, 8, 8), 5, head="both").logits.shape[1] == 5


def test_new_head_takes_the_trunks_dtype():
    unet = small().to(torch.bfloat16).to_segmentation(2)
    assert unet(torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)).logits.dtype == torch.bfloat16


def test_active_head_is_not_saved(tmp_path):
    small().to_segmentation(2).save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.active_head == "noise"
    assert loaded.config.num_classes == 2
    assert loaded.to_segmentation()(torch.zeros(1, 1, 8, 8)).logits.shape[1] == 2


def test_a_network_without_noise_head_segments_and_says_so():
    unet = small(out_channels=None, num_classes=2, time_embedding=None)
    assert unet(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="no noise head"):
        unet.to_diffusion()
    with pytest.raises(ValueError, match="time_embedding is None"):
        unet(torch.zeros(1, 1, 8, 8), 3)


def test_a_noise_head_without_timestep_embedding_predicts_without_a_timestep():
    unet = randomised(small(time_embedding=None))
    assert unet(torch.zeros(2, 1, 9, 8)).sample.shape == (2, 1, 9, 8)
    with pytest.raises(ValueError, match="the network takes none"):
        unet(torch.zeros(2, 1, 9, 8), 5)


def test_features_have_the_channels_and_strides_that_are_stated():
    unet = small(channels=(8, 16, 24))
    features = unet(torch.zeros(1, 1, 32, 16), head="features").features
    seen = [{"channels": feature.shape[1], "stride": 32 // feature.shape[2]} for feature in features]
    assert seen == unet.feature_info
    assert unet.feature_info[-1]["stride"] == 1


def test_tuple_output_holds_what_the_dataclass_holds():
    unet = small(num_classes=2)
    x = torch.zeros(1, 1, 8, 8)
    sample, logits = unet(x, 0, return_dict=False, head="both")
    assert isinstance(unet(x, 0), UNetOutput)
    assert sample.shape[1] == 1 and logits.shape[1] == 2


# --- config ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": (8,)}, "channels"),
        ({"channels": (8, 0)}, "channels"),
        ({"channels": (8, 1)}, "channels"),
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": -1}, "out_channels"),
        ({"out_channels": None}, "num_classes"),
        ({"blocks_per_stage": 0}, "blocks_per_stage"),
        ({"blocks_per_stage": True}, "blocks_per_stage"),
        ({"sample_size": 0}, "sample_size"),
        ({"sample_size": (8, 8, 8)}, "sample_size"),
        ({"attention": (True,)}, "attention.*2"),
        ({"attention": (0, 1)}, "attention"),
        ({"attention": True}, "attention is True"),
        ({"channels": 64}, "channels is 64"),
        ({"sample_size": "64"}, "sample_size is '64'"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"head_channels": 5}, "head_channels.*16"),
        ({"block": "dense"}, "'residual', 'plain'"),
        ({"norm": "layer"}, "'group', 'batch', 'none'"),
        ({"activation": "gelu"}, "activation"),
        ({"padding": "reflect"}, "padding"),
        ({"downsample": "avg"}, "downsample"),
        ({"upsample": "bilinear"}, "upsample"),
        ({"time_embedding": "typo"}, "time_embedding"),
        ({"dropout": 1.0}, "dropout"),
        ({"label_dropout": 0.1}, "label_dropout.*num_class_embeds"),
        ({"num_class_embeds": 0}, "num_class_embeds"),
        ({"num_classes": 1}, "num_classes.*at least 2"),
        ({"time_embedding": None, "num_class_embeds": 2}, "num_class_embeds"),
        ({"time_embedding": None, "segmentation_timestep": 5}, "segmentation_timestep"),
        ({"segmentation_timestep": -1}, "segmentation_timestep"),
        ({"instances": True}, "instances is True, but needs a segmentation head; set num_classes too"),
        ({"instances": 1, "num_classes": 2}, "instances is 1, but must be True or False"),
        ({"object_diameter": 0}, "object_diameter"),
        ({"object_min_area": 2.5}, "object_min_area is 2.5, but must be a whole number of pixels of at least 1"),
    ],
)
def test_wrong_config_values_are_refused_with_value_and_rule(wrong, message):
    with pytest.raises(ValueError, match=message):
        small(**wrong)


@pytest.mark.parametrize("size", [(1, 2, 8, 8), (1, 8, 8)])
def test_wrong_sample_shapes_are_refused(size):
    with pytest.raises(ValueError, match=r"must be \(batch, 1, height, width\)"):
        small()(torch.zeros(size), 0)


def test_preset_facts():
    expected = {"ddpm-32": 35.7e6, "small-32": 9e6}
    with torch.device("meta"):
        for name, parameters in expected.items():
            assert count(UNet.from_preset(name)) == pytest.approx(parameters, rel=0.02)
        assert UNet.from_preset("ronneberger-2015-ddpm")(torch.empty(1, 3, 33, 31), 0).sample.shape == (1, 3, 33, 31)
    with pytest.raises(ValueError, match="ronneberger-2015"):
        UNet.from_preset("unet")
    with pytest.raises(ValueError, match="no config value 'width'"):
        UNet.from_preset("tiny", width=3)


def test_state_dict_keys_of_tiny_are_the_checkpoint_format():
    unet = UNet.from_preset("tiny", num_classes=2, num_class_embeds=2)
    residual = ["norm1", "conv1", "norm2", "scale_shift.linear", "conv2"]
    blocks = {
        "encoder.0.blocks.blocks.0": residual,
        "encoder.1.blocks.blocks.0": [*residual, "shortcut.1"],
        "bridge.blocks.0": [*residual, "shortcut.1"],
        "decoder.0.blocks.blocks.0": [*residual, "shortcut.1"],
        "decoder.1.blocks.blocks.0": [*residual, "shortcut.1"],
    }
    layers = [f"{block}.{layer}" for block, inner in blocks.items() for layer in inner]
    layers += [f"bridge.attentions.0.{name}" for name in ("norm", "to_q", "to_k", "to_v", "to_out.0")]
    layers += ["decoder.0.upsample.0", "decoder.1.upsample.0", "stem", "time_embed.linear_1", "time_embed.linear_2"]
    layers += ["norm_out", "noise_head", "segmentation_head"]
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")} | {"time_embed.classes.weight"}
    assert set(unet.state_dict()) == expected


def test_state_dict_names_every_tensor_once():
    weights = UNet.from_preset("tiny").state_dict()
    assert len({w.data_ptr() for w in weights.values()}) == len(weights)


def test_no_config_key_is_a_submodule():
    unet = small(num_classes=2)
    assert not set(unet.config) & {name for name, _ in unet.named_children()}


def test_saved_network_loads_with_equal_output(tmp_path):
    unet = randomised(small(num_classes=2))
    unet.save_pretrained(tmp_path)
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(UNet.from_pretrained(tmp_path)(x, 3).sample, unet(x, 3).sample, rtol=0, atol=0)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet"


# --- training aids ---


def test_gradient_checkpointing_gives_equal_gradients():
    plain, checkpointed = small(), small()
    checkpointed.load_state_dict(randomised(plain).state_dict())
    checkpointed.enable_gradient_checkpointing()
    x = torch.randn(2, 1, 8, 8)
    for unet in (plain, checkpointed):
        unet(x, 3).sample.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_dropout_acts_in_training_only():
    unet = randomised(small(dropout=0.5))
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(unet(x, 1).sample, unet(x, 1).sample)
    unet.eval()
    assert torch.equal(unet(x, 1).sample, unet(x, 1).sample)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("block", ["residual", "plain"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_every_combination_of_block_options_learns(norm, block, activation):
    """A few steps of gradient descent lower the loss of a fixed batch."""
    unet = small(norm=norm, block=block, activation=activation)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    x, target = torch.randn(2, 2, 1, 8, 8)
    losses = []
    for _ in range(8):
        loss = (unet(x, 3).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
