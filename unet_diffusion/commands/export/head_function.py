"""One head of a network as a function of tensors, and the graph of this function for any batch, height and width."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from unet_diffusion.stock_unet import UNet2DAdapter
from unet_diffusion.unet import UNet

TIMESTEPS = 1000  # examples are drawn from these, unless the config gives their number
STOCK_BATCH = 63  # from 64 on, the upsampling of diffusers takes another path, which would need its own graph


@dataclass(frozen=True)
class Sizes:
    """The batches, heights and widths that a network or its graph takes."""

    smallest: int  # height and width, in pixels
    multiple: int = 1  # heights and widths are multiples of this
    largest_batch: int | None = None  # None: any

    @classmethod
    def of_network(cls, unet: UNet) -> "Sizes":
        """The sizes that a network takes; a stock one takes multiples of its stride."""
        stock = isinstance(unet, UNet2DAdapter)
        return cls(unet.stride, unet.stride) if stock else cls(unet.smallest_side)

    @classmethod
    def of_program(cls, unet: UNet) -> "Sizes":
        """The sizes that one program of `torch.export` takes; maps of a single row or column are excluded."""
        stock = isinstance(unet, UNet2DAdapter)
        return cls(2 * unet.stride, unet.stride, STOCK_BATCH) if stock else cls(unet.smallest_side + unet.stride)

    def tried(self, unet: UNet) -> list[tuple[int, int, int]]:
        """Batches, heights and widths to compare a graph at: smallest, even, odd, oblong, and those of training.

        The smallest height and width are not combined, since rounding errors are large if one or two pixels are
        normalised.
        """
        one = self.multiple
        side = -(-(self.smallest + unet.stride) // (2 * one)) * 2 * one  # even
        sizes = [
            (1, self.smallest, side),
            (2, side + one, self.smallest),
            (1, side, side),
            (3, side + one, side),
            (2, side, side + 3 * one),
            (4, side + 3 * one, side + 5 * one),
        ]
        size = unet.config.sample_size or 0
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) >= self.smallest and height % one == width % one == 0:
            sizes.append((1, height, width))
        return sizes


class HeadFunction(nn.Module):
    """One head, "segmentation" or "noise", of a network in evaluation mode as a function of float32 tensors."""

    def __init__(self, unet: UNet, head: str) -> None:
        super().__init__()
        self.unet = unet.float().eval()
        self.head = head
        self.names = ["image" if head == "segmentation" else "sample"]
        if head == "noise" and unet.time_embed is not None:
            self.names.append("timestep")
        if head == "noise" and unet.config.num_class_embeds is not None:
            self.names.append("class_labels")

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs `names`, (B, C, H, W), float32 (B,) and int64 (B,), to logits (B, K, H, W) or noise (B, C, H, W).

        Logits of a network with instances have two more channels, as in `UNetOutput`.
        """
        output = self.unet(*inputs, head=self.head)
        return output.logits if self.head == "segmentation" else output.sample

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Example inputs, the same at every call: images in [-1, 1], or noise, timesteps and classes."""
        generator, config = torch.Generator().manual_seed(0), self.unet.config
        shape = (batch, config.in_channels, height, width)
        steps = config.get("num_train_timesteps") or TIMESTEPS
        values = {
            "image": 2 * torch.rand(shape, generator=generator) - 1,
            "sample": torch.randn(shape, generator=generator),
            "timestep": torch.randint(1, steps, (batch,), generator=generator).float(),
            "class_labels": torch.randint(config.num_class_embeds or 1, (batch,), generator=generator),
        }
        return tuple(values[name] for name in self.names)


def traced(function: HeadFunction) -> ExportedProgram:
    """The graph of a head, for the sizes that `Sizes.of_program` allows."""
    sizes = Sizes.of_program(function.unet)
    multiple, least = sizes.multiple, sizes.smallest // sizes.multiple
    batch: Any = Dim("batch") if sizes.largest_batch is None else Dim("batch", max=sizes.largest_batch)
    ending = "" if multiple == 1 else f"_over_{multiple}"
    height, width = (Dim(f"{side}{ending}", min=least) for side in ("height", "width"))
    axes = {0: batch, 2: height, 3: width} if multiple == 1 else {0: batch, 2: multiple * height, 3: multiple * width}
    side = sizes.smallest + 2 * function.unet.stride
    with torch.no_grad():
        program = torch.export.export(
            function,
            function.example(2, side, side + 2 * multiple),
            dynamic_shapes=((axes, *({0: batch} for _ in function.names[1:])),),
            prefer_deferred_runtime_asserts_over_guards=True,  # otherwise sizes would need the example's parity
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    return program
