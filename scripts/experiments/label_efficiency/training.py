"""One run of the experiment: pretraining if its method needs it, training, and the test."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from scripts.benchmarks.other_libraries import Peer
from scripts.experiments.cases import short_hash
from scripts.experiments.label_efficiency.experiment import (
    FILES,
    FROM_DDPM,
    NNUNET,
    OBJECTIVE,
    UNIMATCH,
    LabelEfficiency,
    Run,
    SetFacts,
    set_facts,
)
from scripts.experiments.label_efficiency.networks import parameters, untrained_peer
from scripts.experiments.label_efficiency.nnunet import run_nnunet
from scripts.experiments.label_efficiency.unimatch import UniMatchTask
from scripts.experiments.pace import PACED, WARM
from scripts.experiments.timed_trainer import SECONDS, TimedTrainer, ddpm_trainer, kept_steps
from scripts.reports import content_hash
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.train_segmentation import make_task
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.masked.config import MaskedOptions
from unet_diffusion.data.masked.sets import MaskedSets, load_masked
from unet_diffusion.evaluation.mask_scores import Scores, labelled_for, score_masks
from unet_diffusion.files import INDEX
from unet_diffusion.pipelines import SegmentationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.saved_runs import load_pipeline
from unet_diffusion.tasks.segmentation import SegmentationTask
from unet_diffusion.tasks.self_training import START, SelfTrainingTask
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.task import Task

REPORTED = ("validation_mean_iou", "steps", "best_step", "seconds", "pretraining_seconds", "parameters")


def train_and_test(options: LabelEfficiency, run: Run) -> dict[str, Any]:
    """Trains or resumes a run, and scores the weights of its best validation once on the test images.

    Returns:
        The entry of the run in the JSON file: `data`, `method`, `labels`, `draw`, `seed`; `mean_iou` of the classes
        over the pixels of all test images together; `images`, the mean IoU of each, None where it is undefined;
        `validation_mean_iou`, and `best_step`, after which it was measured; `steps`; `parameters` of all networks that
        predict; `seconds`, CPU seconds of the training steps, and `pretraining_seconds`, those of the noise predictor
        that the run shares with others; `config`.
    """
    if run.method == NNUNET:
        reported, scores = run_nnunet(options, run, tested(options, run.data))
        return entry(run, scores, {"pretraining_seconds": 0.0, **reported})
    facts = set_facts(options.masked(run.data))
    start, pretraining_seconds = str(options.network), 0.0
    if run.method in FROM_DDPM:
        start, pretraining_seconds = pretrain(options, run.data)
    folder = options.output / run.folder
    config = TrainSegmentation(
        options.masked(run.data, run.labels, facts.num_classes, run.draw),
        folder,
        start,
        options.segmentation(run.method),
        joint=options.joint(run.method),
        augmentation=options.augmentation_of(run.data),
        training=options.training(run.seed, optimizer=options.optimizer_of(run.method)),
    )
    if options.minutes is not None:
        steps = steps_of(options.minutes, run, config, facts, pretraining_seconds)
        config = replace(config, training=options.training(run.seed, steps, options.optimizer_of(run.method)))
    trainer = make_trainer(run, config, facts)
    trainer.run()
    task = trainer.task

    if isinstance(task, SegmentationTask) and isinstance(task.network, Peer):
        # low_cpu_mem_usage would skip the weights that its constructor loads
        pipe = task.pipeline(type(task.network).from_pretrained(folder / "unet", low_cpu_mem_usage=False))
    else:
        pipe = load_pipeline(SegmentationPipeline, folder)
    reported = {
        "validation_mean_iou": trainer.best.score,
        "steps": trainer.step,
        "best_step": trainer.best.step,
        "seconds": trainer.cpu_seconds,
        "pretraining_seconds": pretraining_seconds,
        "parameters": sum(parameters(network) for network in (pipe.unet, pipe.classifier) if network is not None),
    }
    return entry(run, score(options, run.data, pipe), reported)


def entry(run: Run, scores: Scores, reported: dict[str, Any]) -> dict[str, Any]:
    """The entry of a run in the JSON file; of what is reported of its training, it takes what all methods have."""
    values = scores.to_dict()
    return {
        **{name: getattr(run, name) for name in ("data", "method", "labels", "draw", "seed")},
        "mean_iou": values["pooled"]["mean_iou"],
        **{name: reported[name] for name in REPORTED},
        "config": run.config,
        "images": [image["mean_iou"] for image in values["images"]],
    }


def make_trainer(run: Run, config: TrainSegmentation, facts: SetFacts) -> TimedTrainer:
    """Opens the data, and makes the network and the trainer of a run."""
    accelerator = make_accelerator(config.training, config.output)
    data = load_masked(config.data, run.seed)
    torch.manual_seed(keyed_seed(run.seed, "initialisation"))
    task = task_of(run, config, data, facts)
    return TimedTrainer(task, config.training, config.output, asdict(config), accelerator)


def steps_of(minutes: float, run: Run, config: TrainSegmentation, facts: SetFacts, before: float) -> int:
    """Returns how many steps a run has, as its pace was when it started; `before` it, CPU seconds are spent.

    Raises:
        ValueError: no time is left after the noise predictor.
    """
    left = 60 * minutes - before
    if left <= 0:
        raise ValueError(
            f"minutes is {minutes:g}, of which nothing is left for {run.folder}: its noise predictor took {before:.0f} "
            f"CPU seconds; give more minutes, or a smaller pretraining_share."
        )

    def short(aside: Path) -> TimedTrainer:
        # such that self-training starts after the same share of the measured steps as in the run
        training = replace(config.training, steps=round(WARM / START) + PACED - WARM, warmup_steps=0)
        return make_trainer(run, replace(config, output=aside, training=training), facts)

    return kept_steps(config.output, left, short)


def task_of(run: Run, config: TrainSegmentation, data: MaskedSets, facts: SetFacts) -> Task:
    """The task of `train-segmentation`, also for a network that is not ours."""
    features = tuple(run.config["network"].get("features", ()))
    other = untrained_peer(run.method, facts.channels, facts.num_classes, features)
    if other is None:
        task = make_task(config, data)
        if run.method == UNIMATCH:
            assert isinstance(task, SelfTrainingTask)
            options = (config.joint, config.segmentation, config.augmentation)
            return UniMatchTask(task.network, data, task.images, *options)
        return task
    return SegmentationTask(other, data, config.segmentation, config.augmentation)


def score(options: LabelEfficiency, name: str, pipe: SegmentationPipeline) -> Scores:
    """The scores of a pipeline on the test images of a set."""
    return score_masks(pipe.predictor(), labelled_for(pipe, tested(options, name)))


def tested(options: LabelEfficiency, name: str) -> MaskedOptions:
    """The test images of a set."""
    return MaskedOptions(data=str(options.data / name / "test.parquet"), image_column="image", mask_column="mask")


def pretrain(options: LabelEfficiency, name: str) -> tuple[str, float]:
    """Trains the noise predictor of a set on all of its training images and no others, unless it is trained.

    If another process trains it, this waits.

    Returns:
        Its folder, and the CPU seconds of its steps.
    """
    config = pretraining_run(options, name)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(config.output.with_name(f".{config.output.name}.lock")):
        if options.minutes is not None:
            seconds = 60 * options.minutes * options.pretraining_share
            steps = kept_steps(config.output, seconds, lambda aside: ddpm_trainer(replace(config, output=aside)))
            config = replace(config, training=options.pretraining(steps))
        steps = str(config.training.steps)
        if not (config.output / INDEX).is_file():  # written last
            ddpm_trainer(config).run()
    return str(config.output), json.loads((config.output / SECONDS).read_text(encoding="utf-8"))[steps]


def pretraining_run(options: LabelEfficiency, name: str) -> TrainDDPM:
    """The options of `train-ddpm`: images of the training set alone, none of them held out."""
    whole = options.data / name / "train.parquet"
    data = DataConfig(
        data=str(whole),
        image_column="image",
        crop_size=options.crop_size,
        flip=True,
        validation_fraction=0.0,
    )
    folder = f"ddpm-{short_hash({**options.pretraining_config(), FILES: content_hash([whole])})}"
    return TrainDDPM(
        options.output / name / folder,
        str(options.network),
        data,
        OBJECTIVE,
        options.pretraining(),
    )
