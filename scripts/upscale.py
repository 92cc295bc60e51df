#!/usr/bin/env python
"""Enlarge image files with a super-resolution run; the same as `unet-diffusion upscale`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("upscale")
