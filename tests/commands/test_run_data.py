"""The data of a finished run."""

import json
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from unet_diffusion.commands.run_data import held_out_masks
from unet_diffusion.data.masked.config import MaskedDataConfig
from unet_diffusion.data.masked.sets import load_masked
from unet_diffusion.data.record import make_record


def test_masks_that_were_held_out_keep_the_classes_of_the_run(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)
    for folder in ("images", "masks", "run"):
        (tmp_path / folder).mkdir()
    for number in range(6):
        mask = np.random.default_rng(number).integers(0, 3, (8, 8))
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(colours[mask]).save(tmp_path / "masks" / f"{number}.png")
    labelmap = tmp_path / "masks" / "labelmap.txt"
    labelmap.write_text("background:0,0,0::\ncat:255,0,0::\ndog:0,0,255::")
    config = MaskedDataConfig(
        str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.5,
    )
    data = load_masked(config)
    run = tmp_path / "run"
    make_record(data, config.preparation, mask_encoding=data.encoding.to_dict()).write(run)
    (run / "config.json").write_text(json.dumps({"data": asdict(config)}))
    learnt = [data.validation[i]["mask"] for i in range(len(data.validation))]
    for text in ("background:0,0,0::\ndog:0,0,255::\ncat:255,0,0::", None):
        labelmap.unlink() if text is None else labelmap.write_text(text)
        own = held_out_masks(run, 3)
        assert len(own) == len(learnt) > 0
        assert all(torch.equal(own[i]["mask"], mask) for i, mask in enumerate(learnt))
