"""Graphs as files: written, read again, and compared with the network that they were made of."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from unet_diffusion.commands.export.head_function import HeadFunction

Graph = Callable[..., Tensor]  # what was read from a file, to be called with the inputs of its `HeadFunction`

FIELDS = "metadata.json"  # of a program of torch.export: the file in it that says what goes in and comes out
TOLERANCE = 1e-4  # of the largest absolute value; kernels that add in another order differ by about 1e-6


def write_program(program: ExportedProgram, function: HeadFunction, file: Path, fields: Mapping[str, str]) -> None:
    """Writes a program of `torch.export`, its fields as one more file inside."""
    torch.export.save(program, file, extra_files={FIELDS: json.dumps(dict(fields), indent=2)})


def load_program(file: Path) -> Graph:
    """A program of `torch.export` that computes without gradients."""
    return torch.no_grad()(torch.export.load(file).module())


def write_onnx(program: ExportedProgram, function: HeadFunction, file: Path, fields: Mapping[str, str]) -> None:
    """Writes a graph of ONNX, its fields as metadata; inputs and output have the names that the fields tell."""
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
    assert converted is not None  # as without a file to write
    model = converted.model
    for node in model.graph.all_nodes():
        node.metadata_props.clear()  # how the compiler came to it, as large as a small network
    model.metadata_props.update({**fields, "opset": str(model.opset_imports[""])})
    converted.save(file, external_data=False)


def load_onnx(file: Path) -> Graph:
    """A graph of ONNX, run by ONNX Runtime on the CPU, by as many threads as torch has."""
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
    """Runs a graph and its network on the same inputs; returns how far they are apart at most, as a sentence.

    Args:
        function: the network's.
        graph: read from a file.
        sizes: batch, height and width of each input.
        name: of the file.

    Raises:
        RuntimeError: the graph cannot run at one of the sizes, or is further from the network than `TOLERANCE`.
    """
    report = f"so nothing was written; take another format, and report it with torch {torch.__version__}."
    largest_absolute = largest_relative = 0.0
    for size in sizes:
        inputs = function.example(*size)
        expected, place = function(*inputs), f"a batch of {size[0]} of {size[1]}x{size[2]} pixels"
        try:
            found = graph(*inputs)
        except Exception as error:  # each library has classes of its own
            raise RuntimeError(f"{name} cannot run on {place}, {report} It says: {error}") from error
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)} rather than {tuple(expected.shape)}"
            raise RuntimeError(f"{name} gives {shapes} for {place}, {report}")
        absolute, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        relative = absolute / scale if scale else absolute  # an untrained noise head predicts zero
        if not relative <= TOLERANCE:  # NaN included
            raise RuntimeError(
                f"{name} differs from the network by {absolute:.1e} for {place}, {relative:.1e} of the largest value, "
                f"but may by {TOLERANCE:.0e} at most, {report}"
            )
        largest_absolute, largest_relative = max(largest_absolute, absolute), max(largest_relative, relative)
    return (
        f"{name}: at {len(sizes)} batches and sizes, {', '.join('x'.join(map(str, size)) for size in sizes)}, it "
        f"differs from torch by at most {largest_absolute:.1e}, {largest_relative:.1e} of the largest value"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what torch says of its own code, and of torchvision, while it converts."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
