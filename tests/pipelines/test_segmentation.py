"""The segmentation pipeline: its results, its errors, and how it is saved."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import nn

from tests.support.segmentation import SMALL, image, network, pipeline, saved
from unet_diffusion import UNet
from unet_diffusion.images.large_images import write_labels
from unet_diffusion.images.palette import colour
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationOutput, SegmentationPipeline
from unet_diffusion.segmentation.objects import find_objects

REPOSITORY = Path(__file__).resolve().parents[2]


def expected_probabilities(unet: UNet, pixels: np.ndarray) -> torch.Tensor:
    """The expected output of the pipeline, in one line of torch: (K, H, W)."""
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return unet(images, head="segmentation").logits.softmax(dim=1)[0]


# --- what it computes ---


@pytest.mark.parametrize("size", [(1, 1), (17, 30), (33, 8)])
def test_probabilities_masks_and_uncertainty_are_those_of_the_network(size):
    pipe = pipeline()
    pixels = image(*size)
    expected = expected_probabilities(pipe.unet, pixels)
    output = pipe(pixels, output_type="pt")
    assert isinstance(output, SegmentationOutput)
    torch.testing.assert_close(output.probabilities[0], expected, rtol=0, atol=1e-5)
    assert torch.equal(output.masks[0], output.probabilities[0].argmax(dim=0))
    entropy = -(expected * expected.log()).sum(dim=0) / np.log(3)
    torch.testing.assert_close(output.uncertainty[0], entropy, rtol=0, atol=1e-4)


def test_uncertainty_is_1_for_equal_scores_and_0_for_certain_ones():
    pipe = pipeline()
    nn.init.zeros_(pipe.unet.segmentation_head.weight)
    nn.init.zeros_(pipe.unet.segmentation_head.bias)
    assert pipe(image(8, 8), output_type="np").uncertainty[0] == pytest.approx(np.ones((8, 8)), abs=1e-6)
    pipe.unet.segmentation_head.bias.data[1] = 200.0
    output = pipe(image(8, 8), output_type="np")
    assert not output.uncertainty[0].any()
    assert (output.masks[0] == 1).all()


def test_every_kind_of_input_gives_the_same_mask(tmp_path):
    pipe = pipeline(network(in_channels=3, out_channels=3))
    pixels = image(20, 14, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    inputs = [
        pixels,
        Image.fromarray(pixels),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        tensor,
        tensor[None],
        [pixels],
    ]
    masks = [pipe(each, output_type="np").masks for each in inputs]
    assert all(len(mask) == 1 and np.array_equal(mask[0], masks[0][0]) for mask in masks)
    assert masks[0][0].shape == (20, 14)


def test_a_list_of_different_sizes_gives_each_its_own_mask_and_batching_changes_nothing():
    pipe = pipeline()
    sizes = [(9, 12), (9, 12), (20, 5), (9, 12)]
    images = [image(*size, seed=seed) for seed, size in enumerate(sizes)]
    together = pipe(images, output_type="np")
    assert [mask.shape for mask in together.masks] == sizes
    for pixels, probabilities in zip(images, together.probabilities):
        np.testing.assert_allclose(pipe(pixels, output_type="np").probabilities[0], probabilities, atol=1e-5)


def test_grey_images_may_lack_the_channel_axis():
    pipe = pipeline()
    pixels = image(11, 7)
    assert np.array_equal(pipe(pixels[..., 0], output_type="np").masks[0], pipe(pixels, output_type="np").masks[0])


def test_orientation_by_exif_is_applied(tmp_path):
    pixels = image(6, 10)
    stored = Image.fromarray(pixels[..., 0])
    exif = stored.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    stored.save(tmp_path / "turned.png", exif=exif)
    assert pipeline()(tmp_path / "turned.png").masks[0].size == (6, 10)


def test_stored_values_are_mapped_by_the_pixel_range():
    """12-bit values in 16 bits: 0..4095 to [-1, 1], as 8-bit values that are the same share of their range."""
    unet = network()
    eight = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4, 1)  # 0, 17, ... 255 = 15 * 17; 4095 = 15 * 273
    twelve = eight.astype(np.uint16) // 17 * 273
    deep = pipeline(unet, pixel_range=PixelRange((0.0,), (4095.0,), "uint16").to_dict())
    expected = pipeline(unet)(eight, output_type="np").probabilities[0]
    np.testing.assert_allclose(deep(twelve, output_type="np").probabilities[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="uint8, but the network was trained on uint16"):
        deep(eight)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_images_with_a_range_each_are_stretched_as_a_whole_in_memory_and_from_files(tmp_path, monkeypatch, dtype):
    unet = network(norm="none", attention=(False, False))
    own = pipeline(unet, pixel_range=PixelRange.stretched(dtype, (5.0, 95.0)).to_dict())
    fixed = pipeline(unet, pixel_range=PixelRange.stretched(dtype, (5.0, 95.0)).to_dict() | {"percentiles": None})
    images = [(image(40, 30, seed=seed) // 8).astype(dtype) for seed in range(2)]
    expected = fixed([Preparation(percentiles=(5.0, 95.0))(each) for each in images], output_type="np")
    output = own(images, tile_size=16, output_type="np")
    for index in range(2):
        assert np.array_equal(output.masks[index], expected.masks[index])
    assert not np.array_equal(output.masks[0], fixed(images[0], output_type="np").masks[0])
    monkeypatch.setattr("unet_diffusion.pipelines.large_files.FILE_BLOCK", 16)
    np.save(tmp_path / "image.npy", images[0])
    own.segment_file(tmp_path / "image.npy", tmp_path / "mask.npy", tile_size=16)
    assert np.array_equal(np.load(tmp_path / "mask.npy"), expected.masks[0])


def test_images_of_a_data_set_are_not_stretched_again():
    unet, pixels = network(), (image(30, 20) // 4).astype(np.uint8)
    own = pipeline(unet, pixel_range=PixelRange.stretched("uint8", (0.0, 100.0)).to_dict(), class_names=["a", "b", "c"])
    fixed = pipeline(unet)
    assert fixed.for_prepared_images() is fixed
    prepared = own.for_prepared_images()
    assert (prepared.pixel_range, prepared.class_names) == (PixelRange.full("uint8"), ["a", "b", "c"])
    assert np.array_equal(prepared(pixels, output_type="np").masks[0], fixed(pixels, output_type="np").masks[0])
    stored = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(own.predictor()(stored), fixed(stored, output_type="pt").masks[0])


def test_a_predictor_shows_no_progress_and_leaves_the_bar_of_its_pipeline(capsys):
    pipe = SegmentationPipeline(network())
    pipe.set_progress_bar_config(desc="windows")
    pixels = torch.from_numpy(image(60, 60)).permute(2, 0, 1)
    predict = pipe.predictor()
    predict(pixels)
    assert not capsys.readouterr().err
    pipe(pixels, tile_size=16)
    assert "windows" in capsys.readouterr().err


def test_objects_are_measured_in_the_values_of_the_file():
    pipe = pipeline(pixel_range=PixelRange.stretched("uint8", (0.0, 100.0)).to_dict())
    pixels = (image(30, 20) // 8 + 5).astype(np.uint8)
    output = pipe(pixels, output_type="np", instances=True)
    first = output.instances[0] == 1
    assert output.objects["mean_0"][0] == pytest.approx(pixels[first, 0].mean())


# --- output ---


def test_pil_masks_hold_the_indices_and_the_palette():
    palette = [[0, 0, 0], [10, 20, 30], [200, 100, 50]]
    mask = pipeline(palette=palette)(image(30, 30)).masks[0]
    indices = np.asarray(mask)
    assert mask.mode == "P"
    assert np.array_equal(np.asarray(mask.convert("RGB")), np.array(palette, dtype=np.uint8)[indices])
    assert len(np.unique(indices)) > 1


def test_output_types():
    pipe = pipeline()
    assert pipe(image(8, 9), output_type="np").masks[0].dtype == np.uint8
    assert pipe(image(8, 9), output_type="pt").masks[0].dtype == torch.int64
    masks, probabilities, uncertainty = pipe(image(8, 9), return_dict=False)
    assert (masks[0].size, probabilities[0].shape, uncertainty[0].shape) == ((9, 8), (3, 8, 9), (8, 9))
    lean = pipe(image(8, 9), return_probabilities=False)
    assert (lean.masks, lean.probabilities, lean.uncertainty) == (masks, None, None)


def test_overlay_shows_classes_over_the_image():
    pipe = pipeline()
    shown = np.asarray(pipe.overlay(np.full((1, 2), 100, dtype=np.uint8), np.array([[0, 1]]), opacity=0.25))
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [round(75 + 0.25 * channel) for channel in colour(1)]
    with pytest.raises(ValueError, match="4x4"):
        pipe.overlay(image(4, 4), np.zeros((4, 5)))


# --- tiles, augmentation, noise ---


@pytest.mark.parametrize("augment", [False, True])
def test_tiles_give_what_the_whole_gives(augment):
    pipe = pipeline(network(norm="none", attention=(False, False)), scheduler=DDPMScheduler())
    arguments = {"augment": augment, "timesteps": [3, 200], "num_draws": 2, "output_type": "np"}
    pixels = image(61, 87)
    whole = pipe(pixels, generator=torch.manual_seed(5), **arguments)
    tiles = pipe(pixels, tile_size=16, generator=torch.manual_seed(5), **arguments)
    np.testing.assert_allclose(tiles.probabilities[0], whole.probabilities[0], atol=1e-5)


def test_unpadded_networks_segment_images_of_any_size():
    unet = network(out_channels=None, padding="valid", norm="none", attention=(False, False), time_embedding=None)
    pipe = pipeline(unet)
    for size in [(1, 1), (5, 40), (50, 33)]:
        whole = pipe(image(*size), output_type="np")
        tiles = pipe(image(*size), tile_size=8, output_type="np")
        assert whole.masks[0].shape == size
        np.testing.assert_allclose(tiles.probabilities[0], whole.probabilities[0], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_channels_last(channels):
    """Grey images too: PyTorch takes one channel for either layout, and then the maps would not be channels last."""
    pipe = pipeline(network(in_channels=channels, out_channels=channels))
    formats = []
    pipe.unet.stem.register_forward_hook(lambda module, images, maps: formats.append(maps.stride()[1]))
    pipe(image(12, 10, channels))
    assert formats == [1]


def test_channels_last_changes_no_value():
    images = torch.randn(2, 1, 3, 5)
    for each in (images, images.expand(2, 3, 3, 5), images[..., ::2], images.double()):
        lying = channels_last(each)
        assert torch.equal(lying, each) and lying.dtype == each.dtype
        assert lying.stride() == (each[0].numel(), 1, each.shape[3] * each.shape[1], each.shape[1])


def test_augmentation_is_the_mean_over_the_eight_symmetries():
    pipe = pipeline()
    pixels = image(10, 7)
    means = []
    for quarters in range(4):
        for mirror in (False, True):
            seen = np.rot90(pixels, quarters)
            seen = np.ascontiguousarray(seen[:, ::-1] if mirror else seen)
            chances = expected_probabilities(pipe.unet, seen).numpy()
            means.append(np.rot90(chances[..., ::-1] if mirror else chances, -quarters, axes=(1, 2)))
    output = pipe(pixels, augment=True, output_type="np")
    np.testing.assert_allclose(output.probabilities[0], np.mean(means, axis=0), atol=1e-5)


def test_augmented_masks_turn_with_the_image():
    pipe = pipeline()
    pixels = image(12, 12)
    upright = pipe(pixels, augment=True, output_type="np").probabilities[0]
    turned = pipe(np.ascontiguousarray(np.rot90(pixels)), augment=True, output_type="np").probabilities[0]
    np.testing.assert_allclose(turned, np.rot90(upright, axes=(1, 2)), atol=1e-5)


def test_timestep_0_without_noise_is_the_clean_image():
    """A schedule whose first beta is 0 adds no noise at t = 0, the network's own segmentation timestep."""
    pipe = pipeline(scheduler=DDPMScheduler(trained_betas=np.linspace(0, 0.02, 1000)))
    clean = pipe(image(8, 8), output_type="np").probabilities[0]
    noisy = pipe(image(8, 8), timesteps=[0], output_type="np").probabilities[0]
    np.testing.assert_allclose(noisy, clean, atol=1e-6)


def test_draws_and_timesteps_are_averaged_and_follow_the_generator():
    pipe = pipeline(scheduler=DDIMScheduler())
    pixels = image(16, 16)

    def chances(seed: int, **arguments) -> np.ndarray:
        return pipe(pixels, generator=torch.manual_seed(seed), output_type="np", **arguments).probabilities[0]

    one = chances(1, timesteps=[500])
    assert np.array_equal(one, chances(1, timesteps=[500]))
    assert not np.allclose(one, chances(2, timesteps=[500]), atol=1e-3)
    both = chances(1, timesteps=[500, 500])
    assert np.array_equal(both, chances(1, timesteps=[500], num_draws=2))
    spread = [np.std([chances(s, timesteps=[500], num_draws=n) for s in range(8)], axis=0).mean() for n in (1, 16)]
    assert spread[1] / spread[0] == pytest.approx(1 / 4, rel=0.5)  # the mean of 16 draws has a quarter of the spread


def test_the_network_is_left_as_it_was():
    unet = network()
    pipe = pipeline(unet, scheduler=DDPMScheduler())
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    pipe(image(9, 9), augment=True, timesteps=[1], tile_size=8)
    assert unet.active_head == "noise"
    assert not unet.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in unet.parameters())
    assert unet(torch.zeros(1, 1, 8, 8), 1).sample is not None


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image": np.zeros((4, 4, 3), dtype=np.uint8)},
            r"3 channels, but the network takes 1; convert it to 1 channel \(grey\)",
        ),
        ({"image": np.zeros((4, 4), dtype=np.float32)}, "float32, but the network was trained on uint8"),
        ({"image": torch.zeros(4, 4, dtype=torch.uint8)}, r"\(C, H, W\) or \(B, C, H, W\)"),
        ({"image": torch.full((1, 4, 4), torch.nan)}, "NaN"),
        ({"image": "nowhere.png"}, "nowhere.png cannot be read"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"output_type": "jpg"}, "output_type is 'jpg'"),
        ({"num_draws": 0}, "num_draws is 0"),
        ({"num_draws": 2}, "num_draws is 2.*pass timesteps"),
        ({"timesteps": [1]}, "no scheduler"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"image": np.zeros((4, 4), dtype=np.uint8), **arguments})


def test_wrong_timesteps_are_refused():
    with pytest.raises(ValueError, match="from 0 to 999"):
        pipeline(scheduler=DDPMScheduler())(image(4, 4), timesteps=[1000])
    with pytest.raises(ValueError, match="timesteps are 5, but must be a list of one or more integers from 0 to 999"):
        pipeline(scheduler=DDPMScheduler())(image(4, 4), timesteps=5)
    timeless = network(time_embedding=None, out_channels=None)
    with pytest.raises(ValueError, match="time_embedding is None"):
        pipeline(timeless, scheduler=DDPMScheduler())(image(4, 4), timesteps=[1])


@pytest.mark.parametrize("option", [{"norm": "batch"}, {"dropout": 0.5}])
def test_a_network_in_training_mode_is_refused_where_it_matters(option):
    pipe = pipeline(network(**option).train())
    with pytest.raises(ValueError, match=r"call pipe.unet.eval\(\)"):
        pipe(image(4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unet": UNet(**SMALL)}, r"to_segmentation\(K\)"),
        ({"class_names": ["a"]}, "class_names has 1 entries.*3 classes"),
        ({"palette": [[0, 0, 0]]}, "palette has 1 entries"),
        ({"palette": [[0, 0, 0], [0, 0], [0, 0, 0]]}, "red, green and blue"),
        ({"palette": [1, 2, 3]}, r"palette is \[1, 2, 3\], but each entry must be red, green and blue, integers"),
        ({"palette": [[0.5, 0, 0], [1.0, 1.0, 1.0], [2, 2, 2]]}, "each entry must be red, green and blue, integers"),
        ({"palette": 5}, "palette is 5, but"),
        ({"class_names": "abc"}, "class_names is 'abc', but must be a list of names"),
        ({"pixel_range": {"low": [1], "high": [0], "dtype": "uint8"}}, "range is \\(1.0, 0.0\\), but both ends"),
    ],
)
def test_wrong_components_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


# --- saving and loading ---


@pytest.mark.slow
def test_a_fresh_process_loads_it_without_a_warning_and_computes_the_same(tmp_path):
    pipe = saved(tmp_path / "run")
    np.save(tmp_path / "image.npy", image(20, 15))
    program = f"""
import numpy as np, unet_diffusion
from unet_diffusion.pipelines import SegmentationPipeline
pipe = SegmentationPipeline.from_pretrained({str(tmp_path / "run")!r})
np.save({str(tmp_path / "out.npy")!r}, pipe({str(tmp_path / "image.npy")!r}, output_type="np").probabilities[0])
print(pipe.class_names, pipe.palette, pipe.pixel_range.high)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    warnings = [line for line in done.stderr.splitlines() if line.strip() and "it/s" not in line]
    assert warnings == []
    assert done.stdout.strip() == "['ground', 'cell', 'border'] [[0, 0, 0], [1, 2, 3], [4, 5, 6]] (200.0,)"
    expected = pipe(image(20, 15), output_type="np").probabilities[0]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_the_scheduler_is_optional(tmp_path):
    pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [None, None]
    assert index["unet"] == ["unet_diffusion.unet", "UNet"]
    assert SegmentationPipeline.from_pretrained(tmp_path).scheduler is None


def test_stock_and_generating_pipelines_load_what_it_saved(tmp_path, caplog):
    saved(tmp_path)
    logging.getLogger("diffusers").propagate = True
    try:
        assert DDPMPipeline.from_pretrained(tmp_path).unet.config.num_classes == 3
        assert ImageGenerationPipeline.from_pretrained(tmp_path).pixel_range.high == (200.0,)
    finally:
        logging.getLogger("diffusers").propagate = False
    assert not [record.getMessage() for record in caplog.records if "_palette" in record.getMessage()]


def test_it_works_as_a_custom_pipeline(tmp_path):
    pipe = saved(tmp_path)
    custom = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(REPOSITORY / "pipelines" / "segmentation.py"), trust_remote_code=True
    )
    expected = pipe(image(9, 9), output_type="np").masks[0]
    assert np.array_equal(custom(image(9, 9), output_type="np").masks[0], expected)
    assert custom.class_names == ["ground", "cell", "border"]


def test_from_pipe_keeps_range_names_and_palette(tmp_path):
    again = SegmentationPipeline.from_pipe(saved(tmp_path))
    assert again.class_names == ["ground", "cell", "border"]
    assert again.palette[2] == [4, 5, 6]
    assert again.pixel_range.high == (200.0,)


# --- objects ---


def test_objects_are_those_of_the_probabilities_and_the_rest_is_as_without_them():
    pipe = pipeline(network(norm="none", attention=(False, False)), class_names=["ground", "cell", "border"])
    images = [image(40, 50), image(33, 21, seed=1)]
    plain = pipe(images, output_type="np")
    assert plain.instances is None and plain.objects is None and len(plain.to_tuple()) == 3
    output = pipe(images, output_type="np", instances=True, min_area=3, tile_size=16)
    for index, pixels in enumerate(images):
        np.testing.assert_allclose(output.probabilities[index], plain.probabilities[index], rtol=0, atol=1e-5)
        expected = find_objects(output.probabilities[index], min_area=3)
        assert output.instances[index].dtype == np.int32
        assert np.array_equal(output.instances[index], expected) and expected.max() > 1
        table = output.objects[output.objects["image"] == index]
        assert table["object"].tolist() == list(range(1, expected.max() + 1))
        assert table["area"].tolist() == np.bincount(expected.ravel())[1:].tolist()
        assert table["mean_0"].iloc[0] == pytest.approx(pixels[expected == 1].mean())
        assert set(table["class_name"]) <= {"cell", "border"}
    masks, none, nothing, instances, objects = pipe(
        images, instances=True, min_area=3, tile_size=16, return_probabilities=False, return_dict=False
    )
    assert (none, nothing, len(masks)) == (None, None, 2)
    assert all(map(np.array_equal, instances, output.instances)) and objects.equals(output.objects)


def test_objects_use_the_maps_that_a_network_has_learnt():
    pipe = pipeline(network(norm="none", attention=(False, False)))
    pixels = image(40, 50)
    plain = pipe(pixels, output_type="np").probabilities[0]
    boundary = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    distance = 1 - boundary

    class WithMaps:
        """A segmenter whose network has learnt objects."""

        has_objects = True

        def __init__(self, segmenter):
            self.tiling, self.seeds, self.regions = segmenter.tiling, segmenter.seeds, segmenter.regions

        def regions_with_objects(self, *arguments):
            for rows, columns, part in self.regions(*arguments):
                maps = (torch.from_numpy(each)[None, rows, columns] for each in (boundary, distance))
                yield rows, columns, part, *maps

    make = pipe._segmenter
    pipe._segmenter = lambda *arguments: WithMaps(make(*arguments))
    found = pipe(pixels, instances=True).instances[0]
    assert np.array_equal(found, find_objects(plain, boundary, distance))
    assert not np.array_equal(found, find_objects(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_area": 3}, "min_area is 3, but objects are not asked for; set instances=True"),
        ({"max_hole": 3}, "max_hole is 3, but objects are not asked for"),
        ({"pixel_size": (0.5, 0.5)}, "pixel_size is .* but objects are not asked for; set instances=True"),
        ({"instances": True, "pixel_size": 0.5}, "pixel_size is 0.5, but must be height and width of a pixel"),
        ({"instances": True, "pixel_size": (0.5, 0)}, "pixel_size is .*, but must be height and width of a pixel"),
        ({"instances": True, "min_area": -1}, "min_area is -1, but must be a whole number of pixels"),
    ],
)
def test_wrong_options_of_objects_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(image(9, 9), **arguments)


@pytest.mark.parametrize("learnt", [None, 9])
def test_small_objects_are_left_out_as_the_training_saw_none_unless_they_are_asked_for(tmp_path, learnt):
    pytest.importorskip("tifffile")
    pipe = pipeline(network(norm="none", attention=(False, False), object_min_area=learnt))
    pixels = image(40, 50)
    found = {least: pipe(pixels, instances=True, min_area=least).instances[0] for least in (None, 0, 9)}
    assert not np.array_equal(found[0], found[9])
    assert np.array_equal(found[None], found[learnt or 0])
    np.save(tmp_path / "image.npy", pixels)
    pipe.segment_file(tmp_path / "image.npy", tmp_path / "mask.npy", instances=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask-objects.tif")), found[None])


@pytest.mark.parametrize("learnt", [False, True])
def test_objects_of_files_are_those_of_the_whole_image(tmp_path, monkeypatch, learnt):
    tifffile = pytest.importorskip("tifffile")
    unet = network(norm="none", attention=(False, False), instances=learnt, object_diameter=9.0 if learnt else None)
    pipe = pipeline(unet, class_names=["ground", "cell", "border"])
    pixels = image(90, 70)
    options = {"tile_size": 16, "min_area": 2, "max_hole": 3, "instances": True}
    expected = pipe(pixels, output_type="np", return_probabilities=False, **options)
    assert expected.instances[0].max() > 50
    np.save(tmp_path / "image.npy", pixels)
    for side in (1024, 16):
        monkeypatch.setattr("unet_diffusion.pipelines.large_files.FILE_BLOCK", side)
        pipe.segment_file(tmp_path / "image.npy", tmp_path / f"{side}.npy", **options)
        assert np.array_equal(np.load(tmp_path / f"{side}.npy"), expected.masks[0])
        with tifffile.TiffFile(tmp_path / f"{side}-objects.tif") as labels:
            assert labels.pages[0].is_tiled and labels.pages[0].dtype == np.uint16
            assert np.array_equal(labels.asarray(), expected.instances[0])
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{side}-objects.tif")), expected.instances[0])
        table = pandas.read_csv(tmp_path / f"{side}-objects.csv")
        wanted = expected.objects.drop(columns="image")
        pandas.testing.assert_frame_equal(table, wanted.astype(table.dtypes), rtol=1e-6, atol=1e-5)
    made = {
        "image.npy",
        *(f"{side}{ending}" for side in (1024, 16) for ending in (".npy", "-objects.tif", "-objects.csv")),
    }
    assert {path.name for path in tmp_path.iterdir()} == made


def test_the_table_of_a_file_is_in_micrometres_if_the_file_says_its_pixel_size(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pipe, pixels = pipeline(), image(30, 20)
    tifffile.imwrite(tmp_path / "image.tif", pixels[..., 0], resolution=(4, 2), resolutionunit="MICROMETER")
    pipe.segment_file(tmp_path / "image.tif", tmp_path / "mask.tif", instances=True)
    expected = pipe(pixels, instances=True, pixel_size=(0.5, 0.25)).objects.drop(columns="image")
    table = pandas.read_csv(tmp_path / "mask-objects.csv")
    pandas.testing.assert_frame_equal(table, expected.astype(table.dtypes), rtol=1e-6, atol=1e-5)
    assert table["area_um2"].tolist() == pytest.approx((table["area"] / 8).tolist())


def test_objects_of_files_replace_nothing_and_leave_nothing_half_written(tmp_path, monkeypatch):
    pytest.importorskip("tifffile")
    pipe, pixels = pipeline(), image(20, 20)
    (tmp_path / "mask-objects.csv").write_text("mine")
    with pytest.raises(ValueError, match="mask-objects.csv exists already"):
        pipe.segment_file(pixels, tmp_path / "mask.npy", instances=True)
    with pytest.raises(ValueError, match="target is an array, but objects are written beside the mask"):
        pipe.segment_file(pixels, np.zeros((20, 20), dtype=np.uint8), instances=True)
    with pytest.raises(ValueError, match="max_hole is 3, but objects are not asked for"):
        pipe.segment_file(pixels, tmp_path / "mask.npy", max_hole=3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unet_diffusion.pipelines.large_files.create_mask", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.segment_file(pixels, tmp_path / "other.npy", instances=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mask-objects.csv"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_mask_that_is_complete_stays_if_its_objects_fail(tmp_path, monkeypatch, error):
    pytest.importorskip("tifffile")
    pipe, pixels = pipeline(), image(20, 20)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("unet_diffusion.pipelines.large_files.write_labels", fail)
        with pytest.raises(type(error)) as raised:
            pipe.segment_file(pixels, tmp_path / "mask.npy", instances=True)
    assert "The mask is complete, " in raised.value.__notes__[0] and "mask.npy" in raised.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mask.npy"]
    assert np.array_equal(np.load(tmp_path / "mask.npy"), pipe(pixels, output_type="np").masks[0])
    (tmp_path / "mask.npy").unlink()  # as the note says
    pipe.segment_file(pixels, tmp_path / "mask.npy", instances=True)
    assert (tmp_path / "mask-objects.csv").exists()


@pytest.mark.slow
def test_what_a_killed_call_left_is_removed_by_the_next_one_for_the_same_mask(tmp_path):
    pytest.importorskip("tifffile")
    np.save(tmp_path / "image.npy", image(20, 20))
    pipeline().save_pretrained(tmp_path / "run")
    killed = (
        "import os, sys\n"
        "from unet_diffusion.pipelines import SegmentationPipeline, large_files\n"
        "large_files.write_labels = lambda *_: os._exit(9)\n"
        "pipe = SegmentationPipeline.from_pretrained('run')\n"
        "pipe.segment_file('image.npy', 'out/mask.npy', instances=True)\n"
    )
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    (tmp_path / "out" / "mask.npy").unlink()
    assert [path.is_dir() for path in (tmp_path / "out").iterdir()] == [True]  # the maps
    others = {f".writing-{os.getppid()}-mask-objects", ".writing-99999999-other.npy"}  # a living process; another mask
    for name in others:
        (tmp_path / "out" / name).touch()
    pipeline().segment_file(tmp_path / "image.npy", tmp_path / "out" / "mask.npy", instances=True)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"mask.npy", "mask-objects.tif", "mask-objects.csv", *others}


def test_an_existing_mask_is_named_before_the_image_is_read(tmp_path):
    class Unread:
        shape, dtype = (20, 20), np.dtype(np.uint8)

        def __getitem__(self, window):
            raise AssertionError("read")

    own = pipeline(pixel_range=PixelRange.stretched("uint8", (5.0, 95.0)).to_dict())
    (tmp_path / "mask.npy").write_text("mine")
    with pytest.raises(ValueError, match="mask.npy exists already"):
        own.segment_file(Unread(), tmp_path / "mask.npy")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_objects_of_floats_of_any_width_are_those_of_float32(dtype):
    """The values are multiples of 1/128, which all floats hold."""
    pipe = pipeline(pixel_range=PixelRange((0.0,), (1.0,), "float32").to_dict())
    pixels = torch.from_numpy(image(20, 30)[..., 0] // 2)[None] / 128
    expected, found = (pipe(each, instances=True).objects for each in (pixels, pixels.to(dtype)))
    assert len(expected) > 1
    pandas.testing.assert_frame_equal(found, expected)


def test_a_label_image_of_many_objects_has_32_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    labels = np.arange(600 * 530, dtype=np.int32).reshape(600, 530)
    write_labels(tmp_path / "labels.tif", labels, int(labels.max()))
    found = tifffile.imread(tmp_path / "labels.tif")
    assert found.dtype == np.uint32 and np.array_equal(found, labels)
