#!/usr/bin/env python
"""Train a DDPM under `accelerate launch`; otherwise the same as `unet-diffusion train-ddpm`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("train-ddpm")
