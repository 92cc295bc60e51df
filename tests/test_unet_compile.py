"""`torch.compile` and `torch.export` with any batch and size, and a forward that never waits for the device."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny
from unet_diffusion import UNet

SIZES = [(2, 24, 24), (2, 24, 22), (3, 25, 22), (3, 24, 21), (2, 21, 23), (1, 24, 24), (1, 25, 21)]


def network(**config) -> UNet:
    """A tiny network with attention at both resolutions."""
    return tiny.network(**{"attention": (True, True), **config})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class NoHostSync(TorchDispatchMode):
    """Fails if a tensor's value is read, which on an accelerator waits for all the work before it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "timestep", [5, 0.5, torch.tensor(5), torch.tensor([5, 6]), torch.tensor(0.5, dtype=torch.float64)]
)
@pytest.mark.parametrize("options", [{}, {"time_embedding": "fourier"}, {"block": "plain", "norm": "none"}])
def test_forward_never_reads_the_value_of_a_tensor(timestep, options):
    unet = network(num_class_embeds=3, label_dropout=0.1, num_classes=2, **options)
    with NoHostSync():
        unet(torch.zeros(2, 1, 9, 7), timestep, torch.tensor([0, 2]), head="both")
        unet(torch.zeros(2, 1, 9, 7), timestep)
        unet(torch.zeros(2, 1, 9, 7), head="segmentation")
    with pytest.raises(AssertionError), NoHostSync():
        torch.tensor(5).item()


def graphs(unet: UNet, backend: str) -> list[int]:
    """The number of graphs after each of SIZES, with outputs equal to the network's own."""
    compiled = torch.compile(unet, fullgraph=True, dynamic=True, backend=backend)  # fullgraph: a graph break raises
    seen = []
    for batch, height, width in SIZES:
        sample, timestep = torch.randn(batch, 1, height, width), torch.tensor(5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(sample, timestep).sample, unet(sample, timestep).sample)
        seen.append(counters["stats"]["unique_graphs"])
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"downsample": "conv", "upsample": "nearest"}, {"padding": "valid"}])
def test_compiles_at_most_three_graphs_and_none_for_parity(options):
    seen = graphs(network(**options), "eager")
    assert seen == [1, 2, 2, 2, 2, 3, 3]  # a square, any size, a batch of one


@pytest.mark.slow
def test_the_default_compiler_adds_no_graph_for_parity():
    """Its guards go beyond those of tracing: they also depend on the sizes that its kernels are made for."""
    assert graphs(network(attention=(False, False)), "inductor") == [1, 2, 2, 2, 2, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("example", [(2, 16, 16), (2, 17, 13)])
def test_an_exported_program_takes_every_batch_and_size(example):
    unet = network()
    dynamic = {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}
    program = torch.export.export(
        unet,
        (torch.randn(example[0], 1, *example[1:]), torch.tensor(5)),
        dynamic_shapes={"sample": dynamic, "timestep": None},
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for batch, height, width in SIZES[:-2]:
        sample = torch.randn(batch, 1, height, width)
        with torch.no_grad():
            expected = unet(sample, torch.tensor(5)).sample
            torch.testing.assert_close(program(sample, torch.tensor(5)).sample, expected)


@pytest.mark.slow
def test_repeated_blocks_compile_once_each_however_many_there_are():
    """More blocks of different widths than the compiler would recompile one function for (8)."""
    unet = network(channels=(8, 12, 16, 20, 24), blocks_per_stage=2, head_channels=4, attention=None)
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    sample = torch.randn(1, 1, 16, 16)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        first = unet(sample, 5).sample
        blocks = counters["stats"]["unique_graphs"]
        assert torch.equal(unet(sample, 5).sample, first)
    assert blocks == counters["stats"]["unique_graphs"] == 18
