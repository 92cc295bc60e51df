"""Settings that depend on the device; no device is needed to test them."""

import multiprocessing
import os
import socket

import pytest
import torch
from accelerate import PartialState
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


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def join_as(rank: int, port: int, folder) -> None:
    """Makes the Accelerator of one of two processes as torchrun starts them, and writes what it knows of both."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    accelerator = make_accelerator(TrainingConfig(trackers=()), folder / "run")
    (folder / str(rank)).write_text(f"{accelerator.process_index} of {accelerator.num_processes}")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_processes_without_an_accelerator_are_one_run(tmp_path, free_port):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=join_as, args=(rank, free_port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        process.kill()
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 of 2", "1 of 2"]


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path, monkeypatch):
    """The state of Accelerate was made when this process was alone, or on one device that several would share."""
    make_accelerator(TrainingConfig(trackers=()), tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but Accelerate counts 1 on .*; start them by torchrun"):
        make_accelerator(TrainingConfig(trackers=()), tmp_path)
