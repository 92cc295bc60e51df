#!/usr/bin/env python
"""Compare generated images with real ones; the same as `unet-diffusion evaluate-generation`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("evaluate-generation")
