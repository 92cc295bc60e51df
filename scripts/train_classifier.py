#!/usr/bin/env python
"""Train a classifier of whole images; the same as `unet-diffusion train-classifier`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("train-classifier")
