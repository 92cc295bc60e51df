"""Runs `unet-diffusion` as `python -m unet_diffusion`, and so as `accelerate launch -m unet_diffusion`."""

from unet_diffusion.cli import main

if __name__ == "__main__":
    main()
