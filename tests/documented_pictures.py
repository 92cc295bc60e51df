"""What the documents name and a reader has: small pictures, masks and runs, under the same names."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from documentation import ROOT, SMALL, commands
from PIL import Image
from tiny import squares

RUNS = {  # that documents use, and how they come to be where a document does not train them itself
    "runs/mine": "unet-diffusion train-ddpm --output finished/runs/mine --data path/to/pictures",
    "runs/masks": "unet-diffusion train-segmentation --output finished/runs/masks --data path/to/images "
    "--masks path/to/masks --model finished/runs/mine",
}


def make_pictures(folder: Path) -> None:
    """Everything but our own runs, in a folder that stands for a clone of the repository."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "small.json").write_text(json.dumps(SMALL))
    place = folder / "path/to"
    for kind in ("one", "other"):
        noise(place / "pictures" / kind, count=36, side=16)
    noise(folder / "new/pictures", count=2, side=20)
    noise(folder / "small/pictures", count=2, side=8)
    shutil.copy(folder / "new/pictures/000.png", folder / "picture.png")
    shutil.copy(folder / "small/pictures/000.png", folder / "small.png")
    np.save(folder / "slide.npy", np.zeros((40, 48, 3), np.uint8))
    for masked in (place, place / "test", folder / "nuclei/labelled", folder / "nuclei/test"):
        objects(masked)
    other_forms(place)
    for masked in (folder / "nuclei/labelled", folder / "nuclei/test"):
        (masked / "images").rename(masked / "pictures")
    noise(folder / "nuclei/pictures", count=8, side=16)
    for path in (folder / "nuclei/labelled/pictures").iterdir():
        shutil.copy(path, folder / "nuclei/pictures" / path.name.replace("0", "1", 1))
    stock = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(stock, DDPMScheduler()).save_pretrained(folder / "ddpm-folder")


def train_runs() -> None:
    """Our own runs, in `finished` of the working directory."""
    for line in RUNS.values():
        (command,) = commands(line)
        command.shortened().run()


def noise(folder: Path, count: int, side: int) -> None:
    """Pictures of noise in colour."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")


def objects(folder: Path) -> None:
    """Pictures in colour and their masks."""
    squares(folder)
    for path in [*folder.glob("images/*.png"), *folder.glob("masks/*.png")]:
        picture = Image.open(path).convert("RGB" if path.parent.name == "images" else "L")
        picture.save(path.with_name(f"0{path.name}"))
        path.unlink()


def other_forms(place: Path) -> None:
    """The same pictures and masks as instances, in 16 bits, in one folder, as a table and as shards."""
    for name in ("instances", "microscope", "both", "shards"):
        (place / name).mkdir()
    images, masks = (sorted((place / name).iterdir()) for name in ("images", "masks"))
    for image, mask in zip(images, masks):
        inside = np.asarray(Image.open(mask))
        halves = inside * (1 + (np.arange(inside.shape[1]) % 2 == 0)).astype(np.uint8)
        Image.fromarray(halves).save(place / "instances" / mask.name)
        grey = np.asarray(Image.open(image).convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(place / "microscope" / image.name)
        shutil.copy(image, place / "both" / image.name)
        shutil.copy(mask, place / "both" / f"{mask.stem}_mask.png")
    columns = {"image": [str(path) for path in images], "mask": [str(path) for path in masks]}
    table = Dataset.from_dict(columns, features=Features({name: ImageFeature() for name in columns}))
    table.to_parquet(place / "table.parquet")
    with tarfile.open(place / "shards/shard-000.tar", "w") as shard:
        for image in images:
            shard.add(image, arcname=image.name)
