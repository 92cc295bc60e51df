"""Finding objects, by our ways and by those of peers: `python -m scripts.experiments.instances`."""
