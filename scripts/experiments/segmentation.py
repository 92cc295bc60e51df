"""Compares our networks, networks of other libraries and a threshold on one labelled set.

All networks have the same steps, batches, augmentation, loss and evaluation. Each is trained on `train.parquet`; the
weights with the best mean IoU on `validation.parquet` are scored once on `test.parquet`. Writes `comparison.json`,
`comparison.md` and `overlays.png`. Finished networks are not trained again; if
the options or images are others, this ends with an error.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from skimage.filters import threshold_multiotsu
from torch import Tensor

from scripts import NETWORKS
from scripts.benchmarks.other_libraries import BatchNormUNet, MonaiUNet, Peer
from scripts.experiments.cases import half_interval
from scripts.reports import markdown_table
from unet_diffusion import UNet
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig, MaskedOptions
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.data.record import make_record
from unet_diffusion.evaluation.mask_scores import Scores, labelled_for, score_masks
from unet_diffusion.files import write_json, write_text
from unet_diffusion.images.figures import grid, save_image
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_unet
from unet_diffusion.tasks.config import SegmentationConfig
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.trainer import Trainer

Name = Literal["ours", "ours-2m", "ours-lean", "ronneberger-2015", "monai-basic-unet", "batch-norm-unet"]
OURS = {
    "ours": "half-width.json",
    "ours-2m": "segmentation-2m.json",
    "ours-lean": "segmentation-lean.json",
    "ronneberger-2015": "ronneberger-quarter.json",
}
PEERS: dict[str, type[Peer]] = {"monai-basic-unet": MonaiUNet, "batch-norm-unet": BatchNormUNet}
OTHERS = ("ours-2m", "ours-lean", "ronneberger-2015", *PEERS)  # compared with ours image by image
OVERLAID = (0, 20, 40, 60)  # indices of test images, modulo the size of the set
COLOURED = 1.0  # least mean difference of the channels of colour images, in grey levels
DARK = 110  # mean grey level below which objects are bright on black

Predict = Callable[[Tensor], Tensor]  # stored image (C, H, W) to mask (H, W)


@dataclass
class Comparison:
    """Train and score several networks on one labelled set."""

    data: Path
    """Folder with `train.parquet`, `validation.parquet` and `test.parquet`."""
    output: Path
    """Folder for the runs and the results."""
    networks: tuple[Name, ...] = ("ours", "ronneberger-2015", "monai-basic-unet")
    """Networks to compare."""
    crop_size: int = 128
    """Side of the training squares in pixels; the unpadded network gets 188 more, for about the same output."""
    steps: int = 1200
    """Optimizer steps of each network."""
    batch_size: int = 4
    """Squares per step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW, the same for all."""
    instances: bool = False
    """The set has a column `instances`; the network of 2015 then learns with border weights."""
    membrane: int | None = None
    """Class of the membrane between cells, as for `unet-diffusion evaluate`."""
    seed: int = 0
    """Determines initialisation, order, crops and augmentation."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


def compare(options: Comparison) -> str:
    """Trains the networks that are not finished, scores all on the test set, and returns the table."""
    pipes = {name: train(options, name) for name in options.networks}
    first = next(iter(pipes.values()))
    test = labelled_for(
        first,
        MaskedOptions(
            data=str(options.data / "test.parquet"), instances_column="instances" if options.instances else None
        ),
    )
    predictors: dict[str, Predict] = {
        "most frequent class": most_frequent(test),
        "threshold": threshold(test.num_classes),
    }
    predictors |= {name: pipe.predictor() for name, pipe in pipes.items()}
    scores = {name: score_masks(predict, test, membrane=options.membrane) for name, predict in predictors.items()}
    parameters = {name: pipe.unet.num_parameters() for name, pipe in pipes.items()}
    save_image(overlays(test, {name: predictors[name] for name in pipes}, first), options.output / "overlays.png")
    results = {
        "options": asdict(options),
        "parameters": parameters,
        "scores": {name: each.to_dict() for name, each in scores.items()},
    }
    write_json(options.output / "comparison.json", results)
    text = table(scores, parameters) + differences(scores)
    write_text(options.output / "comparison.md", text)
    return text


def train(options: Comparison, name: str) -> SegmentationPipeline:
    """Trains a network and returns a pipeline with its weights of the best validation.

    Raises:
        ValueError: the folder of the network has a run with other options, another network or other images.
    """
    unpadded = name == "ronneberger-2015"
    config = MaskedDataConfig(
        data=str(options.data / "train.parquet"),
        validation_data=str(options.data / "validation.parquet"),
        crop_size=options.crop_size + 188 if unpadded else options.crop_size,
        instances_column="instances" if options.instances and unpadded else None,
        border_weights=options.instances and unpadded,
    )
    training = TrainingConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=min(50, options.steps),
        ema_decay=0.99,
        validate_every=200,
        preview_every=options.steps,
        checkpoint_every=200,
        keep_checkpoints=1,
        seed=options.seed,
    )
    output = options.output / name
    accelerator = make_accelerator(training, output)
    data = load_masked(config, options.seed)
    torch.manual_seed(keyed_seed(options.seed, "initialisation"))
    untrained = network(name, data)
    task = SegmentationTask(untrained, data, SegmentationConfig(), options.augmentation)
    resolved = {
        "data": asdict(config),
        "training": asdict(training),
        "augmentation": asdict(options.augmentation),
        "network": {"network": {key: value for key, value in untrained.config.items() if not key.startswith("_")}},
    }
    Trainer(task, training, output, resolved, accelerator, make_record(data, config.preparation)).run()
    kind = PEERS.get(name, UNet)
    return task.pipeline(kind.from_pretrained(output / "unet"))


def network(name: str, data: MaskedSets) -> UNet | Peer:
    """An untrained network for the channels and classes of the data."""
    channels = data.train.channels
    if name in PEERS:
        return PEERS[name](channels, data.num_classes)
    wanted = {"in_channels": channels, "out_channels": None, "num_classes": data.num_classes}
    return load_unet(str(NETWORKS / OURS[name]), wanted)


def most_frequent(test: MaskedDataset) -> Predict:
    """Predicts the most frequent class of the test set everywhere."""
    label = int(test.class_counts().argmax())
    return lambda image: torch.full(image.shape[1:], label)


def threshold(num_classes: int) -> Predict:
    """Predicts by Otsu's thresholds of each image, with some knowledge of the three sets.

    In an electron micrograph (one channel) the darker part is class 0, the membrane. In colour images class 0 is the
    brightest part of the green channel, as in blood smears, but in fluorescence images (grey and dark) the darkest.
    """

    def predict(image: Tensor) -> Tensor:
        values = image.numpy()  # integers, so that each grey level has its own bin
        level = values[1] if len(values) == 3 else values[0]  # the green channel
        found = np.digitize(level, threshold_multiotsu(level, num_classes), right=True)
        fluorescence = (
            len(values) == 3 and np.ptp(values.astype(np.int64), axis=0).mean() < COLOURED and values.mean() < DARK
        )
        ascending = len(values) == 1 or fluorescence
        return torch.from_numpy(found if ascending else num_classes - 1 - found)

    return predict


def overlays(test: MaskedDataset, predictors: dict[str, Predict], pipe: SegmentationPipeline) -> Image.Image:
    """Test images, each in a row with its mask and the masks of all networks."""
    shown: list[Any] = []
    for index in sorted({index % len(test) for index in OVERLAID}):
        image, mask = test[index]["image"], test[index]["mask"]
        masks = [mask, *(predict(image) for predict in predictors.values())]
        shown += [pipe.overlay(image, np.zeros(mask.shape, np.uint8))]
        shown += [pipe.overlay(image, each.numpy(), opacity=0.7) for each in masks]
    return grid(shown, columns=len(predictors) + 2)


def table(scores: dict[str, Scores], parameters: dict[str, int]) -> str:
    """One line for each network, as Markdown."""
    first = next(iter(scores.values()))
    names = ["accuracy", "mean_iou", "mean_dice", *(f"iou_{label}" for label in range(first.num_classes))]
    others = [key for key in ("boundary_f1", "cell_rand_error", "instance_rand_error") if key in first.per_image]
    lines = []
    for name, each in scores.items():
        figures = [each.pooled[key] for key in names] + [each.per_image[key] for key in others]
        count = f"{parameters[name]:,}" if name in parameters else ""
        lines.append([name, count, *(f"{figure:.4f}" for figure in figures)])
    return markdown_table(("network", "parameters", *names, *others), lines)


def differences(scores: dict[str, Scores]) -> str:
    """The differences between ours and each other network on the same images, with 95% intervals, as Markdown."""
    lines = []
    for other in (name for name in OTHERS if name in scores and "ours" in scores):
        parts = []
        for key in ("mean_iou", "boundary_f1", "cell_rand_error", "instance_rand_error"):
            pairs = zip(scores["ours"].images, scores[other].images)
            found = np.array([ours[key] - theirs[key] for ours, theirs in pairs if key in ours])
            found = found[~np.isnan(found)]
            if len(found) > 1:
                parts.append(f"{key} {found.mean():+.4f} +- {half_interval(found):.4f}")
        lines.append(f"\nours minus {other}, mean over images: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(compare(tyro.cli(Comparison, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))))
