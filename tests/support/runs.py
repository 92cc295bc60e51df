"""The state and the metrics of finished runs, for comparisons."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from unet_diffusion.training.metrics_log import read_metrics


def final_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moving average and optimizer after the last step, and the weights for use."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    parts = {part: load_file(folder / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    parts["exported"] = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def metrics(run: Path) -> list[dict]:
    """The logged numbers, without times."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def assert_same_run(a: Path, b: Path, step: int) -> None:
    before, after = final_state(a, step), final_state(b, step)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert metrics(a) == metrics(b)
