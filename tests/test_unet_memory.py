"""Diffusers' ways to save memory and to choose attention kernels, with the network."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from tests.support import tiny
from tests.support.layouts import count_other_layouts, group_norm_like_cuda
from unet_diffusion import UNet
from unet_diffusion.network.attention import SelfAttention, SelfAttentionProcessor


def network(**config) -> UNet:
    """A tiny network with attention at both resolutions."""
    return tiny.network(**{"in_channels": 3, "out_channels": 3, "attention": (True, True), **config})


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 15 * 12).reshape(2, 3, 15, 12).to(dtype)


@torch.no_grad()
def prediction(unet: UNet, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return unet(images(dtype), 5).sample


def saved_bytes(unet: UNet) -> int:
    """Bytes of the activations that a forward keeps for its backward."""
    sizes = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = unet(images(), 5).sample  # kept alive, so that no address is used twice
    assert output.requires_grad
    return sum(sizes.values())


def test_gradient_checkpointing_keeps_less_than_half_of_the_activations():
    unet = network(blocks_per_stage=2).train()
    everything = saved_bytes(unet)
    unet.enable_gradient_checkpointing()
    assert saved_bytes(unet) < 0.5 * everything
    unet.disable_gradient_checkpointing()
    assert saved_bytes(unet) == everything


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"time_embedding": "fourier"}, {"block": "plain", "norm": "none"}])
def test_half_precision_weights_predict_in_half_precision(dtype, options):
    unet = network(**options)
    expected = prediction(unet)
    half = prediction(unet.to(dtype), dtype)
    assert half.dtype == dtype
    error = (half.float() - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(dtype).eps  # some twenty roundings in a row, at random signs


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float16])
def test_layerwise_casting_stores_small_and_computes_large(storage):
    unet = network()
    expected = prediction(unet)
    footprint = unet.get_memory_footprint()
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    norms = [p for m in unet.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()]
    assert unet.stem.weight.dtype == storage and {p.dtype for p in norms} == {torch.float32}
    assert unet.get_memory_footprint() < 0.7 * footprint
    output = prediction(unet)
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 16 * torch.finfo(storage).eps * expected.norm()


@pytest.mark.parametrize("instances", [False, True])
def test_a_head_that_is_added_later_computes_in_the_dtype_of_the_layers(instances):
    unet = network()
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    unet.to_segmentation(3, instances=instances)
    logits = unet(images(), 5).logits
    assert logits.dtype == unet.segmentation_head.weight.dtype == torch.float32
    assert network().to(torch.bfloat16).to_segmentation(3).segmentation_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_group_offload_changes_no_value(tmp_path, options, to_disk, gradients):
    """The hooks run here from the CPU to the CPU; on an accelerator the same ones move the weights."""
    unet = network()
    expected = prediction(unet)
    folder = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    unet.enable_group_offload(torch.device("cpu"), **options, **folder)
    assert bool(list(tmp_path.glob("*.safetensors"))) == to_disk
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(unet(images(), 5).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradients", [False, True])
def test_offloading_by_accelerate_changes_no_value(gradients):
    unet = network()
    expected = prediction(unet)
    cpu_offload(unet, torch.device("cpu"))
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(unet(images(), 5).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_group_offload_with_a_stream_changes_no_value():
    unet = network()
    expected = prediction(unet)
    unet.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    with torch.no_grad():
        torch.testing.assert_close(unet(images().cuda(), 5).sample.cpu(), expected, rtol=0, atol=1e-4)


def test_attention_backends_agree_and_are_set_by_name_or_context():
    unet = network()
    expected = prediction(unet)
    with attention_backend("_native_math"):
        by_context = prediction(unet)
    unet.set_attention_backend("_native_math")
    by_name = prediction(unet)
    unet.reset_attention_backend()
    assert torch.equal(by_name, by_context)
    torch.testing.assert_close(by_name, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="backend"):
        unet.set_attention_backend("abacus")


def test_fused_projections_predict_the_same_and_come_apart_again():
    unet = network()
    expected, keys = prediction(unet), set(unet.state_dict())
    unet.fuse_qkv_projections()
    assert all(module.fused_projections for module in unet.modules() if isinstance(module, SelfAttention))
    torch.testing.assert_close(prediction(unet), expected, rtol=0, atol=1e-5)
    unet.unfuse_qkv_projections()
    assert torch.equal(prediction(unet), expected) and set(unet.state_dict()) == keys


def test_projections_keep_what_they_have_learnt_while_they_were_fused():
    unet = network().train()
    unet.fuse_qkv_projections()
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.5)
    before = prediction(unet)
    unet(torch.randn(2, 3, 8, 8), 3).sample.square().mean().backward()
    optimizer.step()
    learnt = prediction(unet)
    assert (learnt - before).abs().max() > 1e-2
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(prediction(unet), learnt, rtol=0, atol=1e-5)


def test_attention_processors_can_be_replaced():
    class Uniform(SelfAttentionProcessor):
        """Attends to all positions equally."""

        def __call__(self, attention, tokens):
            value = attention.to_v(tokens).mean(dim=1, keepdim=True).expand_as(tokens)
            return attention.to_out[0](value)

    unet = network()
    expected = prediction(unet)
    assert {type(processor) for processor in unet.attn_processors.values()} == {SelfAttentionProcessor}
    unet.set_attn_processor(Uniform())
    assert not torch.equal(prediction(unet), expected)
    unet.set_attn_processor({name: SelfAttentionProcessor() for name in unet.attn_processors})
    assert torch.equal(prediction(unet), expected)


NETWORKS = [{}, {"downsample": "conv", "upsample": "nearest"}, {"block": "plain"}, {"padding": "valid"}]


@pytest.mark.parametrize("options", NETWORKS)
@pytest.mark.parametrize("like_cuda", [False, True])
def test_the_maps_of_all_layers_have_their_channels_last(options, like_cuda, monkeypatch):
    if like_cuda:
        group_norm_like_cuda(monkeypatch)
    unet = network(channels=(16, 32), num_classes=2, **options).to(memory_format=torch.channels_last)
    others = count_other_layouts(unet)
    sample = torch.randn(2, 3, 29, 26).contiguous(memory_format=torch.channels_last)
    unet(sample, 3, head="both")
    assert others and not others.total(), others
