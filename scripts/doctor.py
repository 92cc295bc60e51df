#!/usr/bin/env python
"""Look at a data set before training; the same as `unet-diffusion doctor`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("doctor")
