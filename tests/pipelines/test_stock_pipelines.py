"""Every unconditional pipeline of diffusers takes our network: it runs, is saved, and reloads to the same."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    PNDMPipeline,
    PNDMScheduler,
    RePaintPipeline,
    RePaintScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import LDMSuperResolutionPipeline
from PIL import Image

from unet_diffusion import UNet, pipelines
from unet_diffusion.pipelines import SegmentationPipeline, SuperResolutionPipeline
from unet_diffusion.saved_index import saved_kind
from unet_diffusion.saved_runs import load_pipeline

STEPS = {"num_inference_steps": 3}


def network(in_channels: int = 3, **changes) -> UNet:
    torch.manual_seed(0)
    unet = UNet(**{"sample_size": 8, "channels": (8, 16), "head_channels": 8, "in_channels": in_channels, **changes})
    torch.nn.init.normal_(unet.noise_head.weight)
    return unet.eval()


def vqvae() -> VQModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(block_out_channels=(32, 32), norm_num_groups=8, latent_channels=3, **blocks).eval()


def image(value: int) -> Image.Image:
    """Of 32 pixels a side, since the stock pipelines round the sizes of PIL images down to multiples of it."""
    return Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8))


def hole() -> Image.Image:
    """A mask of RePaint: black parts are painted again."""
    mask = np.full((32, 32), 255, dtype=np.uint8)
    mask[8:24, 8:24] = 0
    return Image.fromarray(mask)


PIPELINES = {
    "DDPM": (lambda: DDPMPipeline(network(), DDPMScheduler()), STEPS),
    "DDIM": (lambda: DDIMPipeline(network(), DDIMScheduler()), STEPS),
    "PNDM": (lambda: PNDMPipeline(network(), PNDMScheduler()), {"num_inference_steps": 10}),
    "ConsistencyModel": (lambda: ConsistencyModelPipeline(network(), CMStochasticIterativeScheduler()), STEPS),
    "ConsistencyModel with classes": (
        lambda: ConsistencyModelPipeline(network(num_class_embeds=4), CMStochasticIterativeScheduler()),
        {**STEPS, "class_labels": 3},
    ),
    "ScoreSdeVe": (
        lambda: ScoreSdeVePipeline(network(time_embedding="fourier"), ScoreSdeVeScheduler()),
        STEPS,
    ),
    "RePaint": (
        lambda: RePaintPipeline(network(), RePaintScheduler()),
        {**STEPS, "image": image(200), "mask_image": hole(), "jump_length": 1, "jump_n_sample": 2},
    ),
    "LDM": (lambda: LDMPipeline(vqvae(), network(), DDIMScheduler()), STEPS),
    "LDMSuperResolution": (
        lambda: LDMSuperResolutionPipeline(vqvae(), network(6, out_channels=3), DDIMScheduler()),
        {**STEPS, "image": image(90)},
    ),
}


def images(pipe, arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(generator=torch.Generator().manual_seed(0), output_type="np", **arguments).images)


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_pipeline_runs_and_comes_back_from_a_folder(name, tmp_path):
    make, arguments = PIPELINES[name]
    pipe = make()
    before = images(pipe, arguments)
    assert np.isfinite(before).all() and before.std() > 0
    pipe.save_pretrained(tmp_path)
    assert isinstance(type(pipe).from_pretrained(tmp_path).unet, UNet)
    np.testing.assert_array_equal(images(type(pipe).from_pretrained(tmp_path), arguments), before)


def test_repaint_keeps_what_the_mask_keeps():
    make, arguments = PIPELINES["RePaint"]
    painted = images(make(), {**arguments, "num_inference_steps": 20})[0]
    keep = np.asarray(hole()) == 255
    assert np.abs(painted[keep] - 200 / 255).max() < 0.1
    assert np.abs(painted[~keep] - 200 / 255).mean() > 0.1


@pytest.mark.parametrize(
    ("name", "pipe"),
    [
        ("SegmentationPipeline", lambda: SegmentationPipeline(network(num_classes=2))),
        ("SuperResolutionPipeline", lambda: SuperResolutionPipeline(network(6), DDPMScheduler(), scale=2)),
    ],
)
def test_the_generic_loader_names_the_pipeline_to_use_where_none_of_diffusers_serves(tmp_path, name, pipe):
    pipe().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match=f"has no attribute unet_diffusion.pipelines.{name}"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert saved_kind(tmp_path) == name
    loaded = getattr(pipelines, name).from_pretrained(tmp_path)
    assert torch.equal(loaded.unet.noise_head.weight, pipe().unet.noise_head.weight)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))  # as earlier versions did
    assert saved_kind(tmp_path) == name and isinstance(load_pipeline(type(loaded), tmp_path), type(loaded))


def test_a_run_without_a_scheduler_is_not_asked_for_images(tmp_path):
    SegmentationPipeline(network(num_classes=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a SegmentationPipeline without a scheduler, which generates nothing"):
        load_pipeline(pipelines.ImageGenerationPipeline, tmp_path)


@pytest.mark.slow
def test_a_fresh_process_needs_nothing_but_the_import_and_warns_of_nothing(tmp_path):
    names = [name for name in PIPELINES if " " not in name and name != "LDMSuperResolution"]  # which needs transformers
    for name in names:
        PIPELINES[name][0]().save_pretrained(tmp_path / name)
    code = f"""
import unet_diffusion
from diffusers import DiffusionPipeline
for name in {names}:
    pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r} + "/" + name)
    print(type(pipe).__name__, type(pipe.unet).__module__)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == [f"{name}Pipeline unet_diffusion.unet" for name in names]
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading pipeline" not in line] == []
