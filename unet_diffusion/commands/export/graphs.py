"""The heads of a run as graphs that run without this package: ONNX, and programs of `torch.export`.

Each file is written, read back, and compared with the network that it was made from.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from unet_diffusion.commands.export.head_function import HeadFunction, Sizes, traced
from unet_diffusion.pipelines.base import saved_range
from unet_diffusion.saved_index import (
    INDEX,
    from_index,
    part_that_left_noise,
    read_object,
    saved_components,
    saved_label_names,
)
from unet_diffusion.saved_runs import load_saved
from unet_diffusion.unet import UNet
from unet_diffusion.version import __version__

logger = logging.getLogger(__name__)

Graph = Callable[..., Tensor]  # read from a file; it takes the inputs of its `HeadFunction`

FIELDS = "metadata.json"  # the file in a program of torch.export that describes its inputs and output
TOLERANCE = 1e-4  # share of the largest absolute value; another order of additions causes about 1e-6
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
LARGEST_ONNX = 2**31 - 2**24  # bytes of weights: protobuf is limited to 2 GiB, and the graph needs some too


def write_graphs(form: str, run: Path, target: Path, head: str | None) -> list[str]:
    """Writes a file for the head, such as `segmentation.onnx`, or for all heads of the run if `head` is None.

    Each file is compared with the network; returns a sentence for each with its difference.
    """
    for name in LIBRARIES if form == "onnx" else ():
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"format 'onnx' needs {name}: pip install unet-diffusion[export]") from error
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


def heads_of(run: Path, unet: UNet, wanted: str | None) -> list[str]:
    """Returns the names of the heads to write; raises a ValueError if they are not functions of one image.

    By default, a noise head is left out if it no longer fits the layers under it; a warning says so.
    """
    if wanted != "noise" and "classifier" in saved_components(run):
        raise ValueError(
            f"the masks of {run} come from a pixel classifier, which reads images with noise at several timesteps, "
            "so they are not a function of the image alone; set head='noise' for its noise predictor, or "
            "format='safetensors-single' for both."
        )
    layers = {"segmentation": unet.segmentation_head, "noise": unet.noise_head}
    present = [name for name, layer in layers.items() if layer is not None]
    if wanted is not None and wanted not in present:
        raise ValueError(
            f"head is {wanted!r}, but the network of {run} only has {' and '.join(map(repr, present))}; leave head out."
        )
    part = part_that_left_noise(run)
    if wanted is None and part is not None and "noise" in present:
        logger.warning(
            "the noise head of %s is left out, since the layers under it have changed while this run, or one that it "
            "started from, learnt masks alone (learn=%r); set head='noise' to write it",
            run,
            part,
        )
        present.remove("noise")
    return present if wanted is None else [wanted]


def check_function(function: HeadFunction, form: str, run: Path) -> None:
    """Raises a ValueError if a head cannot be called with the inputs of a graph, or is too large for the form."""
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
            f"the weights of {run} take {size / 2**30:.3f} GiB, but an ONNX file holds less than 2 GiB; set "
            "format='torch-export'."
        )


def fields_of(function: HeadFunction, sizes: Sizes, form: str, run: Path) -> dict[str, str]:
    """Returns the metadata of a file as text; lists and objects are JSON, and fields that a run lacks are left out."""
    index, config = read_object(run / INDEX), function.unet.config
    saved = {name: from_index(index.get(f"_{name}")) for name in ("class_names", "palette")}
    fields: dict[str, Any] = {
        "made_with": f"unet-diffusion {__version__}, torch {torch.__version__}",
        "format": form,
        "head": function.head,
        "inputs": function.names,
        "value_range": [-1, 1],  # of clean images
        "pixel_range": saved_range(index.get("_pixel_range")).to_dict(),  # the stored values that map to it
        "smallest_side": sizes.smallest,
        "sides_are_multiples_of": sizes.multiple,
        "largest_batch": sizes.largest_batch,
    }
    if function.head == "segmentation":
        fields |= {"output": "logits", "num_classes": config.num_classes, "padding": config.padding}
        fields |= {"class_names": saved["class_names"], "palette": saved["palette"]}
        fields |= {"instances": config.instances or None, "object_diameter": config.object_diameter}
        fields |= {"object_min_area": config.object_min_area}
    else:
        scheduler = run / "scheduler" / "scheduler_config.json"
        fields |= {"output": "prediction", "scheduler": read_object(scheduler) if scheduler.is_file() else None}
        fields["scale"] = index.get("_scale")  # of super-resolution
    if "class_labels" in function.names:
        fields |= {"num_class_embeds": config.num_class_embeds, "label_names": saved_label_names(run)}
        fields["null_class"] = config.num_class_embeds if config.label_dropout > 0 else None
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
        if value is not None
    }


def write_program(program: ExportedProgram, function: HeadFunction, file: Path, fields: Mapping[str, str]) -> None:
    """Writes a program of `torch.export`, with its fields as an extra file inside."""
    torch.export.save(program, file, extra_files={FIELDS: json.dumps(dict(fields), indent=2)})


def load_program(file: Path) -> Graph:
    """Reads a program of `torch.export`, to run without gradients."""
    return torch.no_grad()(torch.export.load(file).module())


def write_onnx(program: ExportedProgram, function: HeadFunction, file: Path, fields: Mapping[str, str]) -> None:
    """Writes an ONNX graph, with its fields as metadata; inputs and output have the names in the fields."""
    axes = {0: "batch", 2: "height", 3: "width"}
    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=function.names,
            output_names=[fields["output"]],
            dynamic_shapes=((axes, *({} for _ in function.names[1:])),),
        )
    assert converted is not None  # since no file was given
    model = converted.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # notes of the compiler, as large as a small network
    model.metadata_props.update({**fields, "opset": str(model.opset_imports[""])})
    converted.save(file, external_data=False)


def load_onnx(file: Path) -> Graph:
    """Reads an ONNX graph, to run it in ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        (output,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return torch.from_numpy(output)

    return run


@torch.no_grad()
def compare(function: HeadFunction, graph: Graph, sizes: Sequence[tuple[int, int, int]], name: str) -> str:
    """Runs a graph and its network on the same inputs, and returns the largest difference as a sentence.

    Raises a RuntimeError if the graph of file `name` fails at one of the sizes (batch, height, width), or differs from
    the network by more than `TOLERANCE`.
    """
    report = f"so nothing was written; choose another format, and report this with torch {torch.__version__}."
    largest_absolute = largest_relative = 0.0
    for size in sizes:
        inputs = function.example(*size)
        expected, place = function(*inputs), f"a batch of {size[0]} of {size[1]}x{size[2]} pixels"
        try:
            found = graph(*inputs)
        except Exception as error:  # each library has its own classes
            raise RuntimeError(f"{name} cannot run on {place}, {report} It says: {error}") from error
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)} rather than {tuple(expected.shape)}"
            raise RuntimeError(f"{name} gives {shapes} for {place}, {report}")
        absolute, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        relative = absolute / scale if scale else absolute  # the network's output may be zero
        if not relative <= TOLERANCE:  # NaN included
            raise RuntimeError(
                f"{name} differs from the network by {absolute:.1e} for {place}, {relative:.1e} of the largest value, "
                f"but at most {TOLERANCE:.0e} is allowed, {report}"
            )
        largest_absolute, largest_relative = max(largest_absolute, absolute), max(largest_relative, relative)
    return (
        f"{name}: at {len(sizes)} batches and sizes, {', '.join('x'.join(map(str, size)) for size in sizes)}, it "
        f"differs from torch by at most {largest_absolute:.1e}, {largest_relative:.1e} of the largest value"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hides warnings of torch about its own code and about torchvision during the conversion."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


FORMS = {"onnx": ("onnx", write_onnx, load_onnx), "torch-export": ("pt2", write_program, load_program)}
