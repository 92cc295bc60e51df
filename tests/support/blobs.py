"""Images of blobs and their masks."""

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature


def blobs(folder, name: str, count: int) -> None:
    """Dark grey images with one bright square, which is class 1 and instance 1."""
    random = np.random.default_rng(len(name))
    columns: dict[str, list] = {"image": [], "mask": [], "instances": []}
    for _ in range(count):
        mask = np.zeros((48, 48), dtype=np.uint8)
        top, left = random.integers(4, 34, 2)
        mask[top : top + 10, left : left + 10] = 1
        grey = random.integers(0, 60, (48, 48)) + 150 * mask
        columns["image"].append(np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2))
        columns["mask"].append(mask)
        columns["instances"].append(mask)
    features = Features({key: ImageFeature() for key in columns})
    Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
