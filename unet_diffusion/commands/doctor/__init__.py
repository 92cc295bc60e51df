"""The files of the command `unet-diffusion doctor`."""
