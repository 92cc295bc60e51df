"""The bytes of image files, local and remote."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

ImageLike: TypeAlias = Image.Image | np.ndarray | bytes | str | Path | Mapping[str, Any]

PROTOCOLS = ("http", "https", "hf", "s3", "gs", "gcs", "az", "abfs", "memory")  # with which images are read


class NotFetched(ValueError):
    """A remote file that could not be read, perhaps only for the moment."""


def read_bytes(source: ImageLike) -> tuple[bytes, str]:
    """Returns the bytes of a file, and its name for messages.

    Raises:
        ValueError: there is no file or no image, or it cannot be read; `NotFetched` if it is remote.
    """
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is not None:
            return data, str(path or f"an image of {len(data)} bytes")
        if path is not None:
            return read_bytes(path)
        raise ValueError("the image is missing: neither bytes nor a path.")
    if source is None:
        raise ValueError("the image is missing.")
    if isinstance(source, bytes):
        return source, f"an image of {len(source)} bytes"
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"an image cannot be read from {type(source).__name__}; give a path, bytes, an array or a PIL image."
        )
    name = str(source)
    protocol, separator, rest = name.partition("://")
    if separator and protocol != "file":
        return _download(name, protocol), name
    path = Path(os.fsdecode(unquote_to_bytes(rest)) if separator else name)
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise ValueError(f"{name} is a folder, a pipe or a device, but must be a file; give an image file.")
        return path.read_bytes(), name
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}; check the path and its rights.") from error


def _download(url: str, protocol: str) -> bytes:
    """Downloads a remote file.

    The URL may come from a downloaded table. So it must not name a file system that does more than fetch a file, or
    that is built on another one.
    """
    if protocol not in PROTOCOLS or "::" in url:
        raise ValueError(f"{url} cannot be read: images are fetched by {', '.join(PROTOCOLS)}; download it first.")
    import fsspec  # here, since most images are local files and the command line has to start fast

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except ImportError:
        raise
    except Exception as error:  # each library that fetches files raises its own
        raise NotFetched(f"{url} cannot be read: {error}") from error
