"""The options of the experiment, and the runs that follow from them."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow.parquet
import torch

from scripts import NETWORKS
from scripts.experiments.cases import check_cases, label_counts, short_hash
from scripts.experiments.label_efficiency.networks import monai_features
from scripts.experiments.label_efficiency.nnunet_worker import CHANGED
from scripts.experiments.label_efficiency.unimatch import CONFIDENCE, VALUES
from scripts.reports import content_hash
from unet_diffusion.checks import is_count, is_number, require, require_each
from unet_diffusion.data.masked.config import AugmentationConfig, MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.files import written_aside
from unet_diffusion.network.config import Precision
from unet_diffusion.network.precision import settled_precision
from unet_diffusion.saved_index import read_object
from unet_diffusion.tasks.config import DiffusionConfig, JointConfig, SegmentationConfig
from unet_diffusion.tasks.self_training import COLOUR, START
from unet_diffusion.training.config import OptimizerName, TrainingConfig

Method = Literal[
    "scratch",
    "self_training",
    "pretrained",
    "pretrained_self_training",
    "joint",
    "pixel_classifier",
    "unimatch",
    "monai",
    "imagenet",
    "nnunet",
]
METHODS: tuple[Method, ...] = get_args(Method)
NNUNET = "nnunet"  # needs a Python of its own
USUAL = tuple(method for method in METHODS if method != NNUNET)
FINE_TUNED = ("pretrained", "pretrained_self_training", "joint")  # methods that train a noise predictor on masks
FROM_DDPM = (*FINE_TUNED, "pixel_classifier")  # methods that start from a noise predictor
PEERS = ("monai", "imagenet")  # methods with another network than ours
SELF_TRAINED = ("self_training", "pretrained_self_training")
UNIMATCH = "unimatch"
PARTS = ("train", "validation", "test")
VALIDATIONS = 10  # of a run that has `minutes`
INVERTED = 0.5  # share of the samples of `inverted_sets`
SMALLEST_MONAI = 32  # pixels a side
# in the config of a run
TRAINING = ("steps", "batch_size", "optimizer", "learning_rate", "mixed_precision", "warmup_steps", "ema_decay")
OBJECTIVE = DiffusionConfig(preview_images=4)  # of the noise predictors
FILES = "files"  # in the config of a run: a hash of the content of its set
BY_PACE = ("steps", "warmup_steps")  # of these, what follows from `minutes`
COUNTS = (
    *("crop_size", "steps", "batch_size", "validate_every", "pretraining_steps", "pretraining_batch_size"),
    *("nnunet_patch", "nnunet_batch", "nnunet_features"),
)


@dataclass
class LabelEfficiency:
    """Learn masks from few labelled images in several ways, and score all of them on the same test images."""

    data: Path
    """Folder that holds the sets, each a folder with `train.parquet`, `validation.parquet` and `test.parquet`."""
    output: Path
    """Folder for the runs, the table and the plot."""
    results: Path | None = None
    """JSON list of all runs; by default `label_efficiency.json` in the output folder."""
    sets: tuple[str, ...] = ("dsb2018", "wbc", "isbi2012")
    """Names of the sets, which are those of their folders."""
    methods: tuple[Method, ...] = USUAL
    """Ways to learn. Our network from "scratch" or "pretrained" (from DDPM training on all images), both also with
    "self_training" on all training images; "joint" training, which also predicts noise; a "pixel_classifier" on frozen
    features; "unimatch", the training of a peer on all training images; "monai", a peer with as many parameters, from
    scratch; "imagenet", an encoder with ImageNet weights; "nnunet", nnU-Net v2 in 2D, which needs `nnunet_python` and
    is not in the default."""
    labels: tuple[int | Literal["all"], ...] = (1, 5, 10, 40, "all")
    """Numbers of labelled images, the first of the training set; numbers above the size of a set are left out."""
    draws: tuple[int, ...] = (0,)
    """Choices of the labelled images: 0 takes the first of the training set, others the first after a shuffle by this
    number."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialisation, order, crops and augmentation; the noise predictor is the same for all."""
    crop_size: int = 64
    """Side of the training squares in pixels; validation and test images stay whole."""
    steps: int = 400
    """Optimizer steps of each run, without `minutes`."""
    minutes: float | None = None
    """Processor minutes of the steps of each run, including those of its noise predictor; it has as many steps as fit,
    and 10 validations. By default all runs have `steps`."""
    patience: int | None = None
    """Stop a run after this many validations without a better one, at the learning rate of that step; by default it
    goes to its last step, where the rate is 0. To see whether longer runs are better, compare several `minutes`."""
    batch_size: int = 8
    """Squares per step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW, the same for all methods."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of our networks on masks; the others have AdamW."""
    validate_every: int = 100
    """Steps between validations; the weights of the best one are tested."""
    network: Path = NETWORKS / "quarter-width.json"
    """JSON file of our network's config values."""
    pretraining_steps: int = 4800
    """Optimizer steps of the noise predictor, without `minutes`."""
    pretraining_share: float = 0.5
    """With `minutes`, the share of them that the noise predictor takes; it has as many steps as fit."""
    pretraining_batch_size: int = 16
    """Squares per step of the noise predictor."""
    timestep: float | None = None
    """Timestep of pretrained networks when they segment; by default their own, 0."""
    trunk_rate: float = 1.0
    """Learning rate of a pretrained trunk, relative to learning_rate."""
    learn: Literal["everything", "decoder", "head"] = "everything"
    """The part of a pretrained network that learns."""
    denoising_weight: float = 1.0
    """Weight of the noise-prediction loss in joint training."""
    self_training_weight: float = 1.0
    """Weight of the loss on the network's own masks in self-training."""
    confidence: float = 0.9
    """Lowest probability at which self-training uses the network's class as a label."""
    nnunet_python: Path | None = None
    """Python of an environment with nnU-Net 2, for the method "nnunet"."""
    nnunet_patch: int = 128
    """Largest side of nnU-Net's patches in pixels; smaller images are the patch, as its planner has it. With two of
    them, a step has by default as many pixels as one of the other methods."""
    nnunet_batch: int = 2
    """Patches per step of nnU-Net; 2 is what its planner has for few images."""
    nnunet_features: int = 8
    """Channels of nnU-Net's first level; its planner has 32, with which few steps fit into some minutes."""
    inverted_sets: tuple[str, ...] = ("dsb2018",)
    """Sets with half of the training samples inverted, for all methods; other sets follow `augmentation`."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        """Checks every value."""
        self.results = self.results or self.output / "label_efficiency.json"
        check_cases(self, METHODS)
        require_each(self, COUNTS, is_count, "must be at least 1; leave it out for the default")
        require_each(self, ("minutes",), lambda value: is_number(value) and value > 0, "must be above 0")
        share = is_number(self.pretraining_share) and 0 < self.pretraining_share < 1
        require(share, "pretraining_share", self.pretraining_share, "must be above 0 and below 1")
        if "monai" in self.methods:
            rule = f"MONAI's network needs at least {SMALLEST_MONAI}; give more, or leave monai out of methods"
            require(self.crop_size >= SMALLEST_MONAI, "crop_size", self.crop_size, rule)
        if NNUNET in self.methods and not (self.nnunet_python and self.nnunet_python.is_file()):
            raise ValueError(
                f"nnunet_python is {self.nnunet_python}, but the method nnunet needs the Python of an environment with "
                f"nnU-Net 2; give --nnunet-python, or leave nnunet out of methods."
            )
        if self.timestep is not None:
            last = DiffusionConfig().num_train_timesteps
            rule = f"must be from 0 to below {last}; leave it out for the network's own"
            require(0 <= self.timestep < last, "timestep", self.timestep, rule)
        rule = "must be above 0; for masks alone, use the method pretrained"
        require_each(self, ("denoising_weight", "self_training_weight"), lambda value: value > 0, rule)
        JointConfig(self_training_weight=self.self_training_weight, confidence=self.confidence)
        if self.learn == "head" and "joint" in self.methods:
            raise ValueError("learn is 'head', but joint training moves the trunk; leave joint out of methods.")
        SegmentationConfig(learn=self.learn, trunk_rate=self.trunk_rate, patience=self.patience)
        self.training(0)
        if self.network.suffix != ".json" or not self.network.is_file():
            raise ValueError(f"network is {self.network}, but must be a JSON file of config values; give its path.")
        for path in (self.data / name / f"{part}.parquet" for name in self.sets for part in PARTS):
            if not path.is_file():
                raise ValueError(f"sets names {path.parent.name!r}, but there is no {path}; give data or other sets.")

    def training(self, seed: int, steps: int | None = None, optimizer: OptimizerName = "adamw") -> TrainingConfig:
        """The training options of the runs of a seed; with `steps`, of those that fit into `minutes`."""
        every = self.validate_every if steps is None else max(1, steps // VALIDATIONS)
        steps = self.steps if steps is None else steps
        return TrainingConfig(
            steps=steps,
            batch_size=self.batch_size,
            optimizer=optimizer,
            learning_rate=self.learning_rate,
            mixed_precision=self.precision,
            warmup_steps=steps // 10,
            ema_decay=0.99,
            validate_every=every,
            preview_every=steps,
            checkpoint_every=every,
            keep_checkpoints=1,
            trackers=(),
            seed=seed,
        )

    @property
    def precision(self) -> Precision:
        """The precision of all runs, which is that of the commands on this machine."""
        return settled_precision("auto", torch.device("cpu"))

    def pretraining(self, steps: int | None = None) -> TrainingConfig:
        """The training options of the noise predictor, which ignore the learning rate and the seeds of the runs."""
        steps = self.pretraining_steps if steps is None else steps
        return TrainingConfig(
            steps=steps,
            batch_size=self.pretraining_batch_size,
            optimizer="muon",
            mixed_precision=self.precision,
            warmup_steps=steps // 10,
            ema_decay=0.998,
            preview_every=steps,
            checkpoint_every=200,
            keep_checkpoints=1,
            trackers=(),
        )

    def network_values(self) -> dict[str, Any]:
        """The values in the network's file, without its remarks."""
        return {key: value for key, value in read_object(self.network).items() if not key.startswith("_")}

    def segmentation(self, method: str) -> SegmentationConfig:
        """The loss, and the part of the network that learns."""
        if method in FINE_TUNED:
            recipe = {"learn": self.learn, "trunk_rate": self.trunk_rate, "timestep": self.timestep}
            return SegmentationConfig(**recipe, patience=self.patience, preview_images=4)
        learn: Any = "pixel_classifier" if method == "pixel_classifier" else "everything"
        return SegmentationConfig(learn=learn, patience=self.patience, preview_images=4)

    def joint(self, method: str) -> JointConfig:
        """The losses on images without masks."""
        if method in SELF_TRAINED:
            return JointConfig(self_training_weight=self.self_training_weight, confidence=self.confidence)
        if method == UNIMATCH:  # whose task takes the images of this one
            return JointConfig(self_training_weight=1.0, confidence=CONFIDENCE)
        return JointConfig(self.denoising_weight if method == "joint" else 0.0, self_training_weight=0.0)

    def augmentation_of(self, name: str) -> AugmentationConfig:
        """The augmentation of the training images of a set."""
        return replace(self.augmentation, invert=INVERTED) if name in self.inverted_sets else self.augmentation

    def masked(
        self, name: str, labels: int | None = None, num_classes: int | None = None, draw: int = 0
    ) -> MaskedDataConfig:
        """The first `labels` images of a draw of a set with their masks, and its validation set."""
        return MaskedDataConfig(
            data=str(self.drawn(name, draw)),
            validation_data=str(self.data / name / "validation.parquet"),
            image_column="image",
            mask_column="mask",
            crop_size=self.crop_size,
            max_labels=labels,
            num_classes=num_classes,
        )

    def drawn(self, name: str, draw: int) -> Path:
        """The training set with its rows in the order of a draw, whose file is written unless it is there."""
        whole = self.data / name / "train.parquet"
        if not draw:
            return whole
        path = self.output / name / f"train-draw{draw}-{content_hash([whole])}.parquet"
        if not path.is_file():
            table = pyarrow.parquet.read_table(whole)
            with written_aside(path) as aside:
                pyarrow.parquet.write_table(table.take(np.random.default_rng(draw).permutation(len(table))), aside)
        return path

    def optimizer_of(self, method: str) -> OptimizerName:
        """The optimizer of a method."""
        return "adamw" if method in (*PEERS, "pixel_classifier") else self.optimizer

    def config(self, name: str, method: str, facts: "SetFacts") -> dict[str, Any]:
        """All values that the runs of a set by a method depend on, as JSON stores them."""
        if method == NNUNET:
            return self.nnunet_config(name)
        training = self.training(0, optimizer=self.optimizer_of(method))
        chosen = [name for name in TRAINING if self.minutes is None or name not in BY_PACE]
        config: dict[str, Any] = {
            "training": {name: getattr(training, name) for name in chosen},
            "crop_size": self.crop_size,
            "augmentation": asdict(self.augmentation_of(name)),
            FILES: content_hash(self.data / name / f"{part}.parquet" for part in PARTS),
        }
        config |= {"validate_every": self.validate_every} if self.minutes is None else {"minutes": self.minutes}
        if self.patience is not None:
            config["patience"] = self.patience
        if method == "monai":
            config["network"] = {"features": monai_features(self.network, facts.channels, facts.num_classes)}
        elif method == "imagenet":
            config["network"] = {"encoder": "efficientnet-lite0"}
        else:
            config["network"] = self.network_values()
        if method in FROM_DDPM:
            segmentation = self.segmentation(method)
            config["recipe"] = {key: getattr(segmentation, key) for key in ("learn", "trunk_rate", "timestep")}
            config["recipe"] |= {"denoising_weight": self.joint(method).denoising_weight}
            config["pretraining"] = self.pretraining_config()
        if method in SELF_TRAINED:
            config["self_training"] = {
                "weight": self.self_training_weight,
                "confidence": self.confidence,
                "colour": COLOUR,
                "start": START,
            }
        if method == UNIMATCH:
            config["unimatch"] = VALUES
        return json.loads(json.dumps(config))

    def nnunet_config(self, name: str) -> dict[str, Any]:
        """The same for nnU-Net, which has its own optimizer, learning rate and augmentation."""
        steps = {"steps": self.steps} if self.minutes is None else {}
        sizes = {"patch": self.nnunet_patch, "features": self.nnunet_features}
        config: dict[str, Any] = {
            "training": {**steps, "batch_size": self.nnunet_batch, "mixed_precision": self.precision},
            "inverted": name in self.inverted_sets,  # with a copy of each image
            FILES: content_hash(self.data / name / f"{part}.parquet" for part in PARTS),
            NNUNET: {**sizes, **CHANGED},
        }
        config |= {} if self.minutes is None else {"minutes": self.minutes}
        return json.loads(json.dumps(config))

    def pretraining_config(self) -> dict[str, Any]:
        """All values that the noise predictor of a set depends on, but for its images."""
        training = self.pretraining()
        config = {name: getattr(training, name) for name in TRAINING if self.minutes is None or name not in BY_PACE}
        if self.minutes is not None:
            config |= {"minutes": self.minutes, "share": self.pretraining_share}
        config |= {"crop_size": self.crop_size, "network": self.network_values(), "objective": asdict(OBJECTIVE)}
        return json.loads(json.dumps(config))

    def runs(self) -> "list[Run]":
        """All runs, one seed after the other."""
        made = []
        for name in self.sets:
            facts = set_facts(self.masked(name))
            fitting = label_counts(self.labels, facts.images, name)
            configs = {method: self.config(name, method, facts) for method in self.methods}
            made += [
                Run(name, method, count, seed, configs[method], draw)
                for draw in self.draws
                for seed in self.seeds
                for count in fitting
                for method in self.methods
                if draw == self.draws[0] or count < facts.images  # all images are the same in every draw
            ]
        return made


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        data: name of the set.
        method: the way to learn.
        labels: number of labelled images.
        seed: seed of the run.
        config: as `LabelEfficiency.config` gives it.
        draw: choice of the labelled images.
    """

    data: str
    method: str
    labels: int
    seed: int
    config: dict[str, Any]
    draw: int = 0

    @property
    def folder(self) -> str:
        """Its folder, relative to the output folder."""
        draw = f"-draw{self.draw}" if self.draw else ""
        return f"{self.data}/{self.method}-{self.labels}{draw}-seed{self.seed}-{short_hash(self.config)}"


@dataclass(frozen=True)
class SetFacts:
    """The number of images of a training set, their channels, and the number of classes in all of its masks."""

    images: int
    channels: int
    num_classes: int


def set_facts(config: MaskedDataConfig) -> SetFacts:
    """Reads the facts of a set from all of its masks, since the number of classes does not depend on the labels."""
    sets = load_masked(config)
    return SetFacts(len(sets.train), sets.train.channels, sets.num_classes)
