"""Settings that depend on the device; no device is needed to test them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unet_diffusion import UNet
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.sets import load_images
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.accelerator import choose_kernels, make_accelerator, memory_layout, steps_ahead
from unet_diffusion.training.config import TrainingConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_keeps_its_layout_and_reads_each_step():
    assert (memory_layout(CPU), steps_ahead(CPU, 20)) == (torch.contiguous_format, 1)
    assert (memory_layout(CUDA), steps_ahead(CUDA, 20)) == (torch.channels_last, 20)


@pytest.fixture
def kernels():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def test_tensor_cores_and_trials_of_kernels_are_for_cuda_alone(kernels):
    before = kernels()
    choose_kernels(CPU)
    assert kernels() == before
    choose_kernels(CUDA)
    assert kernels() == ("high", True)


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 as Apple's devices do."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError(f"{function} made float64")
        return result


def test_the_validation_loss_needs_no_float64(tmp_path):
    images = load_images(DataConfig(max_images=40, validation_fraction=0.5, image_size=8))
    unet = UNet(sample_size=8, in_channels=1, out_channels=1, channels=(8, 16), head_channels=8).eval()
    task = DiffusionTask(unet, images, DiffusionConfig())
    accelerator = make_accelerator(TrainingConfig(trackers=()), tmp_path)
    with torch.no_grad(), WithoutFloat64():
        assert task.validate(unet, accelerator)["validation_loss"] > 0
