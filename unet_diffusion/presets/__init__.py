"""Configs of networks that `UNet.from_preset` and `--model` take by name, as JSON."""
