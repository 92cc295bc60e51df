"""Programs of a clone: the quickstart, training under `accelerate launch`, measurements, images of the documents."""

from pathlib import Path

NETWORKS = Path(__file__).parent / "networks"  # JSON files of config values
