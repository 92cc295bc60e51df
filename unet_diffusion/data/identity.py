"""Hashes that tell the files of a source from others, wherever the source lies, without reading all of them."""

import os
from collections.abc import Sequence
from typing import Any

from unet_diffusion.data.folders import hash_of

ENDS = 2**16  # bytes read at the start and at the end of a table; Parquet and Arrow describe the rest at the end


def identity_of_images(names: Sequence[tuple[str, ...]], states: Sequence[tuple[Any, ...]]) -> str:
    """Returns a hash of the names and sizes of files that each hold one image.

    Args:
        names: the parts of each path below the folder of the source.
        states: of the files, from `states_of`.
    """
    return hash_of([("/".join(name), state[1]) for name, state in zip(names, states, strict=True)])


def identity_of_tables(files: Sequence[str]) -> str:
    """Returns a hash of the names, sizes and both ends of files that hold many images, in the order given.

    The names are relative to the folder that all of the files share.
    """
    home = os.path.commonpath([os.path.dirname(file) for file in files])
    return hash_of([(os.path.relpath(file, home), *_size_and_ends(file)) for file in files])


def _size_and_ends(path: str) -> tuple[int, str]:
    """Returns the size of a file in bytes, and a hash of its first and last ones."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - ENDS))
        end = file.read()
        file.seek(0)
        return size, hash_of((file.read(ENDS) + end).hex())
