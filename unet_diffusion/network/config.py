"""The config of a `UNet`: its checks, its presets, and the sizes that follow from it. Also the checks of `forward`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from unet_diffusion.checks import is_count, is_number, require, require_choice
from unet_diffusion.network.own_config import STOCK

Precision = Literal["auto", "no", "bf16", "fp16"]
CONVOLUTIONS_PER_BLOCK = 2
HEADS = ("noise", "segmentation", "both", "features")
INSTANCE_CHANNELS = 2  # of the logits, after those of the classes: boundary and distance

CHOICES: dict[str, tuple[str | None, ...]] = {
    "block": ("residual", "plain"),
    "norm": ("group", "batch", "none"),
    "activation": ("silu", "relu"),
    "padding": ("same", "valid"),
    "downsample": ("max_pool", "conv"),
    "upsample": ("transposed", "nearest"),
    "time_embedding": ("sinusoidal", "fourier", None),
    "prediction_type": ("epsilon", "v_prediction", "sample", None),
}


def check_num_classes(num_classes: Any) -> None:
    """Raises a ValueError unless `num_classes` is None or suits a segmentation head."""
    valid = num_classes is None or is_count(num_classes, 2)
    require(valid, "num_classes", num_classes, "must be at least 2, background included, or None")


def check_object_channels(instances: Any, object_diameter: Any = None, object_min_area: Any = None) -> None:
    """Raises a ValueError unless a segmentation head can have these config values."""
    require(isinstance(instances, bool), "instances", instances, "must be True or False")
    valid = object_diameter is None or (is_number(object_diameter) and object_diameter > 0)
    require(valid, "object_diameter", object_diameter, "must be a number of pixels above 0, or None")
    valid = object_min_area is None or is_count(object_min_area)
    require(valid, "object_min_area", object_min_area, "must be a whole number of pixels of at least 1, or None")


def check_segmentation_timestep(timestep: Any) -> None:
    """Raises a ValueError unless segmentation can run at the timestep, or noise level."""
    valid = is_number(timestep) and timestep >= 0
    require(valid, "segmentation_timestep", timestep, "must be a finite number of at least 0")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises a ValueError that gives the value, the rule and the fix for the first value that is wrong."""

    def check(valid: bool, key: str, rule: str) -> None:
        require(valid, key, config[key], rule)

    for key, choices in CHOICES.items():
        require_choice(key, config[key], choices)
    for key in ("in_channels", "blocks_per_stage", "head_channels"):
        check(is_count(config[key]), key, "must be an integer of at least 1")
    for key in ("out_channels", "num_class_embeds"):
        check(config[key] is None or is_count(config[key]), key, "must be an integer of at least 1, or None")
    for key in ("dropout", "label_dropout"):
        check(is_number(config[key]) and 0 <= config[key] < 1, key, "must be at least 0 and less than 1")

    size = config["sample_size"]
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    check(len(sides) == 2 and all(map(is_count, sides)), "sample_size", "must be a side or (height, width) in pixels")

    channels = config["channels"]
    check(
        isinstance(channels, (tuple, list)) and len(channels) >= 2 and all(is_count(width, 2) for width in channels),
        "channels",
        "must be two or more widths of at least 2, one per resolution, such as (64, 128, 256)",
    )
    attention = config["attention"]
    bools = isinstance(attention, (tuple, list)) and all(isinstance(attend, bool) for attend in attention)
    check(
        attention is None or (bools and len(attention) == len(channels)),
        "attention",
        f"must be one bool per resolution, {len(channels)} as channels has, or None for the bridge only",
    )
    attends = attention or [*[False] * (len(channels) - 1), True]
    for width in (width for width, attend in zip(channels, attends) if attend):
        check(
            width % config["head_channels"] == 0,
            "head_channels",
            f"must divide the width {width} of a resolution with attention; change it, channels or attention",
        )

    classes = config["num_classes"]
    check_num_classes(classes)
    check_object_channels(config["instances"], config["object_diameter"], config["object_min_area"])
    check(classes is not None or not config["instances"], "instances", "needs a segmentation head; set num_classes too")
    if config["out_channels"] is None:
        check(classes is not None, "num_classes", "a network without a noise head (out_channels=None) needs it")
    if config["time_embedding"] is None:
        rule = "needs a timestep embedding; set time_embedding='sinusoidal', or leave it out"
        check(config["num_class_embeds"] is None, "num_class_embeds", rule)
        check(config["segmentation_timestep"] == 0, "segmentation_timestep", rule)
    if config["num_class_embeds"] is None:
        check(config["label_dropout"] == 0, "label_dropout", "needs num_class_embeds; set it, or leave this at 0")
    check_segmentation_timestep(config["segmentation_timestep"])


def needs_class(config: Mapping[str, Any]) -> bool:
    """Returns whether a network learnt a class for every image, so that it predicts no noise without one."""
    return config.get("num_class_embeds") is not None and config.get("label_dropout", 0) == 0


def check_segments_without_class(config: Mapping[str, Any]) -> None:
    """Raises a ValueError for a network that learnt a class for every image, since images to segment have none.

    Stock networks pass: their adapter takes the mean of the embeddings of all classes.
    """
    if needs_class(config) and STOCK not in config:
        raise ValueError(
            "the network was trained with a class for every image (label_dropout is 0), and images to segment "
            "have none; use a noise predictor that was trained without classes, or with label_dropout above 0."
        )


def check_input(unet: Any, sample: Any, timestep: Any, class_labels: Any, head: str) -> None:
    """Checks the arguments of `UNet.forward`; raises a ValueError that gives the value, the rule and the fix."""
    config = unet.config
    if head not in HEADS:  # no helper here: its strings would be built at every call
        raise ValueError(f"head is {head!r}, but must be one of {', '.join(HEADS)}.")
    if head in ("noise", "both") and unet.noise_head is None:
        raise ValueError(f"head is {head!r}, but the network has no noise head: out_channels is None.")
    if head in ("segmentation", "both") and unet.segmentation_head is None:
        raise ValueError(f"head is {head!r}, but there is no segmentation head; call to_segmentation(K) first.")
    if timestep is None and unet.time_embed is not None and head in ("noise", "both"):
        raise ValueError(f"head is {head!r}, but no timestep was given; noise is predicted at a timestep.")
    if timestep is not None and unet.time_embed is None:
        raise ValueError("a timestep was given, but the network takes none (time_embedding is None); leave it out.")
    if class_labels is not None and config.num_class_embeds is None:
        raise ValueError("class_labels were given, but the network has no classes: num_class_embeds is None.")
    if class_labels is None and config.num_class_embeds is not None and config.label_dropout == 0:
        raise ValueError(
            "class_labels are missing and the null class was not trained (label_dropout is 0); pass class_labels, "
            "or train with label_dropout > 0."
        )
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(
            f"sample has shape {tuple(sample.shape)}, but must be (batch, {config.in_channels}, height, width)."
        )
    if config.padding == "valid" and min(sample.shape[2:]) < unet.smallest_side:
        raise ValueError(
            f"sample is {sample.shape[2]}x{sample.shape[3]}, but unpadded convolutions over "
            f"{len(config.channels) - 1} downsamplings need at least {unet.smallest_side} pixels a side; "
            "pad it, or set padding='same'."
        )


def check_recipe(timesteps: Sequence[int], hidden: Sequence[int], stages: Sequence[int] | None) -> None:
    """Raises a ValueError unless a pixel classifier can have these timesteps, hidden widths and stages (None: all)."""
    for name, values in (("timesteps", timesteps), ("stages", stages)):
        if values is None:
            continue
        if not values or not all(is_count(value, 0) for value in values) or len(set(values)) < len(values):
            raise ValueError(f"{name} are {values}, but must be one or more integers of at least 0, each once.")
    if not hidden or not all(is_count(width) for width in hidden):
        raise ValueError(f"hidden is {hidden}, but must be one or more widths of at least 1, such as (128, 32).")


def load_preset(name: str) -> dict[str, Any]:
    """Loads the config of a preset, a JSON file in `unet_diffusion/presets`; raises a ValueError for an unknown one."""
    found = files("unet_diffusion").joinpath("presets").iterdir()
    presets = {path.name.removesuffix(".json"): path for path in found if path.name.endswith(".json")}
    if name not in presets:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(sorted(presets))}.")
    return json.loads(presets[name].read_text(encoding="utf-8"))


def check_model(model: str) -> None:
    """Raises a ValueError unless `model` names an existing folder, an existing JSON file or a preset."""
    path = Path(model)
    if path.suffix == ".json" and not path.is_file():
        raise ValueError(f"model is {model!r}, but there is no such file.")
    if path.suffix != ".json" and not path.is_dir():
        load_preset(model)


def check_keys(keys: Iterable[str], known: Iterable[str]) -> None:
    """Raises a ValueError for the first key that is not among the known config values."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            raise ValueError(f"there is no config value {key!r}; choose from {', '.join(known)}.")


def output_side(config: Mapping[str, Any], side: int) -> int:
    """Pixels a side of the output for `side` pixels of input; 0 if a map on the way would vanish."""
    if config["padding"] == "same":
        return side
    stage_loss = 2 * CONVOLUTIONS_PER_BLOCK * config["blocks_per_stage"]
    depth = len(config["channels"]) - 1
    side -= 2 if config["block"] == "residual" else 0  # the stem
    for _ in range(depth):
        side = max(side - stage_loss, 0) // 2
    side -= stage_loss
    for _ in range(depth):
        side = 2 * max(side, 0) - stage_loss
    return max(side, 0)


def smallest_side(config: Mapping[str, Any]) -> int:
    """The smallest height and width, in pixels, that the network takes."""
    side = 1
    while output_side(config, side) == 0:
        side += 1
    return side
