#!/usr/bin/env python
"""Open a page to play with a run in a browser; the same as `unet-diffusion demo`."""

from unet_diffusion.cli import run

if __name__ == "__main__":
    run("demo")
