"""The precision of networks: what "auto" stands for, and that only networks compute in it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import network
from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.network import precision
from unet_diffusion.network.precision import autocast, has_bfloat16, settled_precision
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline, SuperResolutionPipeline
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # a warning of diffusers about NumPy 2
CPU = torch.device("cpu")


@pytest.mark.parametrize(("told", "has", "expected"), [("bf16", False, "bf16"), ("no", True, "no"), ("", True, "bf16")])
def test_auto_is_what_accelerate_was_told_or_what_the_device_has(monkeypatch, told, has, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: has)
    assert settled_precision("auto", CPU) == expected
    assert settled_precision("no", CPU) == "no" and settled_precision("bf16", CPU) == "bf16"


def test_a_processor_has_bfloat16_if_its_flags_say_so():
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("the flags of the processor are in /proc/cpuinfo")
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert has_bfloat16(CPU) == bool(flags & {"avx512_bf16", "amx_bf16"})
    assert not has_bfloat16(torch.device("mps"))


def test_precisions_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="mixed_precision is 'fp8', but must be one of 'auto', 'no', 'bf16', 'fp16'"):
        settled_precision("fp8", CPU)
    with pytest.raises(ValueError, match="there is only a CPU, which has no fp16"):
        settled_precision("fp16", CPU)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION is 'fp8', but must be one of"):
        settled_precision("auto", CPU)


def test_a_run_keeps_the_precision_that_it_was_started_with(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"training": {"mixed_precision": "auto"}, "mixed_precision": "bf16"}')
    assert make_accelerator(TrainingConfig(trackers=()), tmp_path).mixed_precision == "bf16"
    (tmp_path / "config.json").write_text('{"training": {"mixed_precision": "no"}}')  # of an earlier version
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator(TrainingConfig(trackers=()), tmp_path).mixed_precision == "no"
    assert make_accelerator(TrainingConfig(trackers=()), tmp_path / "new").mixed_precision == "bf16"


def cast(unet):
    """The same network, which computes in bfloat16 by itself and returns float32."""
    forward = unet.forward

    def in_bfloat16(*args, **kwargs):
        assert not torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(*args, **kwargs)

    unet.forward = in_bfloat16
    return unet


def generated(unet, **options):
    scheduler = DiffusionConfig().make_scheduler()
    pipe = ImageGenerationPipeline(unet, sampler("unipc", scheduler))  # which solves for its coefficients in each step
    pipe.set_progress_bar_config(disable=True)
    return pipe(2, 4, generator=torch.manual_seed(0), output_type="pt", **options).images


def enlarged(unet, **options):
    pipe = SuperResolutionPipeline(unet, sampler("unipc", DiffusionConfig().make_scheduler()), scale=2)
    pipe.set_progress_bar_config(disable=True)
    image = torch.arange(0, 240, 4, dtype=torch.uint8).reshape(1, 6, 10)
    return pipe(image, 4, torch.manual_seed(0), output_type="pt", **options).images[0]


def segmented(unet, **options):
    pipe = SegmentationPipeline(unet, DiffusionConfig().make_scheduler())
    image = torch.arange(0, 240, 4, dtype=torch.uint8).reshape(1, 6, 10)
    levels = {"timesteps": (5, 50), "augment": True, "generator": torch.manual_seed(0)}
    return pipe(image, output_type="pt", **levels, **options).probabilities[0]


CASES = [
    (generated, {}),
    (enlarged, {"in_channels": 2, "out_channels": 1}),
    (segmented, {"num_classes": 3}),
]


@pytest.mark.parametrize(("compute", "changes"), CASES)
def test_only_the_network_computes_in_half_precision(compute, changes):
    half = compute(network(**changes), mixed_precision="bf16")
    assert half.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert torch.equal(half, compute(cast(network(**changes))))
    full = compute(network(**changes))
    assert not torch.equal(half, full) and (half - full).abs().max() < 0.1
    assert torch.equal(compute(network(**changes), mixed_precision="auto"), full)  # of what the tests tell Accelerate


@pytest.mark.parametrize(("compute", "changes"), CASES)
def test_an_autocast_of_the_caller_is_left_alone(compute, changes):
    unet, dtypes = network(**changes), set()
    unet.stem.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    full = compute(unet)
    assert dtypes == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = compute(unet)
    assert dtypes == {torch.float32, torch.bfloat16}
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.1


def test_a_pixel_classifier_computes_in_it_too():
    unet = network()
    torch.manual_seed(0)
    classifier = PixelClassifier.beside(unet, 3, (5, 50), hidden=(8,)).eval()
    torch.nn.init.normal_(classifier.head.weight)
    pipe = SegmentationPipeline(unet, DiffusionConfig().make_scheduler(), classifier=classifier)
    image = np.arange(0, 240, 4, dtype=np.uint8).reshape(6, 10)
    half, full = (pipe(image, output_type="pt", mixed_precision=name).probabilities[0] for name in ("bf16", "no"))
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.05


def test_a_file_is_segmented_in_it_as_an_image_in_memory(tmp_path):
    pipe = SegmentationPipeline(network(num_classes=3))
    image = np.random.default_rng(0).integers(0, 256, (9, 14), dtype=np.uint8)
    mask = np.zeros((9, 14), dtype=np.uint8)
    pipe.segment_file(image, mask, mixed_precision="bf16")
    assert np.array_equal(mask, pipe(image, output_type="np", mixed_precision="bf16").masks[0])


def test_autocast_is_off_for_float32_unless_the_caller_is_in_one():
    with autocast(CPU, "no"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.float16), autocast(CPU, "no"):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
    with autocast(CPU, "bf16"):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_configuration_says_auto_unless_it_is_told_more():
    assert TrainingConfig().mixed_precision == "auto"
    assert replace(TrainingConfig(), mixed_precision="bf16").mixed_precision == "bf16"
