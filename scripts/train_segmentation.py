#!/usr/bin/env python
"""Train segmentation under `accelerate launch`; otherwise the same as `unet-diffusion train-segmentation`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("train-segmentation")
