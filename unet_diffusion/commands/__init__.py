"""The commands of `unet-diffusion`, one a file."""
