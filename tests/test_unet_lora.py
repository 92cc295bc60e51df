"""LoRA through diffusers' adapter interface."""

import pytest
import torch

from tests.support.tiny import network, prediction

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install 'unet-diffusion[dev]'")

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def test_lora_is_added_trained_saved_loaded_and_fused(tmp_path):
    unet = network()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    untrained = prediction(unet)

    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=LAYERS))
    assert torch.equal(prediction(unet), untrained)  # the second factor starts at zero
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)

    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(2, 2, 1, 8, 8)
    losses = []
    for _ in range(6):
        loss = (unet(x, 3).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = prediction(unet)
    for name, weight in unet.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")])

    unet.save_lora_adapter(tmp_path)
    other = network()
    other.load_state_dict(before)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(prediction(other), trained)

    other.fuse_lora()
    layers = [m for m in other.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert layers and all(layer.merged for layer in layers)  # the weights themselves hold it now
    torch.testing.assert_close(prediction(other), trained, rtol=0, atol=1e-5)
    other.unfuse_lora()
    other.unload_lora()
    assert set(other.state_dict()) == set(before)
    torch.testing.assert_close(prediction(other), untrained, rtol=0, atol=1e-5)


def test_several_adapters_are_switched_and_deleted():
    unet = network()
    plain = prediction(unet)
    for name in ("first", "second"):
        config = peft.LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapter("first")
    first = prediction(unet)
    unet.set_adapter("second")
    assert unet.active_adapters() == ["second"] and not torch.equal(prediction(unet), first)
    unet.delete_adapters("second")
    unet.set_adapter("first")
    assert torch.equal(prediction(unet), first)
    unet.disable_adapters()
    assert torch.equal(prediction(unet), plain)


def test_projections_with_lora_are_fused_after_the_lora_is_in_the_weights():
    """The fused layer would be without it."""
    unet = network()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    expected = prediction(unet)
    with pytest.raises(ValueError, match=r"to_k is a peft\..*Linear, .* call unload_lora\(\) first, and fuse_lora\(\)"):
        unet.fuse_qkv_projections()
    assert torch.equal(prediction(unet), expected)
    unet.fuse_lora()
    unet.unload_lora()
    for change in (unet.fuse_qkv_projections, unet.unfuse_qkv_projections):
        change()
        torch.testing.assert_close(prediction(unet), expected, rtol=0, atol=1e-5)


def test_lora_of_fused_projections_is_not_lost_when_they_come_apart():
    unet = network()
    unet.fuse_qkv_projections()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_qkv"], init_lora_weights=False))
    expected = prediction(unet)
    with pytest.raises(ValueError, match=r"to_qkv is a peft\..*Linear, .* call unload_lora\(\) first"):
        unet.unfuse_qkv_projections()
    unet.fuse_lora()
    unet.unload_lora()
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(prediction(unet), expected, rtol=0, atol=1e-5)
