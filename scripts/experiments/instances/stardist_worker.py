"""Trains StarDist 2D and finds objects with it, in an environment that has it; see `exchange`.

As its authors' notebooks have it for these images: 32 rays on a grid of 2 x 2, percentiles 1 and 99.8 of each channel
to 0 and 1, filled holes, flips, turns, changes of intensity and noise; Adam at 3e-4, halved where the validation loss
does not fall for a tenth of the epochs; the weights of the lowest validation loss; thresholds by its
`optimize_thresholds` on the validation images.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.exchange import (
    FOUND,
    IMAGES,
    INSTANCES,
    OPTIONS,
    PARTS,
    REPORT,
    load_arrays,
    save_arrays,
    save_json,
    timed_per_image,
)
from scripts.experiments.pace import PACED, steps_within

EPOCHS = 40  # into which the time is divided; 400 are its default, with a patience of 40, a tenth as here
SHORTEST = 10  # steps of an epoch, since each ends with a validation


def augmented(image: np.ndarray, instances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flips, turns, another intensity and noise, as in StarDist's notebooks; draws from NumPy's global generator."""
    turns, mirrored = np.random.randint(4), np.random.rand() < 0.5
    image, instances = np.rot90(image, turns), np.rot90(instances, turns)
    if mirrored:
        image, instances = image[::-1], instances[::-1]
    image = image * np.random.uniform(0.6, 2) + np.random.uniform(-0.2, 0.2)
    return image + 0.02 * np.random.uniform() * np.random.normal(size=image.shape), instances


def schedule(steps: int) -> tuple[int, int]:
    """Returns epochs and steps per epoch: 40 epochs, or fewer where they would be very short."""
    epochs = min(EPOCHS, max(1, steps // SHORTEST))
    return epochs, max(1, round(steps / epochs))


def make_config(options: dict[str, Any], channels: int, epochs: int, steps: int) -> Any:
    """The configuration of a network."""
    from stardist.models import Config2D

    return Config2D(
        n_rays=32,
        grid=(2, 2),
        n_channel_in=channels,
        unet_n_filter_base=options["width"],
        train_patch_size=(options["crop_size"], options["crop_size"]),
        train_epochs=epochs,
        train_steps_per_epoch=steps,
        train_reduce_lr={"factor": 0.5, "patience": max(1, epochs // 10), "min_delta": 0},
        train_tensorboard=False,
    )


def train(options: dict[str, Any], parts: dict[str, Any], folder: Path, name: str, epochs: int, steps: int) -> Any:
    """Trains a network; returns it and the CPU seconds of each step.

    Compilation in the first step, and validation, do not count: the clock starts again at each epoch.
    """
    import keras
    from stardist.models import StarDist2D

    class Stopwatch(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.durations: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.started = time.process_time()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            now = time.process_time()
            self.durations.append(now - self.started)
            self.started = now

    (images, instances), (validation, true) = parts["train"], parts["validation"]
    channels = 1 if images[0].ndim == 2 else images[0].shape[-1]
    model = StarDist2D(make_config(options, channels, epochs, steps), name=name, basedir=str(folder / "models"))
    model.prepare_for_training()
    stopwatch = Stopwatch()
    model.callbacks.append(stopwatch)
    model.train(images, instances, validation_data=(validation, true), augmenter=augmented, seed=options["seed"])
    return model, stopwatch.durations


def main(folder: Path) -> None:
    """Works on what is in the folder."""
    import keras
    import stardist
    import tensorflow as tf
    from csbdeep.utils import normalize
    from stardist import fill_label_holes

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    options = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    keras.utils.set_random_seed(options["seed"])

    def prepared(image: np.ndarray) -> np.ndarray:
        return normalize(image, 1, 99.8, axis=(0, 1))

    started = time.process_time()
    parts: dict[str, Any] = {}
    for part in PARTS[:2]:
        arrays = load_arrays(folder / f"{part}.npz")
        parts[part] = (
            [prepared(each) for each in arrays[IMAGES]],
            [fill_label_holes(each) for each in arrays[INSTANCES]],
        )
    test = load_arrays(folder / "test.npz")[IMAGES]
    preparation = time.process_time() - started
    _, durations = train(options, parts, folder, "pace", 1, PACED)
    epochs, steps = schedule(steps_within(options["seconds"], durations))
    keras.utils.set_random_seed(options["seed"])
    model, durations = train(options, parts, folder, "stardist", epochs, steps)
    model.optimize_thresholds(*parts["validation"])
    found, seconds = timed_per_image(lambda image: model.predict_instances(prepared(image))[0], test)
    save_arrays(folder / FOUND, **{INSTANCES: [each.astype(np.int32) for each in found]})
    report = {
        "parameters": model.keras_model.count_params(),
        "steps": len(durations),
        "batch_size": model.config.train_batch_size,
        "seconds": sum(durations[1:]),
        "preparation_seconds": preparation,
        "predict_seconds": seconds,
        "chosen": model.thresholds._asdict(),
        "versions": {"stardist": stardist.__version__, "tensorflow": tf.__version__},
    }
    save_json(folder / REPORT, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
