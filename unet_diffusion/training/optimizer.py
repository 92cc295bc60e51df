"""The optimizers of the training loop: AdamW, and Muon for the kernels inside the U beside AdamW for the rest."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unet_diffusion.training.config import OptimizerName

INSIDE = {"encoder", "bridge", "decoder", "down_blocks", "mid_block", "up_blocks"}  # modules between stem and heads
KERNEL_RATE = 20.0  # Muon's learning rate over AdamW's: our default of 1e-3 gives 0.02, as its authors use
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial of Jordan et al. 2024, steepest at 0
SHORT_SIDE = 128  # of matrices; from here on, products in bfloat16 are faster on a CPU that has it

Groups = Iterable[tuple[list[nn.Parameter], float]]  # parameters, and their share of the learning rate


def make_optimizer(
    name: OptimizerName,
    network: nn.Module,
    groups: Groups,
    learning_rate: float,
    weight_decay: float,
    products: torch.dtype = torch.float32,
) -> torch.optim.Optimizer:
    """Makes the optimizer of this name; each of its groups has a `share` of the learning rate.

    Muon multiplies large matrices in the type of `products`.

    Raises:
        ValueError: Muon is asked for, but the network has no kernels that it could learn.
    """
    if name == "adamw":
        whole = [{"params": parameters, "share": share} for parameters, share in groups]
        return torch.optim.AdamW(whole, learning_rate, weight_decay=weight_decay, fused=True)
    inside = set(kernels_inside(network))
    split: list[dict[str, Any]] = []
    for parameters, share in groups:
        split.append({"params": [each for each in parameters if each not in inside], "share": share})
        kernels = [each for each in parameters if each in inside]
        split.append({"params": kernels, "share": KERNEL_RATE * share, "kernels": True})
    split = [group for group in split if group["params"]]
    if not any("kernels" in group for group in split):
        raise ValueError(
            "optimizer is 'muon', but no kernel inside the U learns, and Muon is for nothing else; set it to 'adamw'."
        )
    optimizer = Muon(split, learning_rate, weight_decay=weight_decay, fused=True)
    optimizer.products = products
    return optimizer


def kernels_inside(network: nn.Module) -> list[nn.Parameter]:
    """Returns the weights of convolutions and linear layers between the first layer and the heads."""
    named = network.named_parameters()
    return [parameter for name, parameter in named if parameter.ndim >= 2 and INSIDE & set(name.split("."))]


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), beside AdamW.

    Groups with the key `kernels` are learnt by Muon. It takes the momentum of a kernel as a matrix with a row for each
    output, and brings all singular values near 1. So directions with a small gradient are learnt as fast as others.
    The kernel of a transposed convolution has a row for each input, since PyTorch stores it so. With a stride as large
    as the kernel, as here, that is also the matrix of the map from an input pixel to its output pixels.
    `torch.optim.Muon` takes only matrices, and computes in bfloat16, which some processors emulate slowly. Here
    bfloat16 is for processors that have it: `products` is the type in which matrices with a short side of at least 128
    are multiplied.

    As with the fused AdamW, a step changes nothing if the attribute `found_inf` is above 0. The averages of AdamW and
    the momentum are in `state`. The arguments are those of `torch.optim.AdamW`.
    """

    products = torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step, and returns the loss of the closure."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group.get("kernels")]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        found_inf = getattr(self, "found_inf", None)
        for group in groups:
            if group.get("kernels"):
                self._step_kernels(group, None if found_inf is None else found_inf > 0)
        return loss

    def _step_kernels(self, group: dict[str, Any], lost: Tensor | None) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}  # kernels of one shape are updated at once
        for kernel in group["params"]:
            if kernel.grad is not None:
                by_shape.setdefault(tuple(kernel.shape), []).append(kernel)
        for shape, kernels in by_shape.items():
            gradients = torch.stack([kernel.grad for kernel in kernels if kernel.grad is not None])
            moments = torch.stack([self._momentum(kernel) for kernel in kernels])
            changed = moments.lerp(gradients, 1 - MOMENTUM)
            matrices = gradients.lerp(changed, MOMENTUM).flatten(2).float()
            large = min(matrices.shape[1:]) >= SHORT_SIDE
            updates = orthogonal(matrices, self.products if large else None).view_as(gradients)
            scale = group["lr"] * max(1.0, shape[0] / gradients[0, 0].numel()) ** 0.5
            for kernel, moment, update in zip(kernels, changed, updates):
                after = kernel * (1 - group["lr"] * group["weight_decay"]) - scale * update
                if lost is not None:
                    after, moment = torch.where(lost, kernel, after), torch.where(lost, self._momentum(kernel), moment)
                kernel.copy_(after)
                self._momentum(kernel).copy_(moment)

    def _momentum(self, kernel: nn.Parameter) -> Tensor:
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel, memory_format=torch.preserve_format)
        return state["momentum"]


def orthogonal(matrices: Tensor, products: torch.dtype | None = None) -> Tensor:
    """Returns matrices (B, M, N) with the singular vectors of the given ones, and singular values from 0.6 to 1.3.

    This is the Newton-Schulz iteration of Jordan et al. 2024, X <- a X + b (X X') X + c (X X')^2 X, which only
    multiplies matrices. X is only ever multiplied by polynomials of X X'. So the iteration runs on matrices of the
    short side alone: for a kernel of 3x3, a third of the work. Singular values below about a thousandth of the root of
    the sum of their squares stay smaller.

    Matrices are multiplied in the type `products`, by default their own type. In bfloat16 the errors of X X' grow
    without bound if one singular value is far above the others. So after three of the five iterations, X is computed,
    and X X' is computed from it again.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(products or matrices.dtype)
    for iterations in (3, 2) if wide.dtype == torch.bfloat16 else (5,):
        wide = _iterated(wide, iterations)
    wide = wide.to(matrices.dtype)
    return wide.mT if tall else wide


def _iterated(wide: Tensor, iterations: int) -> Tensor:
    """Returns X (B, M, N) after some iterations, which multiply matrices (B, M, M)."""
    a, b, c = COEFFICIENTS
    gram = wide @ wide.mT
    product = identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    for iteration in range(iterations):
        factor = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor @ product if iteration else factor
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    return product @ wide
