import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from torch import nn

from scripts.benchmarks import tiling, tiling_memory
from unet_diffusion import UNet
from unet_diffusion.pipelines import SegmentationPipeline


@pytest.mark.slow
def test_exactness_keeps_the_promise_and_would_notice_a_broken_one(tmp_path, capsys, monkeypatch):
    file = tmp_path / "exactness.json"
    arguments = ["exactness", "--output", str(file), "--sizes", "111", "93", "96", "128"]
    arguments += ["--tile-size", "16", "--channels", "4", "6", "8"]
    tiling.main(arguments)
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 6 * 2  # networks, sizes
    assert all(case["windows"] > 1 and case["difference"] <= 1e-5 for case in cases)
    assert all(case["off_the_stride"] > 1e-3 for case in cases)  # rounding is 1e-6: the weights let windows matter
    assert capsys.readouterr().out.count("\n| ") == 1 + 6  # the line under the head, and the networks

    right = tiling.tiled_logits
    wrong = tiling.off_the_stride
    monkeypatch.setattr(tiling, "tiled_logits", lambda unet, image, tiling: right(unet, image, wrong(tiling)))
    with pytest.raises(SystemExit, match="differ from the whole"):
        tiling.main(arguments)


@pytest.mark.slow
def test_memory_is_the_peak_of_a_fresh_process_and_a_finished_case_is_kept(tmp_path, capsys):
    file = tmp_path / "memory.json"
    case = {"preset": "tiny", "height": 48, "width": 32, "seed": 0}
    arguments = ["memory", "--output", str(file), "--cases", "tiny", "48", "32"]
    tiling.main(arguments)
    (row,) = json.loads(file.read_text())["cases"]
    assert case.items() <= row.items()
    assert 50 < row["before_mib"] <= row["peak_mib"] < 2048  # PyTorch alone is more than 50
    assert row["anonymous_before_mib"] <= row["anonymous_mib"] <= row["peak_mib"]
    assert {"image_mib", "cpu_seconds", "wall_seconds", "date", "torch", "threads", "cores"} <= row.keys()

    marked = {**row, "peak_mib": -1}
    file.write_text(json.dumps({"cases": [marked]}))
    tiling.main(arguments)
    assert json.loads(file.read_text())["cases"] == [marked]
    assert "| tiny | 48 | 32 |" in capsys.readouterr().out


def test_the_generated_image_is_an_8_bit_array_of_noise(tmp_path):
    """Mean 127.5 within 4 standard errors of 300 * 20 * 3 values of standard deviation 73.9."""
    tiling_memory.write_image(tmp_path / "image.npy", (300, 20, 3), seed=0)
    image = np.load(tmp_path / "image.npy")
    assert image.shape == (300, 20, 3)
    assert image.dtype == np.uint8
    assert abs(image.mean() - 127.5) < 4 * 73.9 / image.size**0.5


def test_blending_compares_windows_with_the_whole_and_with_the_masks(tmp_path):
    """Windows as large as the image change nothing; those of 24 pixels do, with GroupNorm and random weights."""
    torch.manual_seed(1)
    unet = UNet(in_channels=1, out_channels=None, num_classes=2, channels=(8, 16), head_channels=8)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3)
    pipe = SegmentationPipeline(unet.eval())
    pipe.save_pretrained(tmp_path / "run")
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (side, 40), dtype=np.uint8) for side in (40, 56)]
    masks = [(image > 127).astype(np.uint8) for image in images]
    rows = {"image": list(map(PILImage.fromarray, images)), "mask": list(map(PILImage.fromarray, masks))}
    Dataset.from_dict(rows, features=Features({"image": Image(), "mask": Image()})).to_parquet(tmp_path / "set.parquet")

    file = tmp_path / "blending.json"
    options = ["blending", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "set.parquet")]
    tiling.main([*options, "--windows", "24", "64", "--output", str(file)])
    result = json.loads(file.read_text())
    assert (result["images"], result["data"]["data"]) == (2, str(tmp_path / "set.parquet"))
    whole, small, large = result["cases"]
    assert [case["window"] for case in result["cases"]] == ["whole", "24", "64"]
    right = sum(int((pipe(p, output_type="np").masks[0] == m).sum()) for p, m in zip(images, masks))
    assert whole["accuracy"] == pytest.approx(right / sum(mask.size for mask in masks))
    assert {**whole, "window": "64"} == large
    assert (whole["changed"], whole["windows_per_image"]) == (0, 1)
    assert 0 < small["changed"] < 0.5
    # 16 of a window's 24 pixels are new: 40 = 24 + 16, 56 = 24 + 16 + 16
    assert small["windows_per_image"] == (2 * 2 + 3 * 2) / 2


def test_blending_says_what_is_wrong(tmp_path):
    with pytest.raises(SystemExit, match="give the folder of a finished run"):
        tiling.main(["blending", "--run", str(tmp_path), "--data", "none.parquet"])
    with pytest.raises(ValueError, match="give larger ones"):
        tiling.tile_for(UNet(in_channels=1, out_channels=None, num_classes=2, channels=(8, 16), head_channels=8), 4)
