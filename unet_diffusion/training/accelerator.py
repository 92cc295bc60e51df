"""The Accelerator of a run, and the context that is passed to tasks and data."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    LoggerType,
    ProjectConfiguration,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor

from unet_diffusion.checks import is_count
from unet_diffusion.images.axes import counted
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.network.threads import STATED, fastest_threads
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.run_folder import started_with

logger = logging.getLogger(__name__)

T = TypeVar("T", float, Tensor)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class RunContext:
    """The options of a run, and the process and device on which this part of it runs."""

    config: TrainingConfig
    accelerator: Accelerator

    @property
    def images_per_step(self) -> int:
        """Images of one optimizer step, over all processes."""
        return self.config.batch_size * self.config.accumulate * self.accelerator.num_processes


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """Returns the Accelerator of a run: its devices, processes, precision and trackers.

    Raises:
        ValueError: a tracker is unknown or not installed, which Accelerate would leave out; fp16 is asked for on a CPU,
            where Accelerate would silently use float32; weights are sharded among processes; or processes do not know
            of each other, so that each would train a run of its own.
    """
    check_trackers(config.trackers)
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    before = started_with(output)
    started = before.get("mixed_precision") if config.mixed_precision == "auto" else None
    cpu = _on_cpu()
    device = PartialState(cpu=cpu).device
    accelerator = Accelerator(
        cpu=cpu,
        gradient_accumulation_steps=config.accumulate,
        mixed_precision=settled_precision(started or config.mixed_precision, device),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    accelerator.gradient_accumulation_steps = config.accumulate  # which a variable of Accelerate overrides
    launched = int(os.environ.get("WORLD_SIZE", accelerator.num_processes))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE is {launched}, but Accelerate counts {accelerator.num_processes} on {device.type}, so each "
            "process would train a run of its own; start them by torchrun or accelerate launch with a device for each, "
            "set ACCELERATE_USE_CPU=true to train on CPUs, or unset WORLD_SIZE for one process."
        )
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"distributed_type is {accelerator.distributed_type.value}, but the moving average and the checkpoints "
            "need whole weights in each process; use plain data parallelism (MULTI_GPU)."
        )
    if device.type == "cpu" and launched == 1:
        _choose_threads(before.get("threads"))
    return accelerator


def _choose_threads(before: Any) -> None:
    """Sets PyTorch's number of threads to the one that a run had before, or else to the fastest one.

    With another number, sums are rounded in another order, so a resumed run would not go on bit by bit.
    """
    present, resumed = torch.get_num_threads(), is_count(before) and STATED not in os.environ
    threads = min(before, present) if resumed else fastest_threads()
    if threads < present:
        torch.set_num_threads(threads)
        why = "as when the run was started" if resumed else "since other programs use the processor"
        logger.warning(
            "the training computes in %s instead of %d, %s; set OMP_NUM_THREADS to choose a number",
            counted(threads, "thread"),
            present,
            why,
        )


def _on_cpu() -> bool:
    """Returns whether to tell Accelerate to use the CPU; otherwise several processes there would be a run each."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())


def check_trackers(trackers: Sequence[Any]) -> None:
    """Raises a ValueError unless Accelerate has trackers of these names, and their packages are installed.

    Trackers that were made in Python, and names that were registered there, are taken as they are.
    """
    built_in, installed = LoggerType.list(), ["all", *map(str, get_available_trackers())]
    for name in (tracker for tracker in trackers if isinstance(tracker, str)):
        known = dict.fromkeys([*built_in, *LOGGER_TYPE_TO_CLASS])
        if name not in known:
            raise ValueError(f"trackers has {name!r}, but must be among {', '.join(known)}; or leave it empty.")
        if name in built_in and name not in installed:
            raise ValueError(
                f"trackers has {name!r}, but {name} is not installed here; pip install {name}, or leave it out of "
                "trackers. metrics.jsonl and curves.png need none."
            )


def memory_layout(device: torch.device) -> torch.memory_format:
    """Returns the memory layout of weights, and thus of maps, with which a device trains fastest.

    The tensor cores of CUDA read the values of a pixel side by side.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def steps_ahead(device: torch.device, limit: int) -> int:
    """Returns after how many steps, at most `limit`, a run reads which of them were lost.

    An accelerator works on a queue of steps, and reading a value from it waits for the end of the queue. On a CPU there
    is no queue.
    """
    return 1 if device.type == "cpu" else limit


def choose_kernels(device: torch.device) -> None:
    """Lets CUDA multiply float32 on its tensor cores (TF32), as it does for convolutions, and try kernels per size.

    Training uses a single size, so the trial pays off.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def sum_over_processes(accelerator: Accelerator, value: T) -> T:
    """Returns the sum of a number, or of a tensor on the CPU, over all processes; some devices have no float64."""
    if accelerator.num_processes == 1:
        return value
    return sum(gather_object([value]))  # type: ignore[return-value]  # of one or more
