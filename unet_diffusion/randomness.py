"""Randomness that is keyed, not stored: every draw follows from a seed and the place where it is used.

Noise, timesteps, augmentation and the order of the images come from generators keyed by (seed, purpose, step or
epoch, index). A run that is resumed, or that uses another number of processes or workers, therefore draws the same
numbers without saving any random state.
"""

import hashlib
from collections.abc import Sequence
from operator import index

import torch
from torch import Generator, Tensor


def keyed_seed(seed: int, *key: int | str) -> int:
    """Returns a seed from 0 to 2**63 - 1 that depends only on `seed` and `key`."""
    parts = tuple(part if isinstance(part, str) else index(part) for part in (seed, *key))  # NumPy's have another repr
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits, since torch takes an int64


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """Returns a CPU generator that depends only on `seed` and `key`, such as ("noise", step, index)."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


def keyed_permutation(length: int, seed: int, *key: int | str) -> torch.Tensor:
    """Returns a permutation of `range(length)`, int64 (length,), that depends only on `seed` and `key`."""
    return torch.randperm(length, generator=keyed_generator(seed, *key))


def standard_normal(shape: Sequence[int], generators: Sequence[Generator], device: torch.device) -> Tensor:
    """Draws standard normal values (B, *shape) on a device, each sample from its own generator on the CPU.

    On a CPU, the values are drawn from these generators. For an accelerator, each generator draws a seed for the
    device, which draws the values, since drawing on the CPU and copying can take longer than a training step. On each
    kind of device the values depend on the sample's generator alone, but they differ between kinds.
    """
    if device.type == "cpu":
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
    return seeded_normal(shape, generators, device)


def seeded_normal(shape: Sequence[int], generators: Sequence[Generator], device: torch.device) -> Tensor:
    """Draws as `standard_normal` does on an accelerator."""
    values, on_device = torch.empty(len(generators), *shape, device=device), Generator(device)
    for sample, generator in zip(values, generators):
        sample.normal_(generator=on_device.manual_seed(int(torch.randint(2**62, (), generator=generator))))
    return values
