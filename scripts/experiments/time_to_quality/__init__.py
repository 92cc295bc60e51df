"""Training time until images are good, ours against a peer's: `python -m scripts.experiments.time_to_quality`."""
