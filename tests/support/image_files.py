"""Image files in memory."""

import io
from typing import Any

import numpy as np


def npy(values: Any) -> bytes:
    """The bytes of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    """The bytes of a TIFF file; the options are those of `tifffile.imwrite`."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()
