"""Trains Cellpose 3 from untrained weights and finds objects with it, in an environment that has it; see `exchange`.

As its `train_seg` has it: percentiles 1 and 99 to 0 and 1, images scaled so that the mean object of each has one
diameter (17 pixels, that of its authors' network for nuclei), flips, turns and scales, AdamW at 5e-3 with warm-up and
a slow end. The validation images choose, by the mean AP at an IoU of 0.5 to 0.9: one of the last snapshots; whether
test images are scaled by the mean diameter of the training set or by a size model; and the two thresholds.
"""

import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.exchange import (
    FOUND,
    IMAGES,
    INSTANCES,
    OPTIONS,
    REPORT,
    load_arrays,
    save_arrays,
    save_json,
    timed_per_image,
)
from scripts.experiments.pace import PACED, steps_within

BATCH = 8  # its default
EPOCHS = 320  # at least, if there are as many steps: above 300 its learning rate falls over the last 100
SNAPSHOTS = 5  # of which those after half of the training are compared
STYLE = 256  # values of the style of a network of the published width
IOU = (0.5, 0.6, 0.7, 0.8, 0.9)
FLOW_THRESHOLDS = (0.0, 0.4, 0.6, 0.8)  # 0: not applied; 0.4 is its default
CELLPROB_THRESHOLDS = (-2.0, -1.0, 0.0, 1.0)


def channels_first(image: np.ndarray) -> np.ndarray:
    """Returns a grey image (H, W) with an empty second channel, as its networks have it, or (H, W, 3) as (3, H, W)."""
    image = image.astype(np.float32)
    return np.stack([image, np.zeros_like(image)]) if image.ndim == 2 else image.transpose(2, 0, 1)


def schedule(steps: int) -> tuple[int, int]:
    """Returns epochs and images per epoch: 320 to 640 epochs, or one step each where there are fewer steps."""
    per_epoch = max(1, steps // EPOCHS)
    return max(1, round(steps / per_epoch)), BATCH * per_epoch


def size_parameters(styles: np.ndarray, diameters: np.ndarray, usual: float) -> dict[str, Any]:
    """Fits its size model: ridge regression of the logarithm of diameters (N,) on styles (N, S), as `train_size`.

    `train_size` itself learns from crops of 512 pixels that are scaled at random, which takes longer than the training
    of the network here; these are the styles of whole training images, as `SizeModel.eval` finds them.
    """
    logarithms = np.log(diameters) - np.log(usual)
    centred = (styles - styles.mean(axis=0)).T
    weights = np.linalg.solve(centred @ centred.T + np.eye(len(centred)), centred @ (logarithms - logarithms.mean()))
    return {"A": weights, "smean": styles.mean(axis=0), "diam_mean": usual, "ymean": logarithms.mean()}


def pooled_precision(hits: np.ndarray, false: np.ndarray, missed: np.ndarray) -> float:
    """Returns TP / (TP + FP + FN) over all images, counts (N, T), as the mean over the T thresholds."""
    hits, false, missed = (each.sum(axis=0) for each in (hits, false, missed))
    return float((hits / (hits + false + missed)).mean())


def precision(true: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Returns the mean AP, pooled over images."""
    from cellpose.metrics import average_precision

    return pooled_precision(*average_precision(true, found, threshold=list(IOU))[1:])


def make_model(options: dict[str, Any], channels: int) -> Any:
    """An untrained network of the given width; its style is padded with zeros to the 256 values that `eval` expects."""
    import torch
    from cellpose.models import CellposeModel
    from cellpose.resnet_torch import CPnet

    class Network(CPnet):
        def forward(self, data: Any) -> Any:
            output, style, *rest = super().forward(data)
            return output, torch.nn.functional.pad(style, (0, STYLE - style.shape[1])), *rest

    torch.manual_seed(options["seed"])
    model = CellposeModel(gpu=False, pretrained_model=False, diam_mean=options["diameter"], nchan=channels)
    widths = [channels, *(options["width"] * 2**level for level in range(4))]
    model.nbase, model.diam_labels = widths, options["diameter"]
    model.net = Network(widths, 3, sz=3, mkldnn=model.mkldnn, max_pool=True, diam_mean=options["diameter"])
    return model


def train(options: dict[str, Any], parts: dict[str, Any], folder: Path, name: str, steps: int) -> tuple[Any, Any, Any]:
    """Trains a network; returns it, its later snapshots, the last of the end, and the CPU seconds of its steps.

    A step is timed from one pass of the network to the next, so the preparation before the first one does not count.
    """
    from cellpose.train import train_seg

    images, flows = parts["train"]
    model = make_model(options, len(images[0]))
    passes: list[float] = []
    hook = model.net.register_forward_pre_hook(lambda *_: passes.append(time.process_time()))
    epochs, per_epoch = schedule(steps)
    last, *_ = train_seg(
        model.net,
        train_data=images,
        train_labels=flows,
        normalize=True,
        batch_size=BATCH,
        n_epochs=epochs,
        nimg_per_epoch=per_epoch,
        min_train_masks=1,
        bsize=options["crop_size"],
        save_path=folder,
        save_every=max(1, epochs // SNAPSHOTS),
        save_each=True,
        model_name=name,
    )
    hook.remove()
    passes.append(time.process_time())
    snapshots = sorted((folder / "models").glob(f"{name}_epoch_*"))
    return model, [*snapshots[len(snapshots) // 2 :], Path(last)], np.diff(passes).tolist()


def count_parameters(net: Any) -> int:
    """Counts what a network learns; its two diameters are stored as parameters too."""
    return sum(values.numel() for name, values in net.named_parameters() if not name.startswith("diam_"))


def load(model: Any, snapshot: Path) -> None:
    """Loads a snapshot into a model, with the mean diameter of the training objects."""
    model.net.load_model(str(snapshot), device=model.device)
    model.net.eval()
    model.diam_labels = float(model.net.diam_labels.item())


def find(model: Any, image: np.ndarray, sizes: Any, chosen: dict[str, Any]) -> np.ndarray:
    """Returns the objects (H, W) of an image (C, H, W)."""
    diameter = sizes.eval(image, channel_axis=0)[0] if chosen["diameter"] == "size model" else None
    thresholds = {name: chosen[name] for name in ("flow_threshold", "cellprob_threshold")}
    return model.eval(image, channel_axis=0, diameter=diameter, **thresholds)[0].astype(np.int32)


def choose(model: Any, snapshots: Sequence[Path], parts: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Any]:
    """Chooses on the validation images and leaves the chosen snapshot in the model; returns the choice and sizes."""
    from cellpose.dynamics import resize_and_compute_masks
    from cellpose.models import SizeModel
    from cellpose.utils import diameters

    images, true = parts["validation"]
    chosen = {"diameter": "mean", "flow_threshold": 0.4, "cellprob_threshold": 0.0}

    def score(snapshot: Path) -> float:
        load(model, snapshot)
        return precision(true, [find(model, image, None, chosen) for image in images])

    best = max(snapshots, key=score)
    load(model, best)
    trained, flows = parts["train"]
    objects = [int(each[0].max()) for each in flows]
    styles = [
        model.eval(image, channel_axis=0, resample=False, compute_masks=False)[-1]
        for image, count in zip(trained, objects)
        if count
    ]
    sides = [max(5.0, diameters(each[0].astype(np.int32))[0]) for each, count in zip(flows, objects) if count]
    path = folder / "models" / "size.npy"
    np.save(path, size_parameters(np.array(styles), np.array(sides), float(model.diam_mean)))
    sizes = SizeModel(model, pretrained_size=str(path))
    scores = {}
    for by in ("mean", "size model"):
        scaled = [model.diam_labels if by == "mean" else sizes.eval(image, channel_axis=0)[0] for image in images]
        outputs = [
            (model.eval(image, channel_axis=0, diameter=side, compute_masks=False)[1], side)
            for image, side in zip(images, scaled)
        ]
        for flow, probability in product(FLOW_THRESHOLDS, CELLPROB_THRESHOLDS):
            found = [
                resize_and_compute_masks(
                    maps[1],
                    maps[2],
                    niter=200 * side / model.diam_mean,  # as in eval
                    flow_threshold=flow,
                    cellprob_threshold=probability,
                )
                for maps, side in outputs
            ]
            scores[by, flow, probability] = precision(true, [each.astype(np.int32) for each in found])
    by, flow, probability = max(scores, key=lambda key: scores[key])
    chosen = {"diameter": by, "flow_threshold": flow, "cellprob_threshold": probability, "snapshot": best.name}
    return {**chosen, "validation_ap_mean": max(scores.values())}, sizes


def main(folder: Path) -> None:
    """Works on what is in the folder."""
    import torch
    from cellpose.dynamics import labels_to_flows
    from cellpose.version import version

    torch.set_num_threads(1)
    options = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
    arrays = {part: load_arrays(folder / f"{part}.npz") for part in ("train", "validation", "test")}
    images = {part: [channels_first(each) for each in lists[IMAGES]] for part, lists in arrays.items()}
    started = time.process_time()
    flows = labels_to_flows(arrays["train"][INSTANCES], device=torch.device("cpu"))
    preparation = time.process_time() - started
    parts = {
        "train": (images["train"], flows),
        "validation": (images["validation"], arrays["validation"][INSTANCES]),
    }
    _, _, durations = train(options, parts, folder, "pace", PACED)
    steps = steps_within(options["seconds"], durations)
    model, snapshots, durations = train(options, parts, folder, "cellpose", steps)
    parameters = count_parameters(model.net)  # before the first evaluation, which converts them for MKL-DNN
    chosen, sizes = choose(model, snapshots, parts, folder)
    found, seconds = timed_per_image(lambda image: find(model, image, sizes, chosen), images["test"])
    save_arrays(folder / FOUND, **{INSTANCES: found})
    report = {
        "parameters": parameters,
        "steps": len(durations),
        "batch_size": BATCH,
        "seconds": sum(durations),
        "preparation_seconds": preparation,
        "predict_seconds": seconds,
        "chosen": chosen,
        "versions": {"cellpose": version, "torch": torch.__version__},
    }
    save_json(folder / REPORT, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
