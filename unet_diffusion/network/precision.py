"""The precision in which networks compute: float32, or half precision where a device is faster in it."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from unet_diffusion.checks import require_choice
from unet_diffusion.network.config import Precision

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
ACCELERATE_PRECISION = "ACCELERATE_MIXED_PRECISION"  # the variable in which `accelerate launch` passes its setting on


def settled_precision(name: Precision, device: torch.device) -> Precision:
    """Resolves "auto" and returns "no", "bf16" or "fp16".

    "auto" is the precision that `accelerate launch` was configured with, or else the fastest safe one: bfloat16, which
    has the range of float32, if the device computes in it, and float32 otherwise.

    Raises:
        ValueError: the name is unknown, or it is fp16 on a CPU, which does not have it.
    """
    require_choice("mixed_precision", name, get_args(Precision))
    if name == "auto":
        name = os.environ.get(ACCELERATE_PRECISION) or ("bf16" if has_bfloat16(device) else "no")  # type: ignore[assignment]
        require_choice(ACCELERATE_PRECISION, name, tuple(PRECISIONS))
    if name == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', but there is only a CPU, which has no fp16; use 'bf16' or 'no'.")
    return name


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has instructions for bfloat16: on CPUs AVX512-BF16 or AMX. Other devices emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public ones
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast(device: torch.device, name: Precision) -> AbstractContextManager[Any]:
    """A context in which convolutions, matrix products and attention compute in a settled precision.

    "no" changes nothing: if the caller is in an autocast of their own, they asked for its precision.
    """
    return torch.autocast(device.type, dtype=HALF[name]) if name in HALF else nullcontext()


def check_finite(name: str, values: Tensor) -> None:
    """Raises a ValueError if the results of a network, of any shape, are NaN or infinite; `name` is what they are."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{name} have values that are NaN or infinite, so the network overflows or has such weights; "
            "set mixed_precision to 'no' if it is 'fp16', or take another run or another checkpoint."
        )
