"""The files of the command `unet-diffusion demo`."""
