"""Stock networks of diffusers in training: every way to learn masks, and loading the runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import tiny
from tests.support.stock import SMALL, stock
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.segment import segment
from unet_diffusion.commands.train_segmentation import make_task, train_segmentation
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.tasks.config import FrozenFeaturesConfig, JointConfig, SegmentationConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.metrics_log import read_metrics, series


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of one bright square on dark noise, their masks, and a stock pipeline."""
    folder = tmp_path_factory.mktemp("place")
    tiny.squares(folder)
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
        segmentation=SegmentationConfig(preview_images=2),
        augment=False,
        training=TrainingConfig(steps=2, batch_size=4, warmup_steps=1, log_every=2, validate_every=2, trackers=()),
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_saved_stock_model_is_not_mistaken_for_an_adapter(place):
    with pytest.raises(ValueError, match="this is the config of a UNet2DModel.* UNet2DAdapter.from_stock"):
        UNet2DAdapter.from_pretrained(place / "stock", subfolder="unet")


@pytest.mark.slow
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
    """As google/ddpm-cifar10-32 has; a stock pipeline is loaded without a warning."""
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


@pytest.mark.slow
def test_a_saved_run_loads_in_another_process_without_a_warning(place, tmp_path):
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
    learn = SegmentationConfig(learn="pixel_classifier", preview_images=2)
    run = train_segmentation(
        replace(options, segmentation=learn, frozen_features=FrozenFeaturesConfig((10, 100), hidden=(8,)))
    )
    pipe = SegmentationPipeline.from_pretrained(run)
    assert pipe.classifier.config.channels == [16, 8] and pipe.classifier.config.strides == [1, 1]
    expected = UNet2DAdapter.from_pretrained(run / "unet").to_stock().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(place / "stock").items())
    image = np.zeros((7, 9), dtype=np.uint8)
    assert pipe(image, output_type="np").masks[0].shape == (7, 9)


@pytest.mark.parametrize("learn", ["everything", "pixel_classifier"])
def test_a_stock_network_that_was_trained_with_a_class_for_every_image_learns_masks(options, tmp_path, learn):
    """Its masks use the mean of the embeddings of all classes."""
    DDPMPipeline(stock(**SMALL, num_class_embeds=4), DDPMScheduler()).save_pretrained(tmp_path / "classes")
    options.model, options.segmentation = str(tmp_path / "classes"), SegmentationConfig(learn=learn, preview_images=2)
    options.training = replace(options.training, steps=1, validate_every=1)
    pipe = SegmentationPipeline.from_pretrained(train_segmentation(options))
    assert pipe.unet.config.num_class_embeds == 4
    assert pipe(np.zeros((7, 9), dtype=np.uint8), output_type="np").masks[0].shape == (7, 9)


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
