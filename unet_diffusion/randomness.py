"""Randomness that is keyed, not stored: every draw follows from a seed and the place where it is used.

Noise, timesteps, augmentation and the order of the images come from generators keyed by (seed, purpose, step or
epoch, index). A run that is resumed, or that uses another number of processes or workers, therefore draws the same
numbers without saving any random state.
"""

import hashlib

import torch


def keyed_seed(seed: int, *key: int | str) -> int:
    """Returns a seed from 0 to 2**63 - 1 that depends on `seed` and `key` alone."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits, since torch takes an int64


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """Returns a CPU generator that depends on `seed` and `key`, such as ("noise", step, index), alone."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


def keyed_permutation(length: int, seed: int, *key: int | str) -> torch.Tensor:
    """Returns a permutation of `range(length)`, int64 (length,), that depends on `seed` and `key` alone."""
    return torch.randperm(length, generator=keyed_generator(seed, *key))
