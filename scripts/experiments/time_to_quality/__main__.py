r"""Compares the training time until images are good: our recipe and the training example of diffusers.

Three trainings on one thread, of networks with equal parameters: the example as published, the example with a tuned
learning rate, and `train-ddpm` with its defaults. Ours runs at several lengths, since a decaying learning rate makes
the last steps the best. Time is CPU seconds of the training steps. Snapshots of the averaged weights are judged by the
Frechet distance of their images, which one sampler makes for all.

    OMP_NUM_THREADS=1 python -m scripts.experiments.time_to_quality \
        --data fashion_mnist/train.parquet --output runs/quality

Writes `quality.json`, `quality.md` and `quality.png`. The same command resumes a stopped comparison; with `--only`,
parts of it can run in parallel.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import torch
import tyro
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from scripts import NETWORKS
from scripts.benchmarks.result_row import table
from scripts.experiments.time_to_quality.quality import (
    OURS,
    PUBLISHED,
    TUNED,
    Point,
    judge,
    peer_network,
    points_table,
    rows,
    save_plot,
)
from scripts.experiments.time_to_quality.training import (
    PeerTraining,
    PublishedRecipe,
    snapshot_path,
    snapshot_steps,
    train_ours,
)
from unet_diffusion.checks import require, require_choice
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.train_ddpm import make_unet
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.drawn_images import drawn
from unet_diffusion.data.sets import load_images
from unet_diffusion.diffusion.config import SamplerName
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.evaluation.feature_networks import FeatureNetwork, feature_network, features_of
from unet_diffusion.files import write_json, write_text
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unet import UNet

FOLDERS = {PUBLISHED: "published", TUNED: "tuned", OURS: "ours"}


@dataclass
class TimeToQuality:
    """Compare the training time until images are good."""

    data: str
    """Training images, such as Fashion-MNIST; the real images of the distances are drawn from them."""
    output: Path
    """Folder of the runs and the results."""
    only: tuple[str, ...] = ()
    """Runs to train, such as published or ours-360; by default all. Only finished runs are judged."""
    peer_steps: int = 4500
    """Optimizer steps of the example, which take 15 to 20 CPU minutes."""
    peer_channels: tuple[int, ...] = (16, 32, 48)
    """Channels of the example's network at each resolution, multiples of 8; as many parameters as ours within 5 %."""
    tuned_learning_rate: float = 1e-3
    """Learning rate of the example in the second training."""
    tuned_precision: Precision = "no"
    """Precision of the example in the second training: "no" (float32, as published), "bf16" or "auto" (as ours)."""
    warmup_steps: int = 500
    """Warm-up steps of the example, as published."""
    our_steps: tuple[int, ...] = (180, 360, 1080)
    """Lengths of our training in optimizer steps."""
    batch_size: int = 16
    """Images per step of ours, by default as in the example; few steps of many images learn less in the same time."""
    snapshots: int = 3
    """How many of the last snapshots of each run are judged; each is at twice the steps of the one before."""
    images: int = 2000
    """Number of images generated from each snapshot, and of real ones."""
    sampler: SamplerName = "sde-dpm-solver++"
    """Sampler of all images, with 20 steps. The default is the one with which noise predictors, as the example trains
    them, are best."""
    model: str = str(NETWORKS / "digits.json")
    """Our network: a preset or a JSON file of config values."""
    seed: int = 0
    """Determines everything random."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in self.only:
            require(name in self.runs, "only", name, f"must be among {', '.join(self.runs)}")
        require(self.snapshots >= 1, "snapshots", self.snapshots, "must be at least 1")
        require_choice("sampler", self.sampler, get_args(SamplerName))

    @property
    def runs(self) -> dict[str, tuple[str, int]]:
        """The training and the number of steps of each run, by its folder."""
        peers = {FOLDERS[name]: (name, self.peer_steps) for name in (PUBLISHED, TUNED)}
        return peers | {f"{FOLDERS[OURS]}-{steps}": (OURS, steps) for steps in self.our_steps}

    def recipe(self, name: str) -> PublishedRecipe:
        """The recipe of a peer."""
        recipe = PublishedRecipe(self.peer_steps, warmup_steps=self.warmup_steps, seed=self.seed)
        if name == TUNED:
            precision = settled_precision(self.tuned_precision, torch.device("cpu"))
            recipe = replace(recipe, learning_rate=self.tuned_learning_rate, mixed_precision=precision)
        return recipe

    def ours(self, steps: int) -> TrainDDPM:
        """The options of `train-ddpm` for a run of ours."""
        training = TrainingConfig(
            steps=steps,
            batch_size=self.batch_size,
            warmup_steps=steps // 10,
            preview_every=steps,
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
            trackers=(),
            seed=self.seed,
        )
        return TrainDDPM(
            self.output / f"{FOLDERS[OURS]}-{steps}", self.model, DataConfig(data=self.data), training=training
        )


def time_to_quality(config: TimeToQuality) -> str:
    """Trains and judges what is not on disk, and returns the table of ratios."""
    torch.set_num_threads(1)
    data = load_images(DataConfig(data=config.data)).train
    assert isinstance(data, ImageDataset)
    check_parameters(our_network(config, data), peer_network(data.height, data.channels, config.peer_channels))
    for folder, (name, steps) in config.runs.items():
        if (not config.only or folder in config.only) and not snapshot_path(config.output / folder, steps).exists():
            if name == OURS:
                train_ours(config.ours(steps))
            else:
                torch.manual_seed(keyed_seed(config.seed, "initialisation"))
                network = peer_network(data.height, data.channels, config.peer_channels)
                PeerTraining(network, config.recipe(name), data, config.output / folder).run()
    curves = judge_all(config, data)
    save_plot(curves, config.output / "quality.png")
    found = rows(curves)
    text = table(found) + "\n" + points_table(curves)
    written = {name: [asdict(point) for point in points] for name, points in curves.items()}
    write_json(
        config.output / "quality.json",
        {"options": asdict(config), "curves": written, "rows": [asdict(row) for row in found]},
    )
    write_text(config.output / "quality.md", text)
    return text


def check_parameters(ours: UNet, theirs: UNet2DModel) -> None:
    """Raises a ValueError if the networks differ by more than 5 % in their number of parameters."""
    count, their_count = (sum(p.numel() for p in network.parameters()) for network in (ours, theirs))
    require(
        abs(their_count / count - 1) <= 0.05,
        "peer_channels",
        theirs.config.block_out_channels,
        f"must give as many parameters as ours within 5 %, {count:,}; they give {their_count:,}",
    )


def judge_all(config: TimeToQuality, data: ImageDataset) -> dict[str, list[Point]]:
    """The points of every finished run; each is written to a file as soon as it is known."""
    trained = {
        folder: (name, steps)
        for folder, (name, steps) in config.runs.items()
        if snapshot_path(config.output / folder, steps).exists()
    }
    features = cache(lambda: real_features(config))
    curves = {}
    for folder, (name, steps) in trained.items():
        points = []
        for step in snapshot_steps(steps)[-config.snapshots :]:
            path = config.output / folder / "scores" / f"step-{step:08d}-{config.images}-{config.sampler}.json"
            if not path.exists():
                scheduler = DiffusionConfig().make_scheduler() if name == OURS else DDPMScheduler()
                peer = peer_network(data.height, data.channels, config.peer_channels)
                network = our_network(config, data) if name == OURS else peer
                point = judge(config.output / folder, step, network, sampler(config.sampler, scheduler), *features())
                write_json(path, asdict(point))
            points.append(Point(**json.loads(path.read_text(encoding="utf-8"))))
        curves[f"{name}, {steps} steps" if name == OURS else name] = points
    return curves


def our_network(config: TimeToQuality, data: ImageDataset) -> UNet:
    """Our untrained network."""
    return make_unet(config.ours(1), data.height, data.width, data.channels, data.class_names)


def real_features(config: TimeToQuality) -> tuple[FeatureNetwork, Tensor]:
    """The feature network, and the features (N, D) of the real images."""
    network = feature_network("efficientnet-lite0")
    return network, features_of(network, drawn(load_images(DataConfig(data=config.data)).train, config.images))


if __name__ == "__main__":
    print(time_to_quality(tyro.cli(TimeToQuality, description=__doc__)))
