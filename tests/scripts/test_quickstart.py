import json

from PIL import Image

from scripts import quickstart


def test_the_quickstart_leaves_its_images_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.tasks.diffusion.best_sampling", lambda *_: ("dpm-solver++", 2))
    steps = {"diffusion_steps": 2, "segmentation_steps": 2, "sampling_steps": 2}
    options = quickstart.Quickstart(tmp_path / "quickstart", **steps, max_images=40)
    figures = quickstart.quickstart(options)
    for name in ("samples.png", "masks.png", "curves.png"):
        assert Image.open(options.output / name).size[0] > 100
    assert json.loads((options.output / "metrics.json").read_text()) == figures
    assert 0 <= figures["mean_iou"] <= 1
