"""Diffusers' saving and loading, with the network: shards, variants, offloading, the Hub, old files."""

import json
import os
import shutil
from pathlib import Path

import diffusers.models.modeling_utils
import diffusers.utils.hub_utils
import pytest
import torch
from accelerate.utils import compute_module_sizes
from diffusers import AutoencoderKL, ControlNetModel, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from safetensors.torch import load_file

from tests.support.tiny import network, prediction
from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier, UNet2DAdapter
from unet_diffusion.evaluation.classifier import ImageClassifier
from unet_diffusion.saved_runs import load_unet

KEPT = Path(__file__).parent / "fixtures" / "unet-checkpoint"  # written by version 0.42.1 of diffusers, never again


@pytest.mark.parametrize("variant", [None, "ema"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_shards_and_variants_come_back(tmp_path, variant, max_shard_size):
    unet = network()
    unet.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "10GB"
    loaded = UNet.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(prediction(loaded), prediction(unet))


def test_a_variant_is_loaded_only_by_its_name(tmp_path):
    network().save_pretrained(tmp_path, variant="ema")
    with pytest.raises(OSError, match="no file named"):
        UNet.from_pretrained(tmp_path)


def test_fused_projections_must_come_apart_before_commands_load_the_network(tmp_path):
    unet = network()
    unet.fuse_qkv_projections()
    unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fused projections, .*; call unfuse_qkv_projections\(\) and save it again"):
        load_unet(str(tmp_path), {})
    unet.unfuse_qkv_projections()
    unet.save_pretrained(tmp_path)
    assert torch.equal(prediction(load_unet(str(tmp_path), {})), prediction(unet))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_load_in_the_dtype_asked_for(tmp_path, dtype):
    unet = network()
    unet.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    sample = torch.zeros(1, 1, 8, 8, dtype=dtype)
    assert loaded(sample, 3).sample.dtype == dtype  # the timestep embedding follows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_frequencies_of_noise_levels(tmp_path, dtype):
    """Rounded to 8 bits, frequencies up to 2 pi 3 would turn the features of the largest noise levels by 0.1."""
    unet = network(time_embedding="fourier")
    unet.save_pretrained(tmp_path)
    levels = torch.tensor([0.01, 3.0, 80.0])
    features = UNet.from_pretrained(tmp_path, dtype=dtype).time_embed.features
    assert features.frequencies.dtype == dtype and unet.time_embed.features.frequencies.std() > 0.5
    torch.testing.assert_close(features(levels), unet.time_embed.features(levels), atol=1e-4, rtol=0)


class Intruder:
    def __reduce__(self):
        return os.putenv, ("UNET_INTRUDER", "was here")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}, {"variant": "fp16"}])
def test_weights_that_are_not_safetensors_come_back(tmp_path, options):
    unet = network()
    unet.save_pretrained(tmp_path / "saved" / "unet", safe_serialization=False, **options)
    variant = options.get("variant")
    assert not list(tmp_path.rglob("*.safetensors"))
    for given in (None, False)["max_shard_size" in options :]:  # diffusers finds such shards only if told to
        loaded = UNet.from_pretrained(tmp_path / "saved", subfolder="unet", variant=variant, use_safetensors=given)
        assert torch.equal(prediction(loaded), prediction(unet))
    with pytest.raises(OSError, match="safetensors"):
        UNet.from_pretrained(tmp_path / "saved", subfolder="unet", variant=variant, use_safetensors=True)
    with pytest.raises(ValueError, match="weights as safetensors, the only format that is read"):
        load_unet(str(tmp_path / "saved" / "unet"), {})


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}])
def test_a_pickle_that_calls_something_is_refused(tmp_path, options):
    unet = network()
    unet.save_config(tmp_path)
    for content in (Intruder(), {**unet.state_dict(), "extra": Intruder()}):
        torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
            UNet.from_pretrained(tmp_path, **options)
    assert "UNET_INTRUDER" not in os.environ


STOCK = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}


def controlnet() -> ControlNetModel:
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D")
    options = {"down_block_types": blocks, "cross_attention_dim": 8, "conditioning_embedding_out_channels": (4, 8)}
    return ControlNetModel(**STOCK, **options)


def stock() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(sample_size=8, **STOCK, **blocks)


@pytest.mark.parametrize(
    ("other", "fix"),
    [
        (stock, r"UNet2DAdapter\.from_stock\(UNet2DModel\.from_pretrained"),
        (controlnet, "load it with that class"),
        (lambda: ImageClassifier(1, 3), "load it with that class"),
        (lambda: UNet2DAdapter.from_stock(stock()), "use UNet2DAdapter, from unet_diffusion.adapters"),
    ],
)
def test_the_folder_of_another_network_is_refused(tmp_path, other, fix):
    """Diffusers would return an untrained network, and warn."""
    network_there = other()
    network_there.save_pretrained(tmp_path)
    message = f"the config of a {type(network_there).__name__}, but must be that of a UNet; .*{fix}"
    with pytest.raises(ValueError, match=message):
        UNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        UNet.from_config(network_there.config)


@pytest.mark.parametrize("kind", [UNet2DModel, UNet2DConditionModel, ControlNetModel, AutoencoderKL])
@pytest.mark.parametrize(
    "ours",
    [network, lambda: UNet2DAdapter.from_stock(stock()), lambda: ImageClassifier(1, 3)],
    ids=["unet", "adapter", "classifier"],
)
def test_no_class_of_diffusers_makes_random_weights_of_our_folders(tmp_path, kind, ours):
    saved = ours()
    saved.save_pretrained(tmp_path)
    message = f"these weights are loaded with {type(saved).__name__}.from_pretrained, of unet_diffusion"
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path)
    kept = saved.config.get("down_block_types")  # only the adapter has them
    assert loaded.config.get("down_block_types") == (None if kept is None else list(kept))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert again == {**first, "_name_or_path": str(tmp_path)}


def test_missing_weights_are_refused(tmp_path):
    """Those of layers with an adapter are saved under other names; diffusers would draw new ones."""
    unet = network()
    unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of the network are not in .*conv1.*, and would be random"):
        UNet.from_pretrained(tmp_path)
    loaded, info = UNet.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and isinstance(loaded, UNet)


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        ({"num_classes": 3}, r"unet.to_segmentation\(num_classes=3\)"),
        ({"num_classes": 3, "instances": True}, r"unet.to_segmentation\(num_classes=3, instances=True\)"),
    ],
)
def test_a_head_that_was_not_saved_is_added_after_loading(tmp_path, values, fix):
    network().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"such as \w+_head.bias, and would be random; load it as it is, and .* by {fix}"
    ):
        UNet.from_pretrained(tmp_path, **values)


def test_the_config_of_a_run_or_of_a_stock_network_is_not_that_of_a_network(tmp_path):
    DDPMPipeline(network(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"data": {}, "training": {}}')  # that of the run
    with pytest.raises(ValueError, match="is the folder of a run or a pipeline"):
        UNet.from_config(tmp_path)
    with pytest.raises(ValueError, match="this is the config of a UNet2DModel"):
        UNet.from_config({key: value for key, value in stock().config.items() if key[0] != "_"})


def test_no_other_class_of_ours_loads_a_unet(tmp_path):
    network().save_pretrained(tmp_path)
    for kind in (UNet2DAdapter, ImageClassifier, PixelClassifier):
        with pytest.raises(ValueError, match=f"the config of a UNet, but must be that of a {kind.__name__}"):
            kind.from_pretrained(tmp_path)


def test_a_subclass_loads_what_its_base_has_saved(tmp_path):
    class Own(UNet):
        pass

    network().save_pretrained(tmp_path)
    assert torch.equal(prediction(Own.from_pretrained(tmp_path)), prediction(network()))


def test_the_folder_of_a_pipeline_is_refused_and_its_subfolder_named(tmp_path):
    DDPMPipeline(network(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the folder of a run or a pipeline, .* load its unet with"):
        UNet.from_pretrained(tmp_path)
    assert torch.equal(prediction(UNet.from_pretrained(tmp_path, subfolder="unet")), prediction(network()))


def test_a_folder_without_weights_ends_in_the_error_of_diffusers(tmp_path):
    network().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match="Error no file named diffusion_pytorch_model.bin found in directory"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("share", [0.5, 0.7])
@pytest.mark.parametrize("gradients", [False, True])
def test_device_map_puts_on_disk_what_memory_cannot_hold(tmp_path, share, gradients):
    unet = network(channels=(8, 16, 16), blocks_per_stage=2)
    unet.save_pretrained(tmp_path / "saved")
    memory = {"cpu": int(share * compute_module_sizes(unet)[""])}
    folder = str(tmp_path / "offload")
    loaded = UNet.from_pretrained(tmp_path / "saved", device_map="auto", max_memory=memory, offload_folder=folder)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    with torch.set_grad_enabled(gradients):
        found = loaded(torch.linspace(-1, 1, 126).reshape(2, 1, 9, 7), 5).sample
    torch.testing.assert_close(found, prediction(unet), rtol=0, atol=1e-5)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A folder that stands for the Hub: uploads lie under the names of their repositories."""

    class Url:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = repo_id

    def create_repo(repo_id, **_):
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
        return Url(repo_id)

    def upload_folder(*, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    def load_card(repo_id, **_):
        raise EntryNotFoundError(f"{repo_id} has no README.md yet")

    monkeypatch.setattr(diffusers.utils.hub_utils.ModelCard, "load", load_card)
    for module in (diffusers.models.modeling_utils, diffusers.utils.hub_utils):
        monkeypatch.setattr(module, "create_repo", create_repo)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload_folder)
    return tmp_path / "hub"


def test_push_to_hub_uploads_what_loads_again(hub, tmp_path):
    unet = network()
    unet.push_to_hub("somebody/unet")
    unet.save_pretrained(str(tmp_path / "local"), push_to_hub=True, repo_id="somebody/other")
    for name in ("unet", "other"):
        assert torch.equal(prediction(UNet.from_pretrained(hub / "somebody" / name)), prediction(unet))
        assert "library_name: diffusers" in (hub / "somebody" / name / "README.md").read_text()


def test_moving_average_is_saved_and_loaded_as_a_network(tmp_path):
    unet = network()
    average = EMAModel(unet.parameters(), decay=0.5, model_cls=UNet, model_config=unet.config)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    average.step(unet.parameters())
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, UNet)
    assert loaded.optimization_step == 1
    for kept, expected in zip(loaded.shadow_params, average.shadow_params):
        assert torch.equal(kept, expected)
    network_of_averages = UNet.from_pretrained(tmp_path)
    average.copy_to(unet.parameters())
    assert torch.equal(prediction(network_of_averages), prediction(unet))


def test_a_config_survives_keys_that_another_version_wrote(tmp_path):
    unet = network(num_classes=3, segmentation_timestep=7)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "of_a_later_version": [1, 2]}))
    loaded = UNet.from_pretrained(tmp_path)
    keys = [key for key in config if key[0] != "_" and key != "down_block_types"]  # which other classes refuse
    assert {key: loaded.config[key] for key in keys} == {
        key: list(value) if isinstance(value := unet.config[key], tuple) else value for key in keys
    }
    assert torch.equal(prediction(loaded), prediction(unet))


def test_a_config_may_lack_keys_that_have_a_default(tmp_path):
    unet = network()
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_classes", "segmentation_timestep", "label_dropout", "blocks_per_stage"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(prediction(UNet.from_pretrained(tmp_path)), prediction(unet))


def test_the_checkpoint_kept_from_the_first_format_still_predicts_the_same():
    example = load_file(KEPT / "example.safetensors")
    unet, report = UNet.from_pretrained(KEPT, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        output = unet(example["sample"], 7, example["class_labels"], head="both")
    torch.testing.assert_close(
        output.sample, example["noise"], rtol=1e-4, atol=1e-5
    )  # other machines round differently
    torch.testing.assert_close(output.logits, example["logits"], rtol=1e-4, atol=1e-5)
