"""The command `unet-diffusion doctor`, which examines a data set before training."""
