"""Images and masks that are both in memory, given from Python."""

import datasets
from datasets import Dataset

from unet_diffusion.data.columns import find_image_column, undecoded
from unet_diffusion.data.config import InMemory
from unet_diffusion.data.folders import check_only_split


def masked_rows(source: str, split: str, masks: InMemory) -> Dataset:
    """Returns undecoded columns `image` and `mask` of images and masks that are given in the same order.

    From a data set of masks, the column `mask` is taken, or else the only column of images.

    Raises:
        ValueError: the images are not in memory, or their number differs from that of the masks.
    """
    if not isinstance(source, InMemory):
        raise ValueError(f"masks are {masks}, but data is {source!r}; give both in memory, or both as files.")
    check_only_split(source, split)
    images = _only(source, find_image_column(source.rows.features, None, source), "image")
    has_mask = "mask" in masks.rows.features
    drawn = _only(masks, "mask" if has_mask else find_image_column(masks.rows.features, None, masks), "mask")
    if len(images) != len(drawn):
        raise ValueError(f"data is {source}, but masks are {masks}; give one mask for each image, in the same order.")
    rows = datasets.concatenate_datasets([images, drawn], axis=1)
    fingerprint = datasets.fingerprint.Hasher.hash([source, masks])
    return Dataset(rows.data, info=rows.info, fingerprint=fingerprint)


def _only(source: InMemory, column: str, name: str) -> Dataset:
    """Returns only one column, undecoded and under this name."""
    rows: Dataset = source.rows.select_columns([column])
    rows = undecoded(rows, column, f"{name}_column")
    return rows if column == name else rows.rename_column(column, name)
