"""The notebooks of `examples/`: their code runs, and their outputs are those of the code."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LARGEST = 300_000  # bytes


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks_for_both_tasks():
    assert [path.stem for path in NOTEBOOKS] == ["generate", "masks"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_its_outputs_and_is_small(notebook):
    assert notebook.stat().st_size < LARGEST
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 2
    for data in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 100
    assert "/tmp" not in json.dumps(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    """In a fresh process and an empty folder, with fewer steps."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    short = re.sub(r"\b((?:warmup_)?steps)=\d+", r"\1=2", code)
    assert short != code
    (tmp_path / "cells.py").write_text(short, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "cells.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
