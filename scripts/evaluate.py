#!/usr/bin/env python
"""Score a trained run on images with masks; the same as `unet-diffusion evaluate`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("evaluate")
