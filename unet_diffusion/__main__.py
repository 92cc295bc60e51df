"""`python -m unet_diffusion COMMAND`, and so `accelerate launch -m unet_diffusion train-ddpm`: as `unet-diffusion`."""

from unet_diffusion.cli import main

if __name__ == "__main__":
    main()
