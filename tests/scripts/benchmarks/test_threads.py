"""The benchmark of threads beside busy programs, on a small network."""

import json

import pytest

from scripts.benchmarks import threads


@pytest.mark.slow
def test_each_way_is_timed_beside_each_number_of_programs(tmp_path, monkeypatch):
    config = tmp_path / "network.json"
    config.write_text(json.dumps({"channels": [4, 8], "attention": [False, False]}))
    with pytest.raises(ValueError, match="OMP_NUM_THREADS is '1', but must not be set"):
        threads.run(threads.BenchmarkThreads(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS")
    options = threads.BenchmarkThreads(tmp_path / "out", config, busy=(0, 1), steps=1, batch_size=2, rounds=1)
    text = threads.run(options)
    rows = json.loads((tmp_path / "out" / "benchmark_threads.json").read_text())["rows"]
    assert [(row["busy"], row["way"]) for row in rows] == [(0, "default"), (0, "ours"), (1, "default"), (1, "ours")]
    assert all(row["seconds"] > 0 and row["threads"] >= 1 for row in rows)
    assert "| 1 |" in text and "PyTorch's default" in text
