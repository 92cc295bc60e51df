#!/usr/bin/env python
"""Segment image files with a trained run; the same as `unet-diffusion segment`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("segment")
