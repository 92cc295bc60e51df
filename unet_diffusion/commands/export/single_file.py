"""A run as one file: safetensors with all weights, and all configs as JSON in the metadata.

Reading it parses only numbers and JSON, and runs no code except that of diffusers and this package.
"""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unet_diffusion import pipelines
from unet_diffusion.saved_index import (
    INDEX,
    from_index,
    named_components,
    pipeline_name,
    read_object,
    saved_components,
)
from unet_diffusion.saved_runs import MAX_NAMES, NETWORKS, check_finite, load_weights
from unet_diffusion.version import __version__

PIPELINE = "model_index"  # the pipeline's key in the metadata; each component's config has the component's name


def write_single_file(run: Path, target: Path) -> str:
    """Writes the weights and the configs of a run to a file, reads it again and compares; returns its content in words.

    Raises a RuntimeError if the file holds other numbers than the run.
    """
    index = read_object(run / INDEX)
    pipeline_class(index, run)
    configs: dict[str, Any] = {PIPELINE: index}
    tensors: dict[str, Tensor] = {}
    for name, entry in saved_components(run).items():
        kind = component_class(entry, run)
        if issubclass(kind, SchedulerMixin):
            configs[name] = read_object(run / name / "scheduler_config.json")
        else:
            configs[name] = read_object(run / name / "config.json")
            stored = stored_tensors(run / name)  # in their own data types, while a network is loaded in float32
            for key, value in load_weights(kind, run / name).state_dict().items():
                tensors[f"{name}.{key}"] = stored.get(key, value).contiguous()  # diffusers renames some
    metadata = {name: json.dumps(config, sort_keys=True) for name, config in configs.items()}
    made_with = {"format": "pt", "unet_diffusion": __version__}  # "format" as in all files of diffusers
    save_file(tensors, target, {**metadata, **made_with})

    load_single_file(target)
    _, found = read_safetensors(target)
    for key, value in tensors.items():
        if key not in found or found[key].dtype != value.dtype or not torch.equal(found[key], value):
            raise RuntimeError(
                f"{key} was read back with other numbers than those of {run}, so nothing was written; try another disk."
            )
    count = sum(value.numel() for value in tensors.values())
    return f"{len(tensors)} tensors of {count:,} numbers, each bit for bit that of the run"


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the safetensors files of a network, of which there are several if an index names them."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(read_object(index)["weight_map"].values()) if index.is_file() else {SAFETENSORS_WEIGHTS_NAME}
    return {key: value for file in files for key, value in read_safetensors(folder / file)[1].items()}


def load_single_file(path: str | Path) -> Any:
    """Loads the pipeline in a file of `write_single_file`; its `unet` is the network, in evaluation mode.

    Weights are loaded in float32, as `from_pretrained` does, also if the run was saved in half precision.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.pipelines import SegmentationPipeline
        >>> from unet_diffusion.commands.export.single_file import load_single_file, write_single_file

        >>> pipe = SegmentationPipeline(UNet.from_preset("tiny").to_segmentation(2).eval())
        >>> with TemporaryDirectory() as folder:
        ...     pipe.save_pretrained(f"{folder}/run")
        ...     _ = write_single_file(Path(folder, "run"), Path(folder, "masks.safetensors"))
        ...     load_single_file(f"{folder}/masks.safetensors").num_classes
        2

    Raises:
        ValueError: the file is missing or damaged, or names code of neither this package nor diffusers.
    """
    path = Path(path)
    metadata, tensors = read_safetensors(path)
    index = config_in(metadata, PIPELINE, path)
    kind = pipeline_class(index, path)
    parts: dict[str, Any] = {}
    for name, entry in named_components(index, path).items():
        weights = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        parts[name] = component(component_class(entry, path), config_in(metadata, name, path), weights, path)
    for name in signature(kind).parameters:
        if f"_{name}" in index:
            parts[name] = from_index(index[f"_{name}"])
    try:
        return kind(**parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not make a {kind.__name__}: {error}; get it again.") from error


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file, copied to memory; ValueError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}; get it again.") from error


def config_in(metadata: Mapping[str, str], name: str, path: Path) -> dict[str, Any]:
    """The config of a name in the metadata; ValueError if there is none."""
    try:
        values = json.loads(metadata.get(name, ""))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"the metadata of {path} has no {name} as JSON; give a file written by unet-diffusion export --format "
            "safetensors-single."
        )
    return values


def pipeline_class(index: Mapping[str, Any], place: Path) -> type:
    """The class of a pipeline of this package or of diffusers; ValueError for another."""
    name = pipeline_name(index)
    kind = getattr(pipelines, name, None) or getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(f"{place} is a pipeline of other code, {name}, which is not run; load it with that code.")
    return kind


def component_class(entry: tuple[str, str], place: Path) -> Any:
    """The class of a network or a scheduler of this package or of diffusers; ValueError for another."""
    module, name = entry
    of_diffusers = getattr(diffusers, name, None) if module.partition(".")[0] == "diffusers" else None
    kind = NETWORKS.get(entry, of_diffusers)
    if not (isinstance(kind, type) and issubclass(kind, (ModelMixin, SchedulerMixin))):
        raise ValueError(f"{place} names {module}.{name}, but there is no such network or scheduler; update both.")
    return kind


def component(kind: Any, config: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> Any:
    """Makes a scheduler from its config, or a network from its config and finite weights."""
    try:
        made = kind.from_config(dict(config))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the {kind.__name__} of {path} cannot be made: {error}; get it again.") from error
    if not isinstance(made, ModelMixin):
        return made
    shapes, found = ({name: value.shape for name, value in each.items()} for each in (made.state_dict(), weights))
    if shapes != found:
        names = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        raise ValueError(
            f"the weights in {path} are those of another network: {len(names)} are missing, unexpected or of another "
            f"shape, such as {', '.join(names[:MAX_NAMES])}; get it again."
        )
    made.load_state_dict(weights)
    check_finite(made, path)
    return made.eval()
