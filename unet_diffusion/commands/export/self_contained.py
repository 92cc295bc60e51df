"""A run as a folder that diffusers loads without this package, with the code beside the weights."""

import importlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from unet_diffusion import pipelines
from unet_diffusion.commands.export.source_bundle import PACKAGE, bundle, of_package
from unet_diffusion.files import PREFIX
from unet_diffusion.images.conversion import fits_stock_pipelines, has_png
from unet_diffusion.network.config import needs_class
from unet_diffusion.pipelines.base import saved_range
from unet_diffusion.saved_index import INDEX, STOCK_PIPELINE, TUNED, pipeline_name, read_object, saved_components
from unet_diffusion.saved_runs import load_weights
from unet_diffusion.version import __version__

DEFAULT_STEPS = 1000  # of DDPMPipeline
COPIED = (".json", ".safetensors")  # other files in a run's folder may be code or pickles
README = """\
---
library_name: diffusers
tags:
- unet-diffusion
---

# {name}

Made with unet-diffusion {version}, which is not needed to use it: the code lies beside the weights.

```bash
pip install torch "diffusers>=0.42" accelerate einops
```

```python
{loading}
```

The network alone:

```python
from diffusers import AutoModel

unet = AutoModel.from_pretrained("{name}/unet", trust_remote_code=True)
```

`trust_remote_code=True` lets diffusers run the Python files of this folder; read them first. They are under the Apache
License, Version 2.0, as each of them says at its top.
"""
STOCK = """\
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{name}", trust_remote_code=True)  # this folder
pipe({steps}).images[0].save("sample.png")"""
OWN = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)  # this folder
pipe("image.png").{result}"""
RESULTS = {
    "SegmentationPipeline": 'masks[0].save("mask.png")',
    "SuperResolutionPipeline": 'images[0].save("large.png")',
}
BOTH = f"""\
{STOCK}

# with {{choices}}
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "{{name}}", custom_pipeline="{{code}}", trust_remote_code=True
)"""

ALONE = """\
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(  # with {choices}
    "{name}", custom_pipeline="{code}", trust_remote_code=True
)
pipe({steps}).images{result}"""


def write_self_contained(run: Path, target: Path, name: str) -> None:
    """Writes a folder that diffusers loads without this package.

    Weights are copied as they are. Each network of this package gets a file with its code (`source_bundle`), which
    `config.json` names for `AutoModel` and `model_index.json` for pipelines. Our pipelines get such a file too. A
    generation run is saved as a `DDPMPipeline`, which can load it, and the README names ours as the custom pipeline.
    `name` is the name of the folder in the README.
    """
    index, components = read_object(run / INDEX), saved_components(run)
    kind = pipeline_name(index)
    if not isinstance(kind, str):
        raise ValueError(f"{run} is a pipeline of other code: {kind}; it cannot be exported.")
    networks = {key: network_class(*entry) for key, entry in components.items() if of_package(entry[0])}
    if not networks:
        raise ValueError(f"{run} holds no network that needs {PACKAGE}; diffusers can load it as it is.")
    target.mkdir()
    for key in components:
        copy_component(run / key, target / key, networks.get(key))
    for key, network in networks.items():
        code = write_code(network, target / key)
        index[key] = [code, network.__name__]
        path = target / key / "config.json"
        config = read_object(path)
        config["auto_map"] = {"AutoModel": f"{code}.{network.__name__}"}
        config["_use_default_values"] = ["auto_map"]  # for `AutoModel` only; the network would warn about it
        write_sorted(path, config)

    own = getattr(pipelines, kind, None)
    code = "" if own is None else write_code(own, target)
    loading = STOCK
    if own is pipelines.ImageGenerationPipeline:
        index["_class_name"], loading = STOCK_PIPELINE, BOTH
    elif own is not None:
        index["_class_name"], loading = [code, own.__name__], OWN
    write_sorted(target / INDEX, index)
    result = "" if own is None else RESULTS.get(own.__name__, "")
    steps, choices = "", "any scheduler, classes and guidance"
    if index.get(TUNED) is not None:
        steps, choices = "num_inference_steps=1", f"classes, and 1 to {index[TUNED]} steps of LCMScheduler"
    if loading is BOTH:
        timesteps = read_object(run / "scheduler" / "scheduler_config.json").get("num_train_timesteps", DEFAULT_STEPS)
        steps = steps or (f"num_inference_steps={timesteps}" if timesteps < DEFAULT_STEPS else "")
        unet, pixel_range = read_object(run / "unet" / "config.json"), saved_range(index.get("_pixel_range"))
        with_class = needs_class(unet)
        if with_class or not fits_stock_pipelines(unet["in_channels"], pixel_range):
            loading, result = ALONE, '[0].save("sample.png")'
            steps = ", ".join(
                [steps or f"num_inference_steps={timesteps}", *(["class_labels=0"] if with_class else [])]
            )
            if not has_png(unet["in_channels"], pixel_range):
                steps, result = f'{steps}, output_type="stored"', "  # (1, C, H, W), values as in the files"
    facts = {"pipeline": index["_class_name"], "code": code, "result": result, "steps": steps, "choices": choices}
    loading = loading.format(name=name, **facts)
    readme = README.format(name=name, version=__version__, loading=loading)
    (target / "README.md").write_text(readme, encoding="utf-8")


def copy_component(source: Path, target: Path, network: type | None) -> None:
    """Copies the configs of a component and, if it is a network, its weights, after loading them once as a check."""
    files = [file for file in source.glob("*") if file.suffix in COPIED and not file.name.startswith(PREFIX)]
    if not any(file.suffix == (".json" if network is None else ".safetensors") for file in files):
        raise ValueError(f"{source} holds no weights or no config; give the folder of a finished run.")
    if network is not None:
        load_weights(network, source)
    target.mkdir()
    for file in files:
        if file.suffix == ".json":
            read_object(file)
        shutil.copy(file, target)


def network_class(module: str, name: str) -> type:
    """The class of a network of this package, by its module and name; ValueError if there is none."""
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ValueError(f"model_index.json names {module}.{name}, but there is no such network; update {PACKAGE}.")
    return kind


def write_code(kind: type, folder: Path) -> str:
    """Writes a file that defines a class, and returns its name without the suffix.

    The name contains the version, since diffusers loads all files of one name into one module.
    """
    version = re.sub(r"\W", "_", __version__)
    stem = f"{PACKAGE}_{kind.__module__.rpartition('.')[2]}_{version}"
    (folder / f"{stem}.py").write_text(bundle(kind), encoding="utf-8")
    return stem


def write_sorted(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON as diffusers does."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
