"""The weights that did best on the held-out images, and when to stop for want of better ones."""

from typing import Any

from torch import Tensor, nn


class BestWeights:
    """Keeps a copy of the weights with the highest score so far, on the CPU.

    Args:
        patience: validations in a row without a higher score after which training is over; None: never.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.score: float | None = None
        self.step = 0
        self.misses = 0  # validations since
        self.tensors: dict[str, Tensor] = {}

    def offer(self, score: float, step: int, network: nn.Module) -> None:
        """Takes the network's weights if the score is higher than all before; NaN never is."""
        if score > (-float("inf") if self.score is None else self.score):
            self.score, self.step, self.misses = score, step, 0
            self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
        else:
            self.misses += 1

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.misses >= self.patience

    def load_into(self, network: nn.Module) -> None:
        """Gives a network the best weights, if there are any yet."""
        if self.tensors:
            network.load_state_dict(self.tensors)

    def state(self) -> dict[str, Any]:
        """All but the weights, for a checkpoint."""
        return {"score": self.score, "step": self.step, "misses": self.misses}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Goes back to what `state` and `tensors` were."""
        self.score, self.step, self.misses = state["score"], state["step"], state["misses"]
        self.tensors = tensors
