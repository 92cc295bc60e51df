import json

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from unet_diffusion import UNet, UNet2DAdapter
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline

NAMES = ["paper", "ink"]


def pipelines() -> list:
    unet = UNet.from_preset("tiny", num_classes=2, num_class_embeds=2)
    generation = ImageGenerationPipeline(unet, DDPMScheduler(), label_names=NAMES)
    return [generation, SegmentationPipeline(unet, class_names=NAMES, palette=[[0, 0, 0], [9, 9, 9]])]


@pytest.mark.parametrize("pipe", pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_lists_in_the_index_are_components_alone(pipe, tmp_path):
    """Loading from the Hub, diffusers takes every list for a component and looks for its folder."""
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {key for key, value in index.items() if isinstance(value, list)} == {"unet", "scheduler"}


def test_names_and_colours_come_back(tmp_path):
    generation, segmentation = pipelines()
    generation.save_pretrained(tmp_path / "generation")
    segmentation.save_pretrained(tmp_path / "segmentation")
    assert ImageGenerationPipeline.from_pretrained(tmp_path / "generation").label_names == NAMES
    again = SegmentationPipeline.from_pretrained(tmp_path / "segmentation")
    assert (again.class_names, again.palette) == (NAMES, [[0, 0, 0], [9, 9, 9]])


def test_runs_of_earlier_versions_load(tmp_path):
    segmentation = pipelines()[1]
    segmentation.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_names"] = NAMES  # a plain list, as in early versions
    path.write_text(json.dumps(index))
    assert SegmentationPipeline.from_pretrained(tmp_path).class_names == NAMES


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_label_names", 5, "label_names is 5, but must be a list of names"),
        ("_label_names", {"list": "ab"}, "label_names is 'ab', but must be a list of names"),
        ("_label_names", {"list": ["a"]}, "label_names has 1 entries, but the network has 2 classes"),
        ("_label_names", {"list": ["a", "a"]}, "'a' stands for more than one class"),
        ("_pixel_range", 5, "has the keys low, high, dtype"),
    ],
)
def test_values_in_the_index_that_cannot_be_are_named(key, value, message, tmp_path):
    pipelines()[0].save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        ImageGenerationPipeline.from_pretrained(tmp_path)


def test_names_and_colours_may_be_arrays():
    names, palette = np.array(NAMES), np.array([[0, 0, 0], [9, 9, 9]], dtype=np.uint8)
    pipe = SegmentationPipeline(UNet.from_preset("tiny", num_classes=2), class_names=names, palette=palette)
    assert (list(pipe.class_names), [list(entry) for entry in pipe.palette]) == (NAMES, [[0, 0, 0], [9, 9, 9]])


@pytest.mark.parametrize("pipe", pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_a_folder_that_a_stock_pipeline_saved_again_is_warned_of(pipe, tmp_path, caplog):
    type(pipe)(pipe.unet, DDPMScheduler()).save_pretrained(tmp_path / "ours")
    type(pipe).from_pretrained(tmp_path / "ours")
    assert not caplog.messages
    stock = DDPMPipeline.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "again")
    type(pipe).from_pretrained(tmp_path / "again", pixel_range={"low": [0], "high": [1], "dtype": "float32"})
    assert not caplog.messages
    type(pipe).from_pretrained(tmp_path / "again")
    (message,) = caplog.messages
    assert "again was saved by a pipeline of diffusers, which leaves out the range of pixel values" in message


def test_a_stock_network_is_refused_and_its_adapter_named():
    stock = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(ValueError, match="the network is a UNet2DModel, but must have the heads of a UNet; make one"):
        ImageGenerationPipeline(stock, DDPMScheduler())
    ImageGenerationPipeline(UNet2DAdapter.from_stock(stock), DDPMScheduler())
