"""The folder of the scripts, for tests that start them as programs."""

from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
