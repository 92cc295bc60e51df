"""`model_index.json` and `config.json` of a saved run, read and checked without loading anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIG = "config.json"  # the options of a run
STOCK_PIPELINE = "DDPMPipeline"  # the class that model_index.json names for a run that generates images
OWN_PIPELINE = "_pipeline"  # the key in model_index.json for our class that saved such a run
OWN_PIPELINES = "unet_diffusion.pipelines."  # prefix of the class that model_index.json names for our other runs
GENERATES = "_label_names"  # a key that only runs that generate images have
KEPT_LABELS = "_kept_label_names"  # the key for the same names in a run for masks whose noise head is another run's
LEFT_NOISE = "_left_noise"  # the key, in such a run, for what `part_that_left_noise` returns
TUNED = "_few_steps"  # the key for the largest number of steps that a network was tuned for
GENERATION = "ImageGenerationPipeline"  # our class for runs that generate images
SEGMENTATION = "SegmentationPipeline"  # our class for runs that give masks
TRUNK_STAYS = ("head", "pixel_classifier")  # values of `learn` that leave the layers under the noise head as they were
SUPER_RESOLUTION = "SuperResolutionPipeline"  # the class that model_index.json names for a run that enlarges images


def read_object(path: Path) -> dict[str, Any]:
    """Reads the keys and values of a JSON file; raises a ValueError if it cannot be read or holds something else."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; repair it, or get it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but must hold keys and values; repair it.")
    return values


def saved_section(run: Path, name: str) -> dict[str, Any] | None:
    """A section of the options that a run was started with; None if there is none, as in the folder of a pipeline."""
    path = run / CONFIG
    return read_object(path).get(name) if path.is_file() else None


def check_run(run: Path) -> None:
    """Raises a ValueError unless the folder holds a saved pipeline."""
    if not (run / INDEX).is_file():
        raise ValueError(f"run is {run}, but there is no {INDEX}; give the folder of a finished run.")


def check_run_for(run: Path, pipeline: str) -> None:
    """Raises a ValueError unless the folder holds a saved pipeline that the class of this name can use.

    Only a `SuperResolutionPipeline` loads a super-resolution run, and it loads no other. A run whose noise head no
    longer fits (`part_that_left_noise`) does not generate.
    """
    check_run(run)
    saved = saved_kind(run)
    if saved == SUPER_RESOLUTION and pipeline != SUPER_RESOLUTION:
        raise ValueError(f"{run} is a super-resolution run, which only enlarges images; use it with upscale.")
    if saved != SUPER_RESOLUTION and pipeline == SUPER_RESOLUTION:
        raise ValueError(
            f"{run} holds a {saved}, which does not enlarge images; train one that does: train-ddpm --task "
            "super-resolution."
        )
    if pipeline == GENERATION and "scheduler" not in saved_components(run):
        raise ValueError(
            f"{run} holds a {saved} without a scheduler, which generates nothing; segment images with it, or give the "
            "folder of a run of train-ddpm."
        )
    part = part_that_left_noise(run)
    if pipeline == GENERATION and part is not None:
        raise ValueError(
            f"{run}, or a run that it started from, learnt masks with learn={part!r}, which changed the layers under "
            "its noise head, so it no longer generates; give the run that learnt to generate, or train masks from that "
            f"one with denoising_weight above 0, or with learn={' or '.join(map(repr, TRUNK_STAYS))}."
        )


def part_that_left_noise(run: Path) -> str | None:
    """The part of a network that learnt masks alone, if its noise head no longer fits the layers under it.

    It may have learnt in an earlier run, from which this one started. None if the noise head fits, if it learnt too, or
    if the folder does not say what learnt.
    """
    seen: set[Path] = set()
    while run not in seen and saved_kind(run) == SEGMENTATION:
        seen.add(run)
        index, options = read_object(run / INDEX), saved_section(run, "segmentation")
        if GENERATES in index:
            return None
        part = index.get(LEFT_NOISE, options.get("learn") if isinstance(options, dict) else None)
        if LEFT_NOISE in index or part not in TRUNK_STAYS:
            return part if isinstance(part, str) else None
        run = Path(str(read_object(run / CONFIG).get("model")))  # earlier versions did not carry the part along
    return None


def kept_noise_head(run: Path, learn: str) -> dict[str, Any]:
    """The private values of `model_index.json` for a run for masks that starts from `run` and keeps its noise head.

    `learn` is the part that learns masks. If the noise head still fits the layers under it, the values also hold the
    names of its classes and the number of steps that it was tuned for.
    """
    part = part_that_left_noise(run) if learn in TRUNK_STAYS else learn
    fitting = {KEPT_LABELS: saved_label_names(run), TUNED: saved_few_steps(run)} if part is None else {}
    return {LEFT_NOISE: part, **fitting}


def noise_head_run(run: Path) -> Path:
    """The run in which the noise head of a run learnt: the run itself, unless it learnt masks alone.

    Such a run has the noise head of the run that it started from, which is followed as far as it is still there.
    """
    seen: set[Path] = set()
    while run not in seen and saved_kind(run) == SEGMENTATION and GENERATES not in read_object(run / INDEX):
        seen.add(run)
        model = Path(str(read_object(run / CONFIG).get("model"))) if (run / CONFIG).is_file() else run
        run = model if (model / INDEX).is_file() else run
    return run


def saved_kind(run: Path) -> str | None:
    """The class name of a saved pipeline; None if the folder holds no pipeline."""
    index = run / INDEX
    return pipeline_name(read_object(index)) if index.is_file() else None


def pipeline_name(index: Mapping[str, Any]) -> Any:
    """The class that saved a pipeline, in the content of its `model_index.json`."""
    name = index.get("_class_name")
    if name == STOCK_PIPELINE:
        return index.get(OWN_PIPELINE, name)
    return name.removeprefix(OWN_PIPELINES) if isinstance(name, str) else name


def saved_few_steps(run: Path) -> int | None:
    """The largest number of steps that the network of a saved pipeline was tuned for; None if it was not tuned."""
    index = run / INDEX
    return read_object(index).get(TUNED) if index.is_file() else None


def saved_label_names(run: Path) -> list[str] | None:
    """The names of the classes that a saved pipeline generates; None if it has none."""
    index = read_object(run / INDEX)
    return from_index(index.get(GENERATES, index.get(KEPT_LABELS)))


def saved_class_names(run: Path) -> list[str] | None:
    """The names of the classes that a saved pipeline tells apart in its masks; None if it has none."""
    return from_index(read_object(run / INDEX).get("_class_names"))


def saved_components(run: Path) -> dict[str, tuple[str, str]]:
    """The module and the class of each component of a saved pipeline, by the component's name and subfolder.

    Raises:
        ValueError: the folder holds no run, or a component comes from other code or cannot be a subfolder.
    """
    check_run(run)
    return named_components(read_object(run / INDEX), run)


def named_components(index: Mapping[str, Any], run: Path) -> dict[str, tuple[str, str]]:
    """The components, as `saved_components` gives them, in the content of the `model_index.json` of a run."""
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or not name.isidentifier():
            raise ValueError(f"{INDEX} of {run} has {name!r}: {entry}, which is not a component; get the run again.")
        if entry[0].partition(".")[0] not in ("diffusers", "unet_diffusion"):
            raise ValueError(
                f"{name} of {run} is a {'.'.join(entry)}, but only code of diffusers and of this package is run; load "
                "it with DiffusionPipeline.from_pretrained(..., trust_remote_code=True), if you trust it."
            )
        found[name] = (entry[0], entry[1])
    if "unet" not in found:
        raise ValueError(f"{INDEX} of {run} names no unet; give the folder of a finished run.")
    return found


def unet_folder(run: Path) -> Path:
    """Returns the folder with the weights of a run or a saved network; raises a ValueError if there are none."""
    for folder in (run / "unet", run):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            return folder
    raise ValueError(
        f"{run} holds no trained network: there is no config.json beside weights as safetensors, the only format that "
        "is read; give the folder of a finished run."
    )


def scheduler_folder(run: Path) -> Path | None:
    """The folder of the scheduler of a DDPM run, or of a run that started from one; None for any other folder."""
    saved_in = (folder for folder in (run / "scheduler", run) if (folder / "scheduler_config.json").is_file())
    return next(saved_in, None)


def to_index(key: str, value: Any) -> Any:
    """Converts a value to the form for `model_index.json`; lists under private keys are wrapped.

    When it loads from the Hub, diffusers takes every bare list for a component.
    """
    return {"list": value} if key.startswith("_") and isinstance(value, list) else value


def from_index(value: Any) -> Any:
    """Returns the value that `to_index` converted."""
    return value["list"] if isinstance(value, dict) and value.keys() == {"list"} else value
