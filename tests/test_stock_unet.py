"""Stock networks of diffusers with our interface: bit-equal noise, masks of any size, and saving."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from tests.support.stock import DDPM, KINDS, SMALL, stock
from unet_diffusion import UNet, adapters
from unet_diffusion.network.tiling import ATTENDED, Tiling
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.stock_unet import UNET_KEYS, UNet2DAdapter
from unet_diffusion.tasks.segmentation import LEARN, freeze

CLASSES = {"num_class_embeds": 5}
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapter(kind: str = "ddpm", num_classes: int = 3, **changes) -> UNet2DAdapter:
    """With a segmentation head, and at a noise level where the network takes its logarithm."""
    network = UNet2DAdapter.from_stock(stock(kind, **changes)).to_segmentation(num_classes)
    if kind == "fourier":
        network.register_to_config(segmentation_timestep=0.5)
    return network


def labels_for(network, batch: int = 2) -> dict[str, torch.Tensor]:
    return {} if network.config.num_class_embeds is None else {"class_labels": torch.arange(batch)}


# --- what it computes ---


@every_kind
@pytest.mark.parametrize(
    "timestep", [7, torch.tensor(981), torch.tensor([3]), torch.tensor([1, 999]), torch.tensor([2.0, 44.0])]
)
@torch.no_grad()
def test_noise_is_bit_for_bit_that_of_the_stock_model(kind, timestep):
    if kind == "learned" and torch.is_tensor(timestep):
        timestep = timestep.long()  # the stock model looks it up in a table
    reference = stock(kind)
    network = UNet2DAdapter.from_stock(reference).to_segmentation(3).to_diffusion()
    sample = torch.randn(2, 1, 16, 24)
    for given in (sample, sample.contiguous(memory_format=torch.channels_last)):
        expected = reference(given, timestep, **labels_for(reference)).sample
        assert torch.equal(network(given, timestep, **labels_for(reference)).sample, expected)
        both = network(given, timestep, **labels_for(reference), head="both", return_dict=False)
        assert torch.equal(both[0], expected) and both[1].shape == (2, 3, 16, 24)


@every_kind
@torch.no_grad()
def test_masks_and_features_are_read_off_the_maps_of_the_stock_model(kind):
    """Hooks in the stock model catch these maps; the adapter needs no hooks."""
    reference = stock(kind, center_input_sample=False)
    network = UNet2DAdapter.from_stock(reference).to_segmentation(3)
    seen: list[torch.Tensor] = []
    for block in reference.up_blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reference.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    sample, labels = torch.randn(2, 1, 16, 16), labels_for(reference)
    reference(sample, 5, **labels)
    *maps, last = seen
    assert torch.equal(network(sample, 5, **labels).logits, network.segmentation_head(last))
    found = network(sample, 5, **labels, head="features").features
    assert len(found) == len(maps) and all(torch.equal(one, other) for one, other in zip(found, maps))
    info = [{"channels": x.shape[1], "stride": 16 // x.shape[2]} for x in maps]
    assert network.feature_info == info


@every_kind
@pytest.mark.parametrize("size", [(1, 1), (5, 14), (16, 3)])
@torch.no_grad()
def test_images_of_any_size_are_continued_by_their_mirror_image(kind, size):
    network = adapter(kind).eval()
    sample = torch.randn(2, 1, *size)
    stride = network.stride
    ends = [(0, 0), (0, 0), *((0, -side % stride) for side in size)]
    whole = torch.from_numpy(np.pad(sample.numpy(), ends, mode="reflect"))
    logits = network(sample).logits
    assert logits.shape == (2, 3, *size)
    assert torch.equal(logits, network(whole).logits[..., : size[0], : size[1]])
    for info, x, y in zip(
        network.feature_info, network(sample, 5, head="features").features, network(whole, 5, head="features").features
    ):
        height, width = (-(-side // info["stride"]) for side in size)
        assert x.shape == (2, info["channels"], height, width)
        assert torch.equal(x, y[..., :height, :width])


def test_noise_at_other_sizes_is_refused():
    network = adapter()
    for head in ("noise", "both"):
        with pytest.raises(ValueError, match="sample is 16x18 .* at multiples of 4 pixels only; resize or crop it"):
            network(torch.zeros(1, 1, 16, 18), 5, head=head)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_class_labels_are_integers_of_any_width(dtype):
    reference = stock(**CLASSES)
    sample, labels = torch.randn(3, 1, 16, 16), torch.tensor([1, 0, 4])
    network = UNet2DAdapter.from_stock(reference).eval()
    expected = reference(sample, 5, labels).sample
    assert torch.equal(network(sample, 5, labels.to(dtype)).sample, expected)
    assert torch.equal(network(sample, 5, labels.tolist()).sample, expected)


@pytest.mark.parametrize("label", [-1, 6])
def test_class_labels_that_do_not_exist_are_refused(label):
    network = UNet2DAdapter.from_stock(stock(**CLASSES))
    with pytest.raises(IndexError):
        network(torch.zeros(1, 1, 16, 16), 5, torch.tensor([label]))
    for labels in (torch.tensor([True]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="class_labels hold torch.(bool|float32), but must be integers"):
            network(torch.zeros(1, 1, 16, 16), 5, labels)


@torch.no_grad()
def test_masks_of_a_class_conditional_network_see_the_mean_class():
    reference = stock(**CLASSES)
    network = UNet2DAdapter.from_stock(reference).to_segmentation(3)
    sample = torch.randn(2, 1, 16, 16)
    with pytest.raises(ValueError, match="class_labels are missing"):
        network(sample, 5, head="noise")
    rows = reference.class_embedding.weight
    rows.copy_(rows.mean(dim=0).expand_as(rows))
    same = UNet2DAdapter.from_stock(reference).to_segmentation(3)
    same.segmentation_head.load_state_dict(network.segmentation_head.state_dict())
    expected = same(sample, class_labels=torch.tensor([4, 1])).logits
    torch.testing.assert_close(network(sample).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(sample, class_labels=torch.tensor([4, 1])).logits, expected)


@torch.no_grad()
def test_a_noise_level_whose_logarithm_is_taken_must_not_be_zero():
    network = UNet2DAdapter.from_stock(stock("fourier")).to_segmentation(2)
    sample = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="segmentation_timestep is 0, but this network takes the logarithm"):
        network(sample)
    expected = network(sample, 0.25).logits
    network.register_to_config(segmentation_timestep=0.25)
    assert torch.equal(network(sample).logits, expected) and expected.isfinite().all()


@torch.no_grad()
def test_half_precision_is_kept():
    reference = stock().to(torch.bfloat16)
    network = UNet2DAdapter.from_stock(reference).to_segmentation(3)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    sample = torch.randn(1, 1, 16, 16, dtype=torch.bfloat16)
    assert torch.equal(network(sample, 3, head="noise").sample, reference(sample, 3).sample)
    assert network(sample).logits.dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_gradient():
    network = adapter().train()
    sample = torch.randn(2, 1, 16, 16)
    network(sample).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    network(sample).logits.square().mean().backward()
    for name, parameter in network.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_the_parts_that_diffusers_places_and_compiles_are_there():
    network = adapter()
    kinds = {type(module).__name__ for module in network.modules()}
    assert {*network._repeated_blocks, *network._no_split_modules} <= kinds


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_whole_and_block_by_block():
    network = adapter(**SMALL).eval()
    sample = torch.randn(2, 1, 12, 16)
    noise, logits = network(sample, 5, head="noise").sample, network(sample).logits
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sample, 5, head="noise").sample, noise)
    torch.testing.assert_close(compiled(sample).logits, logits)
    network.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(network(sample).logits, logits)


# --- there and back ---


@every_kind
def test_there_and_back_gives_the_same_keys_weights_and_config(kind):
    before = stock(kind)
    network = UNet2DAdapter.from_stock(before)
    after = network.to_segmentation(3).to_stock()
    assert type(after) is UNet2DModel and not after.training
    one, other = before.state_dict(), after.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert len(network.state_dict()) == len(one) + 2  # and the segmentation head
    assert not {x.data_ptr() for x in one.values()} & {x.data_ptr() for x in network.state_dict().values()}
    public = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (before, after)]
    assert public[0] == public[1]


@every_kind
@torch.no_grad()
def test_a_saved_adapter_loads_with_both_heads_and_without_a_warning(kind, tmp_path, capfd):
    network = adapter(kind).eval()
    network.register_to_config(sample_size=24)
    network.save_pretrained(tmp_path)
    loaded = UNet2DAdapter.from_pretrained(tmp_path)
    again = UNet2DAdapter.from_config(network.config)
    assert capfd.readouterr().err == ""
    assert loaded.active_head == "noise" and loaded.config.sample_size == 24 and not loaded.training
    assert again.config.num_classes == 3 and again.state_dict().keys() == network.state_dict().keys()
    sample = torch.randn(2, 1, 16, 16)
    assert torch.equal(loaded.to_segmentation()(sample).logits, network(sample).logits)
    expected = network(sample, 3, **labels_for(network), head="noise").sample
    assert torch.equal(loaded(sample, 3, **labels_for(network), head="noise").sample, expected)


def test_names_of_the_weights_are_those_of_a_unet():
    network = adapter(**CLASSES)
    parts = {name.split(".")[0] for name in network.state_dict()}
    ours = UNet(in_channels=1, out_channels=1, channels=(8, 16), head_channels=8, num_classes=3)
    assert parts == {name.split(".")[0] for name in ours.state_dict()}
    for name in ("noise_head.weight", "encoder.0.block.resnets.0.conv1.weight", "decoder.2.block.resnets.1.conv2.bias"):
        assert name in network.state_dict()
    assert {name for name, _ in network.named_children()} & set(network.config) == set()


def test_the_config_has_the_keys_that_are_read_of_a_unet():
    assert set(UNet().config) & UNET_KEYS == UNET_KEYS
    for kind, attention in (("ddpm", [False, True, True]), ("resnet", [False, True, True]), ("flat", [True])):
        config = adapter(kind).config
        assert config.attention == attention and config.padding == "same" and config.label_dropout == 0
        assert tuple(config.channels) == config.block_out_channels
    assert adapter("fourier").config.time_embedding == "fourier" and config.time_embedding == "sinusoidal"


def test_the_module_path_is_part_of_the_checkpoint_format():
    pipe = DDPMPipeline(adapter(), DDPMScheduler())
    assert pipe.config["unet"] == ("unet_diffusion.stock_unet", "UNet2DAdapter")
    assert adapters.UNet2DAdapter is UNet2DAdapter


def test_moving_averages_continue_from_a_folder(tmp_path):
    network = adapter()
    average = EMAModel(network.parameters(), model_cls=UNet2DAdapter, model_config=network.config)
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, UNet2DAdapter)
    assert all(torch.equal(x, y) for x, y in zip(loaded.shadow_params, network.parameters(), strict=True))


def test_heads_are_added_replaced_and_switched_as_in_a_unet():
    network = UNet2DAdapter.from_stock(stock())
    with pytest.raises(ValueError, match="no segmentation head yet"):
        network.to_segmentation()
    with pytest.raises(ValueError, match="num_classes is 1, but must be at least 2"):
        network.to_segmentation(1)
    head = network.to_segmentation(2).segmentation_head
    assert network.active_head == "segmentation" and network.to_segmentation(2).segmentation_head is head
    with pytest.raises(ValueError, match="has 2 classes; call to_segmentation.3, replace=True."):
        network.to_segmentation(3)
    assert network.to_segmentation(3, replace=True).segmentation_head.out_channels == 3
    assert network.config.num_classes == 3 and network.to_diffusion().active_head == "noise"
    assert UNet2DAdapter(num_classes=4, **DDPM).segmentation_head.out_channels == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D", "DownBlock2D")}, "down_block_types has 'SkipDown"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D", "SkipUpBlock2D")}, "up_block_types has 'SkipUpBlock2D'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep', but classes must be given by an index"),
        ({"segmentation_timestep": -1}, "segmentation_timestep is -1, but must be a finite number of at least 0"),
        ({"widths": (8, 16)}, "there is no config value 'widths'"),
    ],
)
def test_values_and_networks_that_are_not_a_plain_unet_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet2DAdapter(**{**DDPM, **changes})


def test_only_a_stock_network_becomes_an_adapter():
    for network in (UNet(channels=(4, 8), head_channels=8), adapter()):
        with pytest.raises(ValueError, match=f"the model is a {type(network).__name__}, .* use it as it is"):
            UNet2DAdapter.from_stock(network)


def test_a_stock_network_with_lora_or_fused_projections_becomes_no_adapter():
    peft = pytest.importorskip("peft")
    lora, fused = stock(), stock()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), lora)
    fused.mid_block.attentions[0].fuse_projections()
    for network, name in ((lora, "base_layer|lora"), (fused, "to_qkv")):
        with pytest.raises(ValueError, match=f"weights that a UNet2DModel lacks, such as .*({name}).*; load it again"):
            UNet2DAdapter.from_stock(network)


def test_a_network_with_lora_becomes_a_stock_one_after_the_lora_is_gone():
    peft = pytest.importorskip("peft")
    network = adapter()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"has an adapter, such as LoRA, .* call unload_lora\(\) first"):
        network.to_stock()
    network.fuse_lora()
    network.unload_lora()
    kept = network.to_stock().state_dict()["mid_block.attentions.0.to_q.weight"]
    assert torch.equal(kept, network.state_dict()["bridge.attentions.0.to_q.weight"])


# --- pipelines ---


def test_stock_pipelines_make_the_same_images():
    reference = stock()
    for pipeline in (DDPMPipeline, DDIMPipeline):
        images = []
        for network in (reference, UNet2DAdapter.from_stock(reference).to_segmentation(2).to_diffusion()):
            pipe = pipeline(network, DDPMScheduler())
            pipe.set_progress_bar_config(disable=True)
            images.append(pipe(generator=torch.manual_seed(0), num_inference_steps=3, output_type="np").images)
        assert np.array_equal(*images)


def test_tiles_start_at_multiples_of_the_stride_and_are_near_the_whole():
    network = adapter().eval()
    tiling = Tiling.of(network, 16)
    assert tiling.stride == network.stride == 4 and tiling.ramp > 0  # GroupNorm: windows are blended
    pipe = SegmentationPipeline(network)
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).integers(0, 256, (70, 61), dtype=np.uint8)
    whole, tiles = (pipe(image, output_type="np", tile_size=size).probabilities[0] for size in (None, 32))
    assert whole.shape == (3, 70, 61)
    assert np.abs(tiles - whole).mean() < 0.2 * np.abs(whole - whole.mean(axis=(1, 2), keepdims=True)).mean()


def test_chosen_tiles_are_limited_where_a_stock_network_attends():
    tiling = Tiling.of(adapter())  # attends at stride 2
    assert tiling.tile + tiling.shared <= 2 * ATTENDED
    assert Tiling.of(adapter("flat", down_block_types=("DownBlock2D",))).tile > 2 * ATTENDED


def test_attention_on_the_way_up_limits_tiles_too():
    down = {"down_block_types": ("DownBlock2D",) * 3, "add_attention": False}
    for up, stride in (
        (("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), 2),
        (("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"), 1),
    ):
        network = adapter(up_block_types=up, **down)
        assert network.config.attention == [stride == 1, stride == 2, False]
        tiling = Tiling.of(network)
        assert tiling.tile + tiling.shared <= stride * ATTENDED
    finer = adapter(up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"))  # than on the way down
    assert finer.config.attention == [True, True, True]
    image = np.zeros((20, 9), dtype=np.uint8)
    assert SegmentationPipeline(network.eval())(image, output_type="np").masks[0].shape == (20, 9)


# --- learning ---


@every_kind
@pytest.mark.parametrize("learn", LEARN)
def test_every_trainable_parameter_gets_a_gradient_and_the_noise_head_none(kind, learn):
    """So that processes agree on what they share; segmentation freezes a `UNet` by the same names."""
    network = adapter(kind)
    freeze(network, LEARN[learn])
    network(torch.randn(2, 1, 8, 8)).logits.square().mean().backward()
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("noise_head.") for name in learning)
    parts = {name.split(".")[0] for name in learning}
    trunk = {name.split(".")[0] for name, _ in network.named_parameters()} - {"noise_head"}
    expected = {"everything": trunk, "decoder": {"decoder", "norm_out", "segmentation_head"}}
    assert parts == expected.get(learn, {"segmentation_head"})


@torch.no_grad()
def test_a_stock_network_takes_the_channels_of_objects_and_keeps_its_classes(tmp_path):
    network = adapter().eval()
    sample = torch.randn(2, 1, 5, 14)
    classes = network(sample, head="segmentation").logits
    logits = network.to_segmentation(instances=True)(sample).logits
    assert logits.shape == (2, 5, 5, 14) and torch.equal(logits[:, :3], classes)
    network.register_to_config(object_diameter=9.0, object_min_area=4)
    network.save_pretrained(tmp_path)
    loaded = UNet2DAdapter.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, head="segmentation").logits, logits)
    assert (loaded.config.object_diameter, loaded.config.object_min_area) == (9, 4)
    assert torch.equal(network.to_segmentation(instances=False)(sample).logits, classes)
    with pytest.raises(ValueError, match="instances is True, but needs a segmentation head"):
        UNet2DAdapter(instances=True)
