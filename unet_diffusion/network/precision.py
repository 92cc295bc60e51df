"""The precision in which networks compute: float32, or half precision where a device is faster in it."""

import os
from typing import get_args

import torch

from unet_diffusion.checks import require_choice
from unet_diffusion.network.config import Precision

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
ACCELERATE_PRECISION = "ACCELERATE_MIXED_PRECISION"  # in which `accelerate launch` hands on what its configuration says


def settled_precision(name: Precision, device: torch.device) -> Precision:
    """Returns "no", "bf16" or "fp16"; "auto" is what `accelerate launch` was told, or else the fastest safe one.

    That is bfloat16, whose range is that of float32, where the device computes in it.

    Raises:
        ValueError: another name, or fp16 on a CPU, which has none.
    """
    require_choice("mixed_precision", name, get_args(Precision))
    if name == "auto":
        name = os.environ.get(ACCELERATE_PRECISION) or ("bf16" if has_bfloat16(device) else "no")  # type: ignore[assignment]
        require_choice(ACCELERATE_PRECISION, name, tuple(PRECISIONS))
    if name == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision is 'fp16', but there is only a CPU, which has no fp16; use 'bf16' or 'no'.")
    return name


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether a device has instructions for bfloat16: on CPUs AVX512-BF16 or AMX. Others would emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public ones
    return device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def autocast(device: torch.device, name: Precision) -> torch.autocast:
    """A context in which convolutions, matrix products and attention compute in a precision that is settled."""
    return torch.autocast(device.type, dtype=HALF.get(name), enabled=name in HALF)
