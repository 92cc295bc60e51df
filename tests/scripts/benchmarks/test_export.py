"""The benchmark of exported graphs, on a small network, so that it takes seconds."""

import json
from functools import partial

import pytest

from scripts.benchmarks import export


@pytest.mark.slow
def test_the_benchmark_of_exports_times_each_form_against_torch(tmp_path, capsys):
    config = tmp_path / "network.json"
    config.write_text(json.dumps({"channels": [4, 8], "attention": [False, False]}))
    measure = partial(export.BenchmarkExport, model=str(config), output=tmp_path / "speed")
    with pytest.raises(ValueError, match="sizes is '16', but each must be height x width, such as 128x128"):
        measure(sizes=("16",))
    export.run(measure(sizes=("16x16", "17x13"), rounds=3))
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "speed" / "benchmark_export.json").read_text())
    assert [(row["form"], row["size"]) for row in figures["rows"]] == [
        (form, size) for size in ("16x16", "17x13") for form in ("onnx", "torch-export")
    ]
    assert all(row["low"] <= row["times_as_fast"] <= row["high"] for row in figures["rows"])
    assert "| onnx | 17x13 |" in printed
