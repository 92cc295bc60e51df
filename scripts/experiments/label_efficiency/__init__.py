"""Learning masks from few labelled images, in several ways: `python -m scripts.experiments.label_efficiency`."""
