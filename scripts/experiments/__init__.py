"""Trainings and evaluations that the documents report: `python -m scripts.experiments.NAME`."""
