"""The Accelerator of a run, and the context that tasks and data get."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, LoggerType, ProjectConfiguration

from unet_diffusion.training.config import TrainingConfig

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
        ValueError: a tracker that is unknown or not installed, which Accelerate would leave out; fp16 on a CPU, which
            it would silently replace by float32; or weights that are sharded among processes.
    """
    check_trackers(config.trackers)
    AcceleratorState._reset_state()  # else a second run in one process could not choose another precision
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulate,
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', but there is only a CPU, which has no fp16; use 'bf16' or 'no'.")
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"distributed_type is {accelerator.distributed_type.value}, but the moving average and the checkpoints "
            "need whole weights in each process; use plain data parallelism (MULTI_GPU)."
        )
    return accelerator


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
