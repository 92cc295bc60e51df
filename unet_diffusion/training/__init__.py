"""The training loop and all that it needs; it knows no task."""
