#!/usr/bin/env python
"""Generate images with a trained run; the same as `unet-diffusion sample`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("sample")
