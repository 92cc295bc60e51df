from unet_diffusion.metrics_log import MetricsLog, read_metrics, series


def test_a_resumed_run_neither_misses_nor_doubles_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in (1, 2, 3):
        log.append(step, loss=step / 3)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a killed run's last line
    log = MetricsLog(path, step=2)
    log.append(3, loss=1.0)
    assert read_metrics(path) == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 3, "loss": 1.0},
    ]


def test_series_leaves_out_rows_without_the_quantity():
    rows = [{"step": 1, "loss": 2.0}, {"step": 1, "validation_loss": 3.0}, {"step": 2, "loss": 1.0}]
    assert series(rows, "loss") == ([1, 2], [2.0, 1.0])
    assert series(rows, "absent") == ([], [])
