"""One run of the experiment with few labels: pretraining where it starts from that, training, and its test."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from few_labels.experiment import FROM_DDPM, LabelEfficiency, Run, SetFacts, set_facts, short_hash
from few_labels.networks import parameters, untrained_peer
from peers import Peer
from torch import Tensor

from unet_diffusion.accelerator import make_accelerator
from unet_diffusion.atomic import write_json
from unet_diffusion.checkpoints import Checkpoint
from unet_diffusion.data import DataConfig, load_images
from unet_diffusion.diffusion_task import DiffusionConfig, DiffusionTask
from unet_diffusion.evaluation import Scores, predictor, score_masks
from unet_diffusion.masked_data import MaskedOptions, MaskedSets, load_labelled, load_masked
from unet_diffusion.networks import load_pipeline
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.segmentation_task import SegmentationTask
from unet_diffusion.task import Task
from unet_diffusion.train_ddpm import TrainDDPM, make_unet
from unet_diffusion.train_segmentation import TrainSegmentation, make_task
from unet_diffusion.training import Trainer

INDEX = "model_index.json"  # comes last when a run is saved


class CountingTrainer(Trainer):
    """The trainer, which also counts CPU seconds of its steps (of this process), over all parts of a stopped run."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.cpu_seconds = 0.0
        self.at_checkpoints: dict[str, float] = {}  # by step

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        started = time.process_time()
        super()._train_step(batches)
        self.cpu_seconds += time.process_time() - started

    def _save(self) -> None:
        self.at_checkpoints[str(self.step)] = self.cpu_seconds
        write_json(seconds_file(self.output), self.at_checkpoints)  # first, so that every checkpoint has its seconds
        super()._save()

    def _restore(self, checkpoint: Checkpoint) -> None:
        super()._restore(checkpoint)
        self.at_checkpoints = json.loads(seconds_file(self.output).read_text(encoding="utf-8"))
        self.cpu_seconds = self.at_checkpoints[str(checkpoint.step)]


def seconds_file(folder: Path) -> Path:
    """CPU seconds until each checkpoint of a run."""
    return folder / "cpu_seconds.json"


def train_and_test(options: LabelEfficiency, run: Run) -> dict[str, Any]:
    """Trains a run, or goes on with it, and scores its weights of the best validation once on the test pictures.

    Returns:
        The run as the JSON file has it: `data`, `method`, `labels`, `seed`; `mean_iou` of the classes, the pixels of
        all test pictures counted together; `pictures`, the mean IoU of each, None where it is undefined;
        `validation_mean_iou`; `parameters` of all that predicts; `seconds`, CPU seconds of the training steps, and
        `pretraining_seconds`, those of the noise predictor that the run shares with others; `config`.
    """
    facts = set_facts(options.masked(run.data))
    start, pretraining_seconds = str(options.network), 0.0
    if run.method in FROM_DDPM:
        start, pretraining_seconds = pretrain(options, run.data)
    folder = options.output / run.folder
    config = TrainSegmentation(
        options.masked(run.data, run.labels, facts.num_classes),
        folder,
        start,
        options.segmentation(run.method),
        joint=options.joint(run.method),
        augmentation=options.augmentation,
        training=options.training(run.seed),
    )
    accelerator = make_accelerator(config.training, folder)
    data = load_masked(config.data, run.seed)
    torch.manual_seed(keyed_seed(run.seed, "initialisation"))
    task = task_of(run, config, data, facts)
    trainer = CountingTrainer(task, config.training, folder, asdict(config), accelerator)
    trainer.run()

    other = peer_of(run, facts)
    if other is None:
        pipe = load_pipeline(SegmentationPipeline, folder)
    else:  # low_cpu_mem_usage would make it without the weights that it loads by itself
        assert isinstance(task, SegmentationTask)
        pipe = task.pipeline(type(other).from_pretrained(folder / "unet", low_cpu_mem_usage=False))
    scores = score(options, run.data, pipe).to_dict()
    return {
        **{name: getattr(run, name) for name in ("data", "method", "labels", "seed")},
        "mean_iou": scores["pooled"]["mean_iou"],
        "validation_mean_iou": trainer.best.score,
        "seconds": trainer.cpu_seconds,
        "pretraining_seconds": pretraining_seconds,
        "parameters": sum(parameters(network) for network in (pipe.unet, pipe.classifier) if network is not None),
        "config": run.config,
        "pictures": [picture["mean_iou"] for picture in scores["pictures"]],
    }


def peer_of(run: Run, facts: SetFacts) -> Peer | None:
    """The untrained network of a run that does not use ours."""
    features = tuple(run.config["network"].get("features", ()))
    return untrained_peer(run.method, facts.channels, facts.num_classes, features)


def task_of(run: Run, config: TrainSegmentation, data: MaskedSets, facts: SetFacts) -> Task:
    """What `train_segmentation` would learn, or the same for a network that is not ours."""
    other = peer_of(run, facts)
    if other is None:
        return make_task(config, data)
    return SegmentationTask(other, data, config.segmentation, config.augmentation)


def score(options: LabelEfficiency, name: str, pipe: SegmentationPipeline) -> Scores:
    """The scores of a pipeline on the test pictures of a set."""
    dataset = load_labelled(
        MaskedOptions(data=str(options.data / name / "test.parquet"), image_column="image", mask_column="mask"),
        num_classes=pipe.num_classes,
        channels=pipe.unet.config.in_channels,
        pixel_range=pipe.pixel_range,
        palette=pipe.palette,
    )
    return score_masks(predictor(pipe), dataset)


def pretrain(options: LabelEfficiency, name: str) -> tuple[str, float]:
    """Trains the noise predictor of a set on all of its training pictures and no others, if it is not trained.

    Returns:
        Its folder, and the CPU seconds of its steps.
    """
    config = pretraining_run(options, name)
    steps = str(config.training.steps)
    if not (config.output / INDEX).is_file():
        accelerator = make_accelerator(config.training, config.output)
        data = load_images(config.data, config.training.seed)
        torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
        network = make_unet(config, data.train.height, data.train.width, data.train.channels, data.train.class_names)
        task = DiffusionTask(network, data, config.diffusion)
        CountingTrainer(task, config.training, config.output, asdict(config), accelerator).run()
    return str(config.output), json.loads(seconds_file(config.output).read_text(encoding="utf-8"))[steps]


def pretraining_run(options: LabelEfficiency, name: str) -> TrainDDPM:
    """What `train_ddpm` would be given: pictures of the training set alone, of which none is held out."""
    data = DataConfig(
        data=str(options.data / name / "train.parquet"),
        image_column="image",
        crop_size=options.crop_size,
        flip=True,
        validation_fraction=0.0,
    )
    folder = f"ddpm-{options.pretraining_steps}-{short_hash(options.pretraining_config())}"
    return TrainDDPM(
        options.output / name / folder,
        str(options.network),
        data,
        DiffusionConfig(preview_pictures=4),
        options.pretraining(),
    )
