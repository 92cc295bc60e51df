"""Model cards: the README that a run writes beside its weights."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from unet_diffusion.training.metrics_log import series
from unet_diffusion.unet import UNet
from unet_diffusion.version import __version__

SCORES = {"mean_iou": "Mean IoU", "accuracy": "Accuracy"}  # scores by which weights are chosen


@dataclass(frozen=True)
class Card:
    """The parts of a model card that depend on the task, as Markdown.

    Attributes:
        tag: the Hugging Face Hub's name of the task.
        summary: what the network is and does; `{version}` stands for this package and its version.
        images: files that show what it does, and their captions.
        use: how to use it; `{name}` stands for the name of the run.
    """

    tag: str
    summary: str
    images: Mapping[str, str]
    use: str

    def text(
        self,
        name: str,
        rows: list[dict[str, Any]],
        config: dict[str, Any],
        best_by: str | None,
        data: Sequence[str] = (),
    ) -> str:
        """Returns the whole card of a run: its name, the lines of its `metrics.jsonl` and its configuration.

        The weights were chosen by the quantity `best_by`; None means they are the last ones. `data` holds the lines of
        the data summary.
        """
        shown = "\n\n".join(f"![{caption}]({file})" for file, caption in self.images.items())
        return f"""\
---
library_name: diffusers
tags:
- unet-diffusion
- {self.tag}
---

# {name}

{self.summary.replace("{version}", f"unet-diffusion {__version__}")}

{shown}

## Use

{self.use.replace("{name}", name).strip()}

{data_section(data)}## Training

{training_facts(rows, config, best_by)}

![Curves](curves.png)
"""


def data_section(lines: Sequence[str]) -> str:
    """Returns the section on the data, as a text block that keeps columns aligned; empty if there are no lines."""
    return "\n".join(["## Data", "", "```text", *lines, "```", "", ""]) if lines else ""


def training_facts(rows: list[dict[str, Any]], config: dict[str, Any], best_by: str | None) -> str:
    """Returns data, command, steps, losses and the whole configuration as Markdown, for `Card.text`."""
    training = config["training"]
    facts = {
        "Data": config["data"]["data"],
        "Command": f"`{shlex.join(sys.argv)}`" if sys.argv[0] else "a call from Python",
        "Optimizer steps": str(rows[-1]["step"]),
        "Batch per process": f"{training['batch_size']} x {training['accumulate']} accumulated",
    }
    for quantity in ("loss", "validation_loss"):
        values = series(rows, quantity)[1]
        if values:
            facts[quantity.replace("_", " ").capitalize()] = f"{values[-1]:.5f} at the last step"
    if best_by is not None:
        defined = [(score, -step) for step, score in zip(*series(rows, best_by)) if not math.isnan(score)]
        text = "undefined on held-out images; these are the last weights"
        if defined:
            best, step = max(defined)  # the first of equal scores
            text = f"{best:.5f} on held-out images, at step {-step}, the step of these weights"
        facts[SCORES.get(best_by, best_by)] = text
    lines = [f"- {label}: {text}" for label, text in facts.items()]
    return "\n".join([*lines, "", "```json", json.dumps(config, indent=2, default=str), "```"])


def parameters(network: nn.Module) -> str:
    """Returns the number of parameters as text, with thousands separators."""
    return f"{sum(parameter.numel() for parameter in network.parameters()):,}"


def size(unet: UNet) -> str:
    """Returns the size of the images as height x width."""
    sides = unet.config.sample_size
    return f"{sides}x{sides}" if isinstance(sides, int) else f"{sides[0]}x{sides[1]}"
