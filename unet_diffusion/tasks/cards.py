"""The README that a run writes beside its weights."""

import json
import shlex
import sys
from typing import Any

from torch import nn

from unet_diffusion.training.metrics_log import series
from unet_diffusion.unet import UNet
from unet_diffusion.version import __version__

FRONT_MATTER = """\
---
library_name: diffusers
tags:
- unet-diffusion
- {tag}
---
"""


def diffusion_card(name: str, unet: UNet, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The card of a noise predictor.

    Args:
        name: title of the card.
        unet: the trained network.
        rows: the lines of its `metrics.jsonl`.
        config: the resolved configuration of the run.
    """
    return f"""{FRONT_MATTER.format(tag="unconditional-image-generation")}
# {name}

A U-Net of {parameters(unet)} parameters that generates images of {size(unet)} pixels with \
{unet.config.in_channels} channel(s), trained as a noise predictor (DDPM) with unet-diffusion {__version__}.

![Samples, 20 steps of DPM-Solver++](samples.png)

## Use

```python
import torch
import unet_diffusion
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{name}")  # this folder
pipe(generator=torch.manual_seed(0)).images[0].save("sample.png")
```

Faster, in 20 steps: `unet-diffusion sample --run {name}`.

## Training

{training_facts(rows, config)}

![Curves](curves.png)
"""


def super_resolution_card(name: str, pipe: Any, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The card of a super-resolution run; arguments as `diffusion_card`, with the pipeline for the network."""
    unet = pipe.unet
    return f"""{FRONT_MATTER.format(tag="image-to-image")}
# {name}

A U-Net of {parameters(unet)} parameters that makes images with {unet.config.out_channels} channel(s) \
{pipe.scale} times larger a side, trained on images of {size(unet)} pixels as a noise predictor that sees the small \
image (SR3, Saharia et al. 2021) with unet-diffusion {__version__}. The detail that it adds is drawn at random: \
likely detail, not what was there.

![Held-out images: small, enlarged in 20 steps of DPM-Solver++, original](samples.png)

## Use

```python
from unet_diffusion.pipelines import SuperResolutionPipeline
from unet_diffusion.diffusion.sampling import sampler

pipe = SuperResolutionPipeline.from_pretrained("{name}")  # this folder
pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
pipe("small.png", num_inference_steps=20).images[0].save("large.png")
```

or `unet-diffusion upscale --run {name} --inputs small.png`.

## Training

{training_facts(rows, config)}

![Curves](curves.png)
"""


def segmentation_card(name: str, pipe: Any, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The card of a segmentation run, whose weights are those of the best validation; arguments as `diffusion_card`."""
    unet, classifier = pipe.unet, pipe.classifier
    also = "It also still holds the noise head.\n" if unet.noise_head is not None else ""
    what = f"A U-Net of {parameters(unet)} parameters"
    if classifier is not None:
        what = f"A classifier of {parameters(classifier)} parameters beside a frozen U-Net of {parameters(unet)}"
    return f"""{FRONT_MATTER.format(tag="image-segmentation")}
# {name}

{what} that gives every pixel one of {pipe.num_classes} classes, trained with unet-diffusion {__version__}. {also}
![Images, their masks and the predictions](masks.png)

## Use

```python
from unet_diffusion.pipelines import SegmentationPipeline

pipe = SegmentationPipeline.from_pretrained("{name}")  # this folder
pipe("image.png").masks[0].save("mask.png")
```

## Training

{training_facts(rows, config)}

![Curves](curves.png)
"""


def classification_card(name: str, classifier: Any, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The card of an `ImageClassifier`, whose weights are those of the best validation; arguments as above."""
    saved = classifier.config
    return f"""{FRONT_MATTER.format(tag="image-classification")}
# {name}

A classifier of {parameters(classifier)} parameters that gives images with {saved.in_channels} channel(s) one of \
{saved.num_classes} classes, trained with unet-diffusion {__version__}. Its {saved.widths[-1]} features say how near \
generated images are to real ones.

![Held-out images whose own class gets the lowest probability](hardest.png)

## Use

`unet-diffusion evaluate-generation --run RUN --data DATA --features {name}` compares the images of a DDPM run with \
real ones. In Python:

```python
from unet_diffusion.evaluation.classifier import ImageClassifier

classifier = ImageClassifier.from_pretrained("{name}/classifier").eval()  # in this folder
logits = classifier(images)  # images (B, {saved.in_channels}, H, W) in [-1, 1]; logits (B, {saved.num_classes})
features = classifier.features(images)  # (B, {saved.widths[-1]})
```

## Training

{training_facts(rows, config, best_by=("accuracy", "Accuracy"))}

![Curves](curves.png)
"""


def training_facts(
    rows: list[dict[str, Any]], config: dict[str, Any], best_by: tuple[str, str] = ("mean_iou", "Mean IoU")
) -> str:
    """Data, command, steps, losses and the whole configuration, as Markdown.

    Args:
        rows: as `diffusion_card` has it.
        config: likewise.
        best_by: the score by which the weights were chosen, if it was logged: as in `rows`, and as it is written.
    """
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
    steps, scores = series(rows, best_by[0])
    if scores:
        best = max(range(len(scores)), key=scores.__getitem__)
        facts[best_by[1]] = f"{scores[best]:.5f} on held-out images, at step {steps[best]}, whose weights these are"
    lines = [f"- {label}: {text}" for label, text in facts.items()]
    return "\n".join([*lines, "", "```json", json.dumps(config, indent=2, default=str), "```"])


def parameters(network: nn.Module) -> str:
    """The number of parameters, with separators."""
    return f"{sum(parameter.numel() for parameter in network.parameters()):,}"


def size(unet: UNet) -> str:
    """The images' size as height x width."""
    sides = unet.config.sample_size
    return f"{sides}x{sides}" if isinstance(sides, int) else f"{sides[0]}x{sides[1]}"
