"""Steps that are skipped because a number in them was lost, and when to stop because of them."""

import logging

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts the steps whose loss or gradient was not finite; they change no weight and no average.

    Args:
        limit: so many in a row end the run.

    Attributes:
        total: since the start of the run.
        in_a_row: up to now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0

    def add(self, step: int, what: str) -> None:
        """Counts and reports one.

        Args:
            step: which one, counted from 0.
            what: what it was about, such as timesteps and images.

        Raises:
            FloatingPointError: it was the last that is borne.
        """
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row < self.limit:
            logger.warning("step %d skipped, since its loss or gradient is not finite: %s", step, what)
            return
        raise FloatingPointError(
            f"the loss or gradient was not finite in {self.in_a_row} steps in a row, up to step {step}: {what}. No "
            "weight was changed by them, and the last checkpoint is kept. Look at these images; if nothing is wrong "
            "with them, start anew with a lower learning_rate, or with mixed_precision='no'."
        )

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Goes back to what `state` was."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]
