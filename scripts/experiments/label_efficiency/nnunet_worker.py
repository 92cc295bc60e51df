"""Trains nnU-Net v2 in 2D and segments images with it, in an environment that has it; see `exchange`.

Its own are fingerprint, planner, normalisation (z-scores of each channel of an image), network class, augmentation,
patches with foreground, Dice and cross-entropy at several resolutions, SGD with momentum 0.99 from 0.01 on, the
polynomial decay, the pseudo Dice that chooses a checkpoint, and prediction: tiles that overlap by half, mirrored.
Changed for a short time on one core, and in the config of a run:

- The planner gets the largest side of the patches and the number of them in a batch. By itself it takes the median
  image as the patch, and a batch of at most 5% of the pixels of the set, but at least two patches.
- The first level has fewer channels than 32, and the last at most 16 times as many, as its 512.
- The iterations are divided into 50 epochs, not 1000; validation has a fifth as many, as 50 for its 250.
- Where the other methods train in bfloat16, its training passes do, in place of its float16 on a GPU.
- Nothing is compiled; batches are made in the same process, so that their time counts.
- There is one network, with the given validation images, and not one for each of five folds. On these images whole,
  mean IoU decides between its last checkpoint, which it uses by default, and the best by pseudo Dice.
- There is no search for postprocessing.
"""

import json
import os
import random
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.exchange import (
    FOUND,
    IMAGES,
    OPTIONS,
    PARTS,
    REPORT,
    load_arrays,
    save_arrays,
    save_json,
    timed_per_image,
)
from scripts.experiments.pace import PACED, steps_within

MASKS = "masks"  # name of the lists of class masks in a file
EPOCHS = 50  # into which the iterations are divided
VALIDATION = 0.2  # iterations of validation for one of training
WIDEST = 16  # most channels of a level, relative to the first
CHANGED = {"epochs": EPOCHS, "validation": VALIDATION, "widest": WIDEST, "checkpoint": "last, or best by pseudo Dice"}
DATASET, PLANS, CONFIGURATION = "Dataset001_labelled", "nnUNetPlans", "2d"
WEIGHTS = "weights.pt"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")  # environment variables, and the folders they name
BEST, LAST = "checkpoint_best.pth", "checkpoint_final.pth"


def ends_of_epochs(steps: int, epochs: int = EPOCHS) -> list[int]:
    """Returns the iterations before the end of each epoch; epochs differ by at most one, and none is empty."""
    epochs = min(epochs, steps)
    return [steps * (epoch + 1) // epochs for epoch in range(epochs)]


def mean_iou(found: list[np.ndarray], true: list[np.ndarray], num_classes: int) -> float:
    """Returns the mean IoU of the classes over all pixels, without classes that occur nowhere and unlabelled pixels."""
    confusion = np.zeros((num_classes, num_classes))
    for predicted, mask in zip(found, true):
        known = mask < num_classes
        pairs = num_classes * mask[known].astype(np.int64) + predicted[known]
        confusion += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    hits = confusion.diagonal()
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())


def write_dataset(folder: Path, parts: dict[str, Any], num_classes: int) -> None:
    """Writes images and masks in nnU-Net's layout, and the one split into training and validation images."""
    from skimage.io import imsave

    raw, prepared = (folder / name / DATASET for name in FOLDERS[:2])
    for path in (raw / "imagesTr", raw / "labelsTr", prepared):
        path.mkdir(parents=True)
    split: dict[str, list[str]] = {"train": [], "val": []}
    ignored = False
    for part, names in zip(PARTS, split.values()):
        for index, (image, mask) in enumerate(zip(parts[part][IMAGES], parts[part][MASKS])):
            names.append(f"{part}{index:06d}")
            ignored |= bool((mask >= num_classes).any())
            imsave(raw / "imagesTr" / f"{names[-1]}_0000.png", image, check_contrast=False)
            label = np.minimum(mask, num_classes).astype(np.uint8)
            imsave(raw / "labelsTr" / f"{names[-1]}.png", label, check_contrast=False)
    channels = ("grey",) if image.ndim == 2 else ("R", "G", "B")
    classes = ["background", *(f"class {label}" for label in range(1, num_classes)), *["ignore"] * ignored]
    description = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {name: label for label, name in enumerate(classes)},
        "numTraining": sum(map(len, split.values())),
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    save_json(raw / "dataset.json", description)
    (prepared / "splits_final.json").write_text(json.dumps([split]), encoding="utf-8")


def prepare(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the fingerprint of the set, plans the network and preprocesses the images; returns the plans."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    class Planner(ExperimentPlanner):
        def __init__(self, *arguments: Any, **values: Any) -> None:
            super().__init__(*arguments, **values)
            self.UNet_base_num_features = options["features"]
            self.UNet_max_features_2d = WIDEST * options["features"]

        def get_plans_for_configuration(self, spacing: Any, median_shape: Any, *rest: Any) -> dict[str, Any]:
            side = np.minimum(median_shape, options["patch"])  # from which the topology follows
            plan = super().get_plans_for_configuration(spacing, side, *rest)
            return {**plan, "median_image_size_in_voxels": median_shape, "batch_size": options["batch_size"]}

    DatasetFingerprintExtractor(DATASET, num_processes=1).run()
    plans = Planner(DATASET).plan_experiment()
    preprocessor = PlansManager(plans).get_configuration(CONFIGURATION).preprocessor_class(verbose=False)
    preprocessor.run(DATASET, CONFIGURATION, PLANS, num_processes=1)
    return plans


def train(options: dict[str, Any], plans: dict[str, Any], folder: Path, ends: list[int]) -> Any:
    """Trains a network for epochs that end at these iterations, and returns the trainer.

    Its `durations` are the CPU seconds of each iteration, with the making of its batch. Its `kept` are the weights of
    its checkpoints with their iterations, by name.
    """
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Trainer(nnUNetTrainer):
        durations: list[float]
        kept: dict[str, tuple[int, dict[str, Any]]]

        def initialize(self) -> None:
            super().initialize()
            forward = self.network.forward

            def mixed(images: torch.Tensor) -> Any:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.network.training):
                    outputs = forward(images)
                return [each.float() for each in outputs] if self.network.training else outputs

            if options["mixed_precision"] == "bf16":
                self.network.forward = mixed

        def on_epoch_start(self) -> None:
            super().on_epoch_start()
            self.num_iterations_per_epoch = ends[self.current_epoch] - len(self.durations)
            self.num_val_iterations_per_epoch = max(1, round(VALIDATION * self.num_iterations_per_epoch))

        def on_train_epoch_start(self) -> None:
            super().on_train_epoch_start()
            self.started = time.process_time()

        def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
            result = super().train_step(batch)
            now = time.process_time()
            self.durations.append(now - self.started)
            self.started = now
            return result

        def save_checkpoint(self, filename: str) -> None:
            weights = {name: values.clone() for name, values in self.network.state_dict().items()}
            self.kept[Path(filename).name] = (len(self.durations), weights)

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(options["seed"])
    description = json.loads((folder / FOLDERS[0] / DATASET / "dataset.json").read_text(encoding="utf-8"))
    trainer = Trainer({**plans, "continue_training": False}, CONFIGURATION, 0, description, torch.device("cpu"))
    trainer.num_epochs, trainer.durations, trainer.kept = len(ends), [], {}
    trainer.logger.plot_progress_png = lambda folder: None  # it takes longer than a short epoch
    trainer.run_training()
    return trainer


def make_predictor(trainer: Any, weights: dict[str, Any]) -> Any:
    """Returns nnU-Net's predictor with these weights."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    plans, axes = trainer.plans_manager, trainer.inference_allowed_mirroring_axes
    values = (trainer.configuration_manager, [weights], trainer.dataset_json, type(trainer).__name__, axes)
    predictor.manual_initialization(trainer.network, plans, *values)
    return predictor


def segment(predictor: Any, image: np.ndarray) -> np.ndarray:
    """Returns the class mask (H, W) of an image (H, W) or (H, W, 3), which is laid out as its own reader does."""
    channels = image[None, None] if image.ndim == 2 else image.transpose(2, 0, 1)[:, None]
    return predictor.predict_single_npy_array(channels.astype(np.float32), {"spacing": (999, 1, 1)})[0].astype(np.uint8)


def choose(trainer: Any, validation: dict[str, Any], num_classes: int) -> tuple[float, str]:
    """Returns the mean IoU on the validation images of the better checkpoint, and its name."""
    scores = []
    for name in (LAST, BEST):  # of equal ones the first
        if name == LAST or trainer.kept[name][0] != trainer.kept[LAST][0]:
            predictor = make_predictor(trainer, trainer.kept[name][1])
            found = [segment(predictor, image) for image in validation[IMAGES]]
            scores.append((mean_iou(found, validation[MASKS], num_classes), name))
    return max(scores, key=lambda score: score[0])


def main(folder: Path) -> None:
    """Works on what is in the folder."""
    os.environ |= {name: str(folder / name) for name in FOLDERS}
    os.environ |= {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "MPLBACKEND": "agg"}
    import torch

    torch.set_num_threads(1)
    options = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    parts = {part: load_arrays(folder / f"{part}.npz") for part in PARTS}
    started = time.process_time()
    write_dataset(folder, parts, options["num_classes"])
    plans = prepare(options)
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # batches are made in this process; its planner takes no 0
    preparation = time.process_time() - started
    steps = options["steps"]
    if steps is None:
        steps = steps_within(options["seconds"], train(options, plans, folder, [PACED]).durations)
    trainer = train(options, plans, folder, ends_of_epochs(steps))
    score, name = choose(trainer, parts["validation"], options["num_classes"])
    best_step, weights = trainer.kept[name]
    predictor = make_predictor(trainer, weights)
    found, seconds = timed_per_image(lambda image: segment(predictor, image), parts["test"][IMAGES])
    torch.save(weights, folder / WEIGHTS)
    save_arrays(folder / FOUND, **{MASKS: found})
    for each in FOLDERS[:2]:
        shutil.rmtree(folder / each)
    report = {
        "parameters": sum(values.numel() for values in trainer.network.parameters()),
        "steps": len(trainer.durations),
        "best_step": best_step,
        "validation_mean_iou": score,
        "seconds": sum(trainer.durations),
        "preparation_seconds": preparation,
        "predict_seconds": seconds,
        "checkpoint": name,
        "plan": plans["configurations"][CONFIGURATION],
        "versions": {"nnunetv2": version("nnunetv2"), "torch": torch.__version__},
    }
    save_json(folder / REPORT, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
