#!/usr/bin/env python
"""Write a trained run in another form; the same as `unet-diffusion export`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("export")
