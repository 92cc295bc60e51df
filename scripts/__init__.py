"""Programs that run from a clone: quickstart, training under `accelerate launch`, measurements, drawings."""

from pathlib import Path

NETWORKS = Path(__file__).parent / "networks"  # JSON files of config values
