import json
from dataclasses import replace

import pytest
import torch

from scripts.experiments import segmentation
from tests.support.blobs import blobs
from unet_diffusion.data.masked.config import AugmentationConfig


@pytest.mark.slow
def test_every_network_is_trained_and_scored_on_the_same_test_set(tmp_path):
    for name, count in (("train", 4), ("validation", 2), ("test", 3)):
        blobs(tmp_path, name, count)
    names = ("ours", "ours-lean", "ronneberger-2015", "monai-basic-unet", "batch-norm-unet")
    options = segmentation.Comparison(
        data=tmp_path, output=tmp_path / "out", networks=names, crop_size=32, steps=2, batch_size=2, instances=True
    )
    text = segmentation.compare(options)
    results = json.loads((options.output / "comparison.json").read_text())
    assert results["scores"]["threshold"]["pooled"]["mean_iou"] > 0.99  # the square is far brighter than the noise
    assert results["scores"]["most frequent class"]["pooled"]["accuracy"] == pytest.approx(1 - 100 / 48**2)
    counts = results["parameters"]
    assert set(counts) == set(names)
    assert max(counts.values()) < 1.15 * min(counts.values())  # about equal, as the documents say
    assert text.count("\n| ") == 7 + 1 and (options.output / "overlays.png").stat().st_size > 0
    assert len(results["scores"]["ours"]["images"]) == 3


def test_a_finished_network_is_not_taken_for_one_of_other_options(tmp_path, monkeypatch):
    for name, count in (("train", 4), ("validation", 2)):
        blobs(tmp_path, name, count)
    options = segmentation.Comparison(tmp_path, tmp_path / "out", crop_size=32, steps=1, batch_size=2)
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"channels": [4, 8], "head_channels": 4}))
    monkeypatch.setitem(segmentation.OURS, "ours", str(network))
    segmentation.train(options, "ours")
    segmentation.train(options, "ours")  # nothing has changed
    with pytest.raises(ValueError, match=r"noise is 0.5, but the run in .*ours was started with 0.02"):
        segmentation.train(replace(options, augmentation=AugmentationConfig(noise=0.5)), "ours")
    blobs(tmp_path, "validation", 3)
    with pytest.raises(ValueError, match="the data have changed since the run in .*ours was started"):
        segmentation.train(options, "ours")
    blobs(tmp_path, "validation", 2)
    network.write_text(json.dumps({"channels": [8, 8], "head_channels": 4}))
    with pytest.raises(ValueError, match=r"network is {.*}, but the run in .*ours was started with {"):
        segmentation.train(options, "ours")


def test_differences_are_taken_image_by_image():
    def scores(*values: float):
        images = tuple({"mean_iou": value, "boundary_f1": float("nan")} for value in values)
        return segmentation.Scores(2, 2.0, {}, {}, images)

    # differences 0.1, 0.1, 0.4: mean 0.2, standard error 0.1; Student's 97.5% point with 2 degrees is 4.3027
    text = segmentation.differences({"ours": scores(0.5, 0.6, 0.9), "monai-basic-unet": scores(0.4, 0.5, 0.5)})
    assert text.strip() == "ours minus monai-basic-unet, mean over images: mean_iou +0.2000 +- 0.4303"


@pytest.mark.parametrize(
    ("image", "num_classes", "expected"),
    [
        ([[[10, 200]]], 2, [[0, 1]]),  # electron microscopy: the dark is class 0
        ([[[10, 90]]] * 3, 2, [[0, 1]]),  # fluorescence: the bright is class 1
        ([[[250, 190]]] * 3, 2, [[0, 1]]),  # bright field: the dark is class 1
        ([[[250, 120, 20]], [[240, 130, 10]], [[60, 50, 40]]], 3, [[0, 1, 2]]),  # blood: the darker, the higher
    ],
)
def test_the_threshold_knows_what_is_dark_in_each_kind_of_image(image, num_classes, expected):
    jitter = torch.arange(40).reshape(40, 1) % 5 - 2  # forty rows of the same, a few grey levels apart
    stored = (torch.tensor(image) + jitter).to(torch.uint8)
    assert segmentation.threshold(num_classes)(stored).tolist() == expected * 40
