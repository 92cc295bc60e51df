"""What `UNet.forward` refuses, before anything is computed."""

from typing import Any

from torch import Tensor

HEADS = ("noise", "segmentation", "both", "features")


def check_input(unet: Any, sample: Tensor, timestep: Any, class_labels: Tensor | None, head: str) -> None:
    """Raises a ValueError that names the value, the rule and the fix unless `unet.forward` can take its arguments."""
    config = unet.config
    if head not in HEADS:
        raise ValueError(f"head is {head!r}, but must be one of {', '.join(HEADS)}.")
    if head in ("noise", "both") and unet.noise_head is None:
        raise ValueError(f"head is {head!r}, but the network has no noise head: out_channels is None.")
    if head in ("segmentation", "both") and unet.segmentation_head is None:
        raise ValueError(f"head is {head!r}, but there is no segmentation head; call to_segmentation(K) first.")
    if timestep is None and unet.time_embed is not None and head in ("noise", "both"):
        raise ValueError(f"head is {head!r}, but no timestep was given; noise is predicted at a timestep.")
    if timestep is not None and unet.time_embed is None:
        raise ValueError("a timestep was given, but the network knows none (time_embedding is None); leave it out.")
    if class_labels is not None and config.num_class_embeds is None:
        raise ValueError("class_labels were given, but the network has no classes: num_class_embeds is None.")
    if class_labels is None and config.num_class_embeds is not None and config.label_dropout == 0:
        raise ValueError(
            "class_labels are missing and the null class was not trained (label_dropout is 0); pass class_labels, "
            "or train with label_dropout > 0."
        )
    if sample.ndim != 4 or sample.shape[1] != config.in_channels:
        raise ValueError(
            f"sample has shape {tuple(sample.shape)}, but must be (batch, {config.in_channels}, height, width)."
        )
    if config.padding == "valid" and min(sample.shape[2:]) < unet.smallest_side:
        raise ValueError(
            f"sample is {sample.shape[2]}x{sample.shape[3]}, but unpadded convolutions over "
            f"{len(config.channels) - 1} downsamplings need at least {unet.smallest_side} pixels a side; "
            "pad it, or set padding='same'."
        )
