"""The files that the documents use: small images, masks and runs, under the same names."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from tests.package.documentation import ROOT, SMALL, commands
from tests.support.tiny import squares

RUNS = {  # that documents use, and how they come to be where a document does not train them itself
    "runs/mine": "unet-diffusion train-ddpm --output finished/runs/mine --data path/to/images",
    "runs/masks": "unet-diffusion train-segmentation --output finished/runs/masks --data path/to/labelled/images "
    "--masks path/to/labelled/masks --model finished/runs/mine",
}


def make_images(folder: Path) -> None:
    """Everything except our own runs, in a folder that stands for a clone of the repository."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "small.json").write_text(json.dumps(SMALL))
    place = folder / "path/to"
    for kind in ("one", "other"):
        noise(place / "images" / kind, count=36, side=16)
    noise(folder / "new/images", count=2, side=20)
    noise(folder / "small/images", count=2, side=8)
    shutil.copy(folder / "new/images/000.png", folder / "image.png")
    shutil.copy(folder / "small/images/000.png", folder / "small.png")
    np.save(folder / "slide.npy", np.zeros((40, 48, 3), np.uint8))
    for masked in (place / "labelled", place / "test", folder / "nuclei/labelled", folder / "nuclei/test"):
        objects(masked)
    other_forms(place)
    polygons(place)
    noise(folder / "nuclei/images", count=8, side=16)
    for path in (folder / "nuclei/labelled/images").iterdir():
        shutil.copy(path, folder / "nuclei/images" / path.name.replace("0", "1", 1))
    stock = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(stock, DDPMScheduler()).save_pretrained(folder / "ddpm-folder")


def polygons(place: Path) -> None:
    """The square of the first image as a polygon of labelme, YOLO and COCO."""
    points = [[2, 2], [9, 2], [9, 9], [2, 9]]
    name = min(path.stem for path in (place / "labelled/images").iterdir())
    width, height = Image.open(place / f"labelled/images/{name}.png").size
    shape = {"label": "cell", "shape_type": "polygon", "points": points}
    record = {"imagePath": f"{name}.png", "imageWidth": width, "imageHeight": height, "shapes": [shape]}
    part = {
        "image_id": 7,
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": [[value for point in points for value in point]],
    }
    image = {"id": 7, "file_name": f"{name}.png", "width": width, "height": height}
    for kind in ("labelme", "yolo"):
        (place / kind).mkdir()
    (place / f"labelme/{name}.json").write_text(json.dumps(record))
    (place / "coco.json").write_text(json.dumps({"images": [image], "annotations": [part], "categories": [{"id": 1}]}))
    (place / f"yolo/{name}.txt").write_text("0 " + " ".join(f"{x / width} {y / height}" for x, y in points) + "\n")


def train_runs() -> None:
    """Our own runs, in `finished` of the working directory."""
    for line in RUNS.values():
        (command,) = commands(line)
        command.shortened().run()


def noise(folder: Path, count: int, side: int) -> None:
    """Images of noise in colour."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")


def objects(folder: Path) -> None:
    """Images in colour and their masks."""
    squares(folder)
    for path in [*folder.glob("images/*.png"), *folder.glob("masks/*.png")]:
        image = Image.open(path).convert("RGB" if path.parent.name == "images" else "L")
        image.save(path.with_name(f"0{path.name}"))
        path.unlink()


def other_forms(place: Path) -> None:
    """The same images and masks as instances, in 16 bits, in one folder, as a table and as shards."""
    labelled = place / "labelled"
    for folder in (labelled / "instances", labelled / "microscope", place / "both", place / "shards"):
        folder.mkdir()
    images, masks = (sorted((labelled / name).iterdir()) for name in ("images", "masks"))
    for image, mask in zip(images, masks):
        inside = np.asarray(Image.open(mask))
        halves = inside * (1 + (np.arange(inside.shape[1]) % 2 == 0)).astype(np.uint8)
        Image.fromarray(halves).save(labelled / "instances" / mask.name)
        grey = np.asarray(Image.open(image).convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(labelled / "microscope" / image.name)
        shutil.copy(image, place / "both" / image.name)
        shutil.copy(mask, place / "both" / f"{mask.stem}_mask.png")
    columns = {"image": [str(path) for path in images], "mask": [str(path) for path in masks]}
    table = Dataset.from_dict(columns, features=Features({name: ImageFeature() for name in columns}))
    table.to_parquet(place / "table.parquet")
    with tarfile.open(place / "shards/shard-000.tar", "w") as shard:
        for image in images:
            shard.add(image, arcname=image.name)
