"""The heads of a run as graphs that need nothing of this package: ONNX, and programs of `torch.export`."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.commands.export.graph_files import compare, load_onnx, load_program, write_onnx, write_program
from unet_diffusion.commands.export.head_function import HeadFunction, Sizes, traced
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.saved_index import from_index, read_object, saved_components
from unet_diffusion.saved_runs import load_saved
from unet_diffusion.unet import UNet
from unet_diffusion.version import __version__

FORMS = {"onnx": ("onnx", write_onnx, load_onnx), "torch-export": ("pt2", write_program, load_program)}
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: protobuf ends at 2 GiB, and the graph is in the file too


def write_graphs(form: str, run: Path, target: Path, head: str | None) -> list[str]:
    """Writes a file for each head, such as `segmentation.onnx`, and compares each with the network.

    Args:
        form: one of `FORMS`.
        run: folder of a saved pipeline.
        target: folder to make.
        head: "segmentation" or "noise"; None: all that the run has.

    Returns:
        A sentence for each file: how far it is from the network.

    Raises:
        ValueError: a head that the run lacks, or that no graph of this form can be made of.
        ImportError: a library is missing.
        RuntimeError: a file does not compute what the network computes.
    """
    check_libraries(form)
    unet = load_saved(run / "unet")
    functions = [HeadFunction(unet, name) for name in heads_of(run, unet, head)]
    for function in functions:
        check_function(function, form, run)
    target.mkdir()
    suffix, write, load = FORMS[form]
    sizes = Sizes.of_network(unet) if form == "onnx" else Sizes.of_program(unet)
    lines = []
    for function in functions:
        file = target / f"{function.head}.{suffix}"
        write(traced(function), function, file, fields_of(function, sizes, form, run))
        lines.append(compare(function, load(file), sizes.tried(unet), file.name))
    return lines


def check_libraries(form: str) -> None:
    """Raises an ImportError that names the extra unless the libraries of a form are installed."""
    for name in LIBRARIES if form == "onnx" else ():
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"format 'onnx' needs {name}: pip install unet-diffusion[export]") from error


def heads_of(run: Path, unet: UNet, wanted: str | None) -> list[str]:
    """The heads to write.

    Raises:
        ValueError: the run lacks the one that is wanted, or its masks come from a pixel classifier.
    """
    if wanted != "noise" and "classifier" in saved_components(run):
        raise ValueError(
            f"the masks of {run} come from a pixel classifier, which reads images with noise at several timesteps, "
            "so they are no function of the image alone; set head='noise' for its noise predictor, or "
            "format='safetensors-single' for both."
        )
    layers = {"segmentation": unet.segmentation_head, "noise": unet.noise_head}
    present = [name for name, layer in layers.items() if layer is not None]
    if wanted is not None and wanted not in present:
        raise ValueError(
            f"head is {wanted!r}, but the network of {run} has {' and '.join(map(repr, present))} only; leave head out."
        )
    return present if wanted is None else [wanted]


def check_function(function: HeadFunction, form: str, run: Path) -> None:
    """Raises a ValueError for a head that cannot be called with these inputs, or is too large for the form."""
    sizes = Sizes.of_network(function.unet)
    try:
        with torch.no_grad():
            function(*function.example(1, sizes.smallest, sizes.smallest))
    except ValueError as error:
        other = " Set head='noise' for the other." if function.head == "segmentation" else ""
        raise ValueError(f"the {function.head} head of {run} cannot be exported: {error}{other}") from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in function.unet.state_dict().values())
    if form == "onnx" and size > LARGEST_ONNX:
        raise ValueError(
            f"the weights of {run} take {size / 2**30:.3f} GiB, but a file of ONNX holds less than 2 GiB; set "
            "format='torch-export'."
        )


def fields_of(function: HeadFunction, sizes: Sizes, form: str, run: Path) -> dict[str, str]:
    """What a file says of itself, as text; lists and objects are JSON, and what a run lacks is left out."""
    index, config = read_object(run / "model_index.json"), function.unet.config
    saved = {name: from_index(index.get(f"_{name}")) for name in ("pixel_range", "class_names", "palette")}
    fields: dict[str, Any] = {
        "made_with": f"unet-diffusion {__version__}, torch {torch.__version__}",
        "format": form,
        "head": function.head,
        "inputs": function.names,
        "value_range": [-1, 1],  # of clean images
        "pixel_range": saved["pixel_range"] or PixelRange.full("uint8").to_dict(),  # the stored values that become it
        "smallest_side": sizes.smallest,
        "sides_are_multiples_of": sizes.multiple,
        "largest_batch": sizes.largest_batch,
    }
    if function.head == "segmentation":
        names = {name: saved[name] for name in ("class_names", "palette")}
        fields |= {"output": "logits", "num_classes": config.num_classes, "padding": config.padding, **names}
    else:
        scheduler = run / "scheduler" / "scheduler_config.json"
        fields |= {"output": "prediction", "scheduler": read_object(scheduler) if scheduler.is_file() else None}
        fields["scale"] = index.get("_scale")  # of super-resolution
    if "class_labels" in function.names:
        fields |= {"num_class_embeds": config.num_class_embeds, "label_names": from_index(index.get("_label_names"))}
        fields["null_class"] = config.num_class_embeds if config.label_dropout > 0 else None
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
        if value is not None
    }
