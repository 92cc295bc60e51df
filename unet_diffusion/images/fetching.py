"""Image files: how their bytes are fetched, and how many pixels they may hold."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote_to_bytes

import fsspec
import numpy as np
from PIL import Image

ImageLike: TypeAlias = Image.Image | np.ndarray | bytes | str | Path | Mapping[str, Any]

MAX_PIXELS = "UNET_DIFFUSION_MAX_PIXELS"  # environment variable that sets PIL.Image.MAX_IMAGE_PIXELS
PROTOCOLS = ("http", "https", "hf", "s3", "gs", "gcs", "az", "abfs", "memory")  # that an image is read by


def read_bytes(source: ImageLike) -> tuple[bytes, str]:
    """The bytes of a file and its name for messages."""
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
            raise ValueError(f"{name} is no file, but a folder, a pipe or a device; give an image file.")
        return path.read_bytes(), name
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}; check the path and its rights.") from error


def _download(url: str, protocol: str) -> bytes:
    """The bytes of a remote file.

    The URL may come from a downloaded table, so it cannot name a file system that does more than to fetch a file, or
    one that is built on another.
    """
    if protocol not in PROTOCOLS or "::" in url:
        raise ValueError(f"{url} cannot be read: images are fetched by {', '.join(PROTOCOLS)}; download it first.")
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except ImportError:
        raise
    except Exception as error:  # of whatever library fetches it
        raise ValueError(f"{url} cannot be read: {error}") from error


def pixel_limit() -> int | None:
    """How many pixels an image may have: a file of few bytes can hold so many that they fill the memory.

    It is `PIL.Image.MAX_IMAGE_PIXELS`, about 89 million, None for no limit; the environment variable
    `UNET_DIFFUSION_MAX_PIXELS` sets it.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    stated = os.environ.get(MAX_PIXELS)
    if stated is not None:
        if not stated.isdecimal() or int(stated) < 1:
            raise ValueError(f"{MAX_PIXELS} is {stated!r}; it is the number of pixels that an image may have.")
        Image.MAX_IMAGE_PIXELS = int(stated)  # which Pillow itself goes by as it opens a file
    return Image.MAX_IMAGE_PIXELS


def check_pixel_count(width: int, height: int, channels: int = 1) -> None:
    """Raises a ValueError for an image above the limit, which is one of pixels with up to 4 channels."""
    limit = pixel_limit()
    if limit is not None and width * height * -(-channels // 4) > limit:
        raise ValueError(too_large(f"{width}x{height} pixels of {channels} channels", limit))


def too_large(size: str, limit: int | None) -> str:
    """What is said of an image above the limit."""
    return (
        f"it has {size}, above the limit of {limit} that guards against decompression bombs; if you trust it, set the "
        f"environment variable {MAX_PIXELS} to more."
    )
