"""Stock networks of diffusers as ours: bit-equal noise, masks of any size, and every way to learn and to be saved."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file

from unet_diffusion import UNet, adapters
from unet_diffusion.frozen_features_task import FrozenFeaturesConfig
from unet_diffusion.masked_data import MaskedDataConfig, load_masked
from unet_diffusion.metrics_log import read_metrics, series
from unet_diffusion.networks import load_unet
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.segment import Segment, segment
from unet_diffusion.segmentation_task import LEARN, SegmentationConfig, freeze
from unet_diffusion.stock_unet import WORDS_OF_UNET, UNet2DAdapter
from unet_diffusion.tiling import ATTENDED, Tiling
from unet_diffusion.train_segmentation import TrainSegmentation, make_task, train_segmentation
from unet_diffusion.training_config import TrainingConfig
from unet_diffusion.unlabelled import JointConfig

DDPM = {  # the config of google/ddpm-cifar10-32, narrower
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNET = {  # blocks and classes as in the consistency models of OpenAI
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 4,
    "num_class_embeds": 5,
}
CLASSES = {"num_class_embeds": 5}
SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
KINDS = {
    "ddpm": {},
    "resnet": RESNET,
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "bare": {"mid_block_type": None, "center_input_sample": True, "layers_per_block": 1},
    "flat": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def stock(kind: str = "ddpm", **changes) -> UNet2DModel:
    return UNet2DModel(**{**DDPM, **KINDS[kind], **changes}).eval()


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
    """Those are caught by hooks in the stock model, which the adapter does without."""
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
def test_pictures_of_any_size_are_continued_by_their_mirror_image(kind, size):
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
def test_a_saved_adapter_loads_with_both_heads_and_without_a_word(kind, tmp_path, capfd):
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


def test_the_config_says_what_is_asked_of_a_unet():
    assert set(UNet().config) & WORDS_OF_UNET == WORDS_OF_UNET
    for kind, attention in (("ddpm", [False, True, True]), ("resnet", [False, True, True]), ("flat", [True])):
        config = adapter(kind).config
        assert config.attention == attention and config.padding == "same" and config.label_dropout == 0
        assert tuple(config.channels) == config.block_out_channels
    assert adapter("fourier").config.time_embedding == "fourier" and config.time_embedding == "sinusoidal"


def test_the_module_path_is_part_of_the_checkpoint_format():
    pipe = DDPMPipeline(adapter(), DDPMScheduler())
    assert pipe.config["unet"] == ("unet_diffusion.stock_unet", "UNet2DAdapter")
    assert adapters.UNet2DAdapter is UNet2DAdapter


def test_a_saved_stock_model_is_not_mistaken_for_an_adapter(place):
    with pytest.raises(ValueError, match="this is a saved UNet2DModel.* UNet2DAdapter.from_stock"):
        UNet2DAdapter.from_pretrained(place / "stock", subfolder="unet")


def test_moving_averages_go_on_from_a_folder(tmp_path):
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
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep', but classes must be told by an index"),
        ({"segmentation_timestep": -1}, "segmentation_timestep is -1, but must be a number of at least 0"),
        ({"widths": (8, 16)}, "there is no config value 'widths'"),
    ],
)
def test_values_and_networks_that_are_no_plain_unet_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet2DAdapter(**{**DDPM, **changes})


# --- pipelines ---


def test_stock_pipelines_make_the_same_pictures():
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
    picture = np.random.default_rng(0).integers(0, 256, (70, 61), dtype=np.uint8)
    whole, tiles = (pipe(picture, output_type="np", tile_size=size).probabilities[0] for size in (None, 32))
    assert whole.shape == (3, 70, 61)
    assert np.abs(tiles - whole).mean() < 0.2 * np.abs(whole - whole.mean(axis=(1, 2), keepdims=True)).mean()


def test_chosen_tiles_are_limited_where_a_stock_network_attends():
    tiling = Tiling.of(adapter())  # attends at stride 2
    assert tiling.tile + tiling.shared <= 2 * ATTENDED
    assert Tiling.of(adapter("flat", down_block_types=("DownBlock2D",))).tile > 2 * ATTENDED


# --- learning ---


@every_kind
@pytest.mark.parametrize("learn", LEARN)
def test_all_that_learns_gets_a_gradient_and_the_noise_head_rests(kind, learn):
    """So that processes agree on what they share; the names are those that segmentation freezes a `UNet` by."""
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


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pictures of one bright square on dark noise, their masks, and a stock pipeline."""
    folder, random, side = tmp_path_factory.mktemp("place"), np.random.default_rng(0), 16
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(12):
        top, left = random.integers(0, side - 6, 2)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[top : top + 6, left : left + 6] = 1
        picture = (random.integers(0, 60, (side, side)) + 150 * mask).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{i:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i:02d}.png")
    torch.manual_seed(0)
    DDPMPipeline(stock(**SMALL), DDPMScheduler()).save_pretrained(folder / "stock")
    return folder


@pytest.fixture
def options(place, tmp_path) -> TrainSegmentation:
    return TrainSegmentation(
        data=MaskedDataConfig(
            data=str(place / "images"),
            masks=str(place / "masks"),
            validation_fraction=0.25,
            cache_dir=place / "cache",
        ),
        output=tmp_path / "run",
        model=str(place / "stock"),
        segmentation=SegmentationConfig(preview_pictures=2),
        augment=False,
        training=TrainingConfig(steps=2, batch_size=4, warmup_steps=1, log_every=2, validate_every=2, trackers=()),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_stock_pipeline_learns_to_segment_and_still_generates(options, place):
    options.training = replace(options.training, steps=60, learning_rate=1e-2, validate_every=60)
    run = train_segmentation(options)
    assert series(read_metrics(run / "metrics.jsonl"), "mean_iou")[1][-1] > 0.8
    before, after = weights(place / "stock"), weights(run)
    assert torch.equal(before["conv_out.weight"], after["noise_head.weight"])
    assert not torch.equal(before["conv_in.weight"], after["stem.weight"])

    pipe = SegmentationPipeline.from_pretrained(run)
    predicted = np.asarray(pipe(str(place / "images" / "00.png")).masks[0])
    assert (predicted == np.asarray(Image.open(place / "masks" / "00.png"))).mean() > 0.9
    masks = segment(Segment(run=run, inputs=(options.data.data,), output=run / "segmented"))
    assert len(list(masks.glob("*-overlay.png"))) == 12
    for pipeline in (DDPMPipeline, ImageGenerationPipeline):
        pipe = pipeline.from_pretrained(run)
        assert pipe(batch_size=2, num_inference_steps=2).images[0].size == (16, 16)

    again = load_unet(str(run), {"in_channels": 1})  # a run is a start as well
    assert isinstance(again, UNet2DAdapter) and again.config.num_classes == 2


def test_a_folder_of_the_hub_has_its_parts_at_the_root(options, place, tmp_path, capfd):
    """As google/ddpm-cifar10-32 does; a stock pipeline is read without a word."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for path in place.glob("stock/**/*.*"):
        (hub / path.name).write_bytes(path.read_bytes())
    joint = replace(options, model=str(hub), joint=JointConfig(denoising_weight=1.0))
    data = load_masked(options.data, 0)
    capfd.readouterr()
    task = make_task(joint, data)
    assert isinstance(task.network, UNet2DAdapter) and task.diffusion.config.prediction_type == "epsilon"
    assert "Expected types" not in capfd.readouterr().err


def test_a_saved_run_loads_in_another_process_without_a_word(place, tmp_path):
    network = load_unet(str(place / "stock"), {}).to_segmentation(2)
    SegmentationPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    code = f"""
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
for pipeline in (ImageGenerationPipeline, SegmentationPipeline):
    print(type(pipeline.from_pretrained({str(tmp_path)!r}).unet).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["UNet2DAdapter"] * 2, done.stderr
    said = [line for line in done.stderr.splitlines() if "Loading pipeline components" not in line and line.strip()]
    assert said == []


def test_a_pixel_classifier_reads_a_stock_network(options, place):
    learn = SegmentationConfig(learn="pixel_classifier", preview_pictures=2)
    run = train_segmentation(
        replace(options, segmentation=learn, frozen_features=FrozenFeaturesConfig((10, 100), hidden=(8,)))
    )
    pipe = SegmentationPipeline.from_pretrained(run)
    assert pipe.classifier.config.channels == [16, 8] and pipe.classifier.config.strides == [1, 1]
    expected = UNet2DAdapter.from_pretrained(run / "unet").to_stock().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(place / "stock").items())
    picture = np.zeros((7, 9), dtype=np.uint8)
    assert pipe(picture, output_type="np").masks[0].shape == (7, 9)


def test_both_heads_of_a_stock_network_learn_at_once(options, place):
    run = train_segmentation(replace(options, joint=JointConfig(denoising_weight=1.0)))
    before, after = weights(place / "stock"), weights(run)
    assert not torch.equal(before["conv_out.weight"], after["noise_head.weight"])
    assert json.loads((run / "config.json").read_text())["diffusion"]["prediction_type"] == "epsilon"
    assert ImageGenerationPipeline.from_pretrained(run)(num_inference_steps=2).images[0].size == (16, 16)


@torch.no_grad()
def test_weights_with_the_names_of_early_checkpoints_are_read(tmp_path):
    """The attention of google/ddpm-* is saved under names that diffusers translates."""
    reference = stock()
    reference.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    saved = load_file(path)
    for now, then in names.items():
        saved = {name.replace(f".{now}.", f".{then}."): tensor for name, tensor in saved.items()}
    assert saved.keys() != reference.state_dict().keys()
    save_file(saved, path, {"format": "pt"})
    sample = torch.randn(1, 1, 16, 16)
    assert torch.equal(load_unet(str(tmp_path), {})(sample, 3).sample, reference(sample, 3).sample)


def test_networks_of_other_classes_are_refused(place, tmp_path):
    folder = tmp_path / "unet"
    DDPMPipeline.from_pretrained(place / "stock").unet.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match="is a UNet2DConditionModel, but must be a UNet, or a UNet2DModel"):
        load_unet(str(folder), {})
    with pytest.raises(ValueError, match="in_channels is 3 .* but the network in .* has 1"):
        load_unet(str(place / "stock"), {"in_channels": 3})
