"""Runs, their exports, and the outputs of both."""

import inspect
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import nn

import unet_diffusion
from tests.support.tiny import network
from unet_diffusion import UNet
from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.commands.export.command import export
from unet_diffusion.commands.options.export import Export
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline

CODE = "unet_diffusion_{}_" + unet_diffusion.__version__.replace(".", "_")


ALLOWED = "`trust_remote_code` is enabled."  # AutoModel says so whenever it is given


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """One saved pipeline of each kind."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    ImageGenerationPipeline(network(), DDPMScheduler()).save_pretrained(folder / "generation")
    SegmentationPipeline(network(num_classes=3, norm="none")).save_pretrained(folder / "segmentation")
    SuperResolutionPipeline(network(in_channels=2), DDPMScheduler(), scale=2).save_pretrained(folder / "larger")
    unet = network()
    classifier = PixelClassifier.beside(unet, 2, (20, 40), hidden=(8,))
    nn.init.normal_(classifier.head.weight)
    SegmentationPipeline(unet, DDPMScheduler(), classifier=classifier).save_pretrained(folder / "classifier")
    return folder


@pytest.fixture(scope="session")
def exports(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for saved in runs.iterdir():
        export(Export(saved, folder / saved.name))
    return folder


def outputs(unet, ddpm, generation, segmentation, classifier, larger):
    """The outputs of each for the same input, as arrays by name; its source also runs where the package is missing."""
    import numpy as np
    import torch

    given = torch.randn(1, 1, 13, 18, generator=torch.manual_seed(0))
    image = np.random.default_rng(0).integers(0, 256, (45, 70), dtype=np.uint8)
    for pipe in (ddpm, generation, segmentation, classifier, larger):
        pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        found = {"noise": unet(given, 7).sample.numpy()}
    for name, pipe in (("ddpm", ddpm), ("generation", generation)):
        result = pipe(batch_size=2, num_inference_steps=3, generator=torch.manual_seed(0), output_type="np")
        found[name] = result.images
    result = larger(image[:9, :14], num_inference_steps=3, generator=torch.manual_seed(0), output_type="np")
    found["larger"] = result.images[0]
    for name, pipe in (("segmentation", segmentation), ("classifier", classifier)):
        for tile_size in (16, None):
            result = pipe(image, tile_size=tile_size, output_type="np")
            found[f"{name} mask {tile_size}"] = result.masks[0]
            found[f"{name} probabilities {tile_size}"] = result.probabilities[0]
        tiling = pipe._segmenter(None, 1, None, False).tiling
        found[f"{name} tile"] = np.array([tiling.tile, tiling.before, tiling.ramp])
    return found


LOAD = """
import sys
import numpy as np
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline

folder, code, target = sys.argv[1:]
trust = {"trust_remote_code": True}
found = outputs(
    AutoModel.from_pretrained(f"{folder}/generation/unet", **trust),
    DDPMPipeline.from_pretrained(f"{folder}/generation", **trust),
    DiffusionPipeline.from_pretrained(f"{folder}/generation", custom_pipeline=code, **trust),
    DiffusionPipeline.from_pretrained(f"{folder}/segmentation", **trust),
    DiffusionPipeline.from_pretrained(f"{folder}/classifier", **trust),
    DiffusionPipeline.from_pretrained(f"{folder}/larger", **trust),
)
np.savez(target, **found)
"""


def outputs_elsewhere(python: str, before: str, exports: Path, work: Path) -> dict[str, np.ndarray]:
    """The outputs of the exports in a new process, which must not warn."""
    script = work / "elsewhere.py"
    script.write_text(f"{before}\n{inspect.getsource(outputs)}\n{LOAD}")
    threads = str(torch.get_num_threads())  # another number of threads sums in another order
    arguments = [str(exports), CODE.format("image_generation"), str(work / "found.npz")]
    result = subprocess.run(
        [python, "-I", str(script), *arguments],
        capture_output=True,
        text=True,
        env={"HF_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads},
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "Loading pipeline components" not in line]
    assert [line for line in lines if not line.startswith(ALLOWED)] == []
    with np.load(work / "found.npz") as found:
        return dict(found)


def assert_equal_to_the_runs(found: dict[str, np.ndarray], runs: Path) -> None:
    expected = outputs(
        UNet.from_pretrained(runs / "generation" / "unet"),
        DDPMPipeline.from_pretrained(runs / "generation"),
        ImageGenerationPipeline.from_pretrained(runs / "generation"),
        SegmentationPipeline.from_pretrained(runs / "segmentation"),
        SegmentationPipeline.from_pretrained(runs / "classifier"),
        SuperResolutionPipeline.from_pretrained(runs / "larger"),
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if values.dtype.kind == "f":  # a long-lived process may round differently: by up to 4e-7
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-4, err_msg=name, strict=True)
        else:
            assert (found[name] == values).mean() > 0.99, name
        assert values.std() > 0, name
