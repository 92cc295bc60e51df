"""Images that are already in memory: arrays, PIL images, lists of paths and data sets, given from Python."""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features
from PIL import Image

from unet_diffusion.data.config import IN_MEMORY, InMemory
from unet_diffusion.data.folders import states_of, stored_path
from unet_diffusion.images.axes import AxisOrder, counted
from unet_diffusion.images.decoding import EXIF_ORIENTATION, decode

IN_PNG = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})  # modes of PIL images that PNG keeps
KINDS = (
    "a name or path, a datasets.Dataset, a list of PIL images, arrays or paths, or one array (N, H, W) or (N, H, W, C)"
)
WITH_LABELS = "For images with labels give a datasets.Dataset with the columns image and label."
# Advice for other types that people may pass, by the first words of the types' names.
ADVICE = {
    "torch.Tensor": "pass images.numpy(), and axes='CHW' if they are (N, C, H, W)",
    "pandas.": "pass datasets.Dataset.from_pandas(frame)",
    "builtins.dict": "pass datasets.Dataset.from_dict(columns)",
    "datasets.dataset_dict.": "pass one of its splits, such as data['train']",
    "datasets.iterable_dataset.": "a stream is opened from its name or files, with streaming",
    "PIL.": "for one image pass a list of it",
    "builtins.generator": "pass a list",
}


def as_source(data: Any, option: str = "data", axes: AxisOrder | None = None) -> str:
    """Returns the source that a user gave as text: text as it is, a path as text, images as `InMemory`.

    Args:
        data: a name or path; a `datasets.Dataset`; a list of PIL images, arrays (H, W) or (H, W, C), or paths; or an
            array (N, H, W) or (N, H, W, C). In a list of masks, None stands for a missing one.
        option: the option's name, for messages.
        axes: the stated order of axes; with "CHW" one array may be (N, C, H, W).

    Raises:
        ValueError: the value has another type or shape, or holds no images.
    """
    if isinstance(data, str):
        return data
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    if isinstance(data, Dataset):
        return _named(data.with_format(None), counted(len(data), "row"))
    if isinstance(data, np.ndarray):
        _check_array(data, option, axes)
    elif not isinstance(data, (list, tuple)):
        raise ValueError(f"{option} is of type {_type(data)}, but must be {KINDS}; {_advice(data)}.")
    if len(data) == 0:
        raise ValueError(f"{option} is empty; give at least one image.")
    return _of_images(data, option)


def _of_images(images: Sequence[Any], option: str) -> InMemory:
    is_masks = "masks" in option
    digest = hashlib.sha256()
    cells: list[dict[str, Any] | None] = []
    for position, image in enumerate(images):
        name = f"{option}[{position}]"
        if image is None and is_masks:
            cells.append(None)
            digest.update(b"none")
        elif isinstance(image, (str, os.PathLike)):
            path = Path(image).expanduser()
            if not path.is_file():
                raise ValueError(f"{name} is {str(image)!r}, but there is no such file.")
            cells.append({"bytes": None, "path": stored_path(path.absolute())})
            digest.update(repr(states_of([path])).encode())
        else:
            data = _encoded(image, name, is_masks)
            cells.append({"bytes": data, "path": None})
            digest.update(hashlib.sha256(data).digest())
    rows = Dataset.from_dict({"image": cells}, features=Features({"image": datasets.Image(decode=False)}))
    rows = Dataset(rows.data, info=rows.info, fingerprint=digest.hexdigest()[:16])
    return _named(rows, counted(len(rows), "mask" if is_masks else "image"))


def _named(rows: Dataset, name: str) -> InMemory:
    return InMemory(f"{name}{IN_MEMORY}{rows._fingerprint})", rows)


def _encoded(image: Any, name: str, is_mask: bool) -> bytes:
    """Returns the bytes of a file that keeps every value: PNG for PIL images where PNG can, else `.npy`.

    A file that a PIL image was opened from may say how its pixels are meant: in which orientation, whether 0 is white,
    and on which scale. PNG keeps the first. The rest is applied as for files, so that images are as shown and masks as
    stored.
    """
    file = io.BytesIO()
    if isinstance(image, Image.Image):
        try:
            decoded = decode(image, reading="values" if is_mask else "image")
        except (ValueError, OSError) as error:
            raise ValueError(f"{name} cannot be used: {error}") from error
        if image.mode in IN_PNG and not decoded.white_is_zero and not (is_mask and decoded.scale != 1):
            exif = Image.Exif()
            if decoded.orientation != 1:
                exif[EXIF_ORIENTATION] = decoded.orientation
            whole = {"bits": 8} if image.mode == "P" else {}  # else indices beyond the palette lose their upper bits
            image.save(file, "PNG", compress_level=1, exif=exif, **whole)
        else:
            np.save(file, decoded.pixels[:, :, 0] if decoded.pixels.shape[2] == 1 else decoded.pixels)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.dtype.kind not in "buif":
            raise ValueError(
                f"{name} has shape {image.shape} and holds {image.dtype}, but an image is (H, W) or (H, W, C) and "
                f"holds integers or floats. {WITH_LABELS}"
            )
        np.save(file, image)
    else:
        raise ValueError(
            f"{name} is of type {_type(image)}, but must be a PIL image, an array (H, W) or (H, W, C), such as "
            f"image.numpy() of a tensor, or a path. {WITH_LABELS}"
        )
    return file.getvalue()


def _check_array(array: np.ndarray, option: str, axes: AxisOrder | None) -> None:
    shape = array.shape
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{option} is an array of shape {shape}, but must be (N, H, W) or (N, H, W, C); for one image give a list "
            "of it."
        )
    if array.ndim == 3 and 2 <= shape[2] <= 4:
        raise ValueError(
            f"{option} is an array of shape {shape}, which would be {shape[0]} images of {shape[2]} columns; for one "
            "image (H, W, C) give a list of it."
        )
    if array.ndim == 4 and axes is None and shape[1] <= 4 < shape[3]:
        raise ValueError(
            f"{option} is an array of shape {shape}, which looks like (N, C, H, W), but must be (N, H, W, C). Give "
            "axes='CHW' if it is the former, or axes='HWC' if it is the latter."
        )


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _advice(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    return next((advice for start, advice in ADVICE.items() if name.startswith(start)), "convert it to one of these")
