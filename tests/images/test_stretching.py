"""Stretching an image by percentiles: in memory, in parts, and as a pixel range."""

import numpy as np
import pytest
import torch

from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation
from unet_diffusion.images.stretching import Stretch

ENDS = {"uint8": 255, "uint16": 65535, "float32": 1}


def pixels(dtype: str, low: float = 20, spread: float = 10) -> np.ndarray:
    values = np.random.default_rng(0).normal(low, spread, (37, 23, 2))
    return values.clip(0, 255).astype(dtype) if dtype != "float32" else values.astype(dtype)


@pytest.mark.parametrize("dtype", ENDS)
def test_the_percentiles_become_the_ends_and_the_order_of_values_stays(dtype):
    image = pixels(dtype)
    stretched = Stretch.of(image, (10, 90))(image)
    assert stretched.dtype == image.dtype and stretched.shape == image.shape
    for channel in range(2):
        values, ranked = stretched[..., channel].ravel(), np.sort(image[..., channel].ravel())
        low, high = ranked[int(np.ceil(0.1 * len(ranked))) - 1], ranked[int(np.ceil(0.9 * len(ranked))) - 1]
        shares = ((image[..., channel].astype(np.float64) - low) / (high - low)).clip(0, 1).ravel()
        assert values == pytest.approx(shares * ENDS[dtype], abs=0.51 if dtype != "float32" else 1e-6)
        assert 0.1 <= (values == 0).mean() <= 0.2 and 0.1 <= (values == ENDS[dtype]).mean() <= 0.2
        ordered = values[np.argsort(image[..., channel].ravel(), kind="stable")]
        assert (np.diff(ordered.astype(np.float64)) >= 0).all()


@pytest.mark.parametrize("dtype", ENDS)
def test_stretching_twice_is_stretching_once(dtype):
    once = Preparation(percentiles=(1, 99.8))(pixels(dtype))
    assert np.array_equal(Preparation(percentiles=(1, 99.8))(once), once)


def test_brighter_exposures_of_one_scene_become_one_image():
    scene = pixels("float32")
    prepare = Preparation(percentiles=(0, 100))
    np.testing.assert_allclose(prepare(scene * 7 + 300), prepare(scene), atol=1e-5)
    dark = (pixels("uint8") // 8).astype(np.uint8)
    assert np.array_equal(prepare(dark * 6 + 3), prepare(dark))


def test_a_uniform_channel_becomes_zero():
    image = np.full((5, 4, 2), 7, dtype=np.uint8)
    image[2, 2, 1] = 9
    stretched = Stretch.of(image, (0, 100))(image)
    assert not stretched[..., 0].any()
    assert stretched[..., 1].tolist() == [[255 if (y, x) == (2, 2) else 0 for x in range(4)] for y in range(5)]


@pytest.mark.parametrize("dtype", ENDS)
@pytest.mark.parametrize("ground", [0, 7, 250])
def test_specks_on_an_even_ground_stay_visible(dtype, ground):
    """They cover less than the share that the percentiles leave out."""
    image = np.full((96, 96, 1), ground, dtype=dtype)
    image[40:44, 40:43] = 200
    image[40, 40] = 225
    stretch = Stretch.of(image, (1, 99.8))
    stretched = stretch(image)
    low, high = min(ground, 200), max(ground, 225)
    expected = (image.astype(np.float64) - low) / (high - low) * ENDS[dtype]
    assert stretched == pytest.approx(expected, abs=0.51 if dtype != "float32" else 1e-6)
    assert np.array_equal(Stretch.of(stretched, (1, 99.8))(stretched), stretched)
    parts = Stretch.of_parts(lambda: np.split(image, 3), (1, 99.8))
    assert np.array_equal(parts.low, stretch.low) and np.array_equal(parts.high, stretch.high)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parts_that_hold_no_number_are_refused(value):
    image = pixels("float32")
    image[20, 3, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        Stretch.of_parts(lambda: np.split(image, [10, 30]), (1, 99.8))


def test_the_whole_image_counts_also_where_it_is_cut():
    """A pipeline gets whole images, and cannot know what a training cut away."""
    image = np.full((32, 96, 1), 10, dtype=np.uint8)
    image[:, 40:50] = 60
    image[:, 90:] = 210
    cut = Preparation(image_size=32, percentiles=(0, 100))(image)
    assert np.array_equal(cut, Preparation(percentiles=(0, 100))(image)[:, 32:64])
    assert cut.max() == round((60 - 10) / (210 - 10) * 255)


@pytest.mark.parametrize("percentiles", [(0, 100), (1, 99.8), (33.3, 50), (0.01, 0.02)])
@pytest.mark.parametrize("dtype", ENDS)
def test_parts_give_the_percentiles_of_the_whole(dtype, percentiles):
    image = pixels(dtype, low=0)
    parts = Stretch.of_parts(lambda: (image[top : top + 10] for top in range(0, 37, 10)), percentiles)
    whole = Stretch.of(image, percentiles)
    assert parts.low.dtype == whole.low.dtype
    assert np.array_equal(parts.low, whole.low) and np.array_equal(parts.high, whole.high)


@pytest.mark.parametrize("dtype", ENDS)
def test_a_range_with_percentiles_is_saved_and_stretches_as_the_preparation_does(dtype):
    percentiles = (1.0, 99.8)
    image = pixels(dtype)
    pixel_range = PixelRange.from_dict(PixelRange.stretched(dtype, percentiles).to_dict())
    assert pixel_range == PixelRange.stretched(dtype, percentiles)
    stored = pixel_range.stretch(torch.from_numpy(image).permute(2, 0, 1))
    assert np.array_equal(stored.permute(1, 2, 0).numpy(), Preparation(percentiles=percentiles)(image))
    assert PixelRange(pixel_range.low, pixel_range.high, dtype, [1, 99.8]) == pixel_range
    shown = pixel_range.to_model(stored)
    assert (float(shown.min()), float(shown.max())) == (-1, 1)


def test_a_range_for_all_images_is_saved_as_before_and_stretches_nothing():
    pixel_range = PixelRange.full("uint8")
    assert pixel_range.to_dict() == {"low": [0.0], "high": [255.0], "dtype": "uint8"}
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert pixel_range.stretch(image) is image
    assert Preparation(image_size=4).to_dict().keys() == {"image_size", "crop", "channels", "axes"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"percentiles": [5, 1]}, "percentiles is"),
        ({"percentiles": [5]}, "percentiles is"),
        ({"percentiles": [1, 101]}, "percentiles is"),
        ({"percentiles": 5}, "percentiles is 5, but must be two numbers"),
        ({"percentiles": ["a", "b"]}, "percentiles is"),
        ({"percentiles": [1, 99], "high": [200]}, "must be that of the data type"),
        ({"share": [1, 99]}, "found .*share"),
        ({"low": 0}, "low is 0, but must be a list of numbers"),
        ({"high": ["a"]}, r"high is \['a'\], but must be a list of numbers"),
        ({"dtype": ["uint8"]}, r"dtype is \['uint8'\], but must be one of"),
    ],
)
def test_a_saved_range_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PixelRange.from_dict({"low": [0], "high": [255], "dtype": "uint8"} | fields)


def test_a_saved_range_is_a_dictionary():
    with pytest.raises(ValueError, match="has the keys low, high, dtype .* found 5"):
        PixelRange.from_dict(5)


def test_a_tensor_of_half_precision_is_stretched():
    image = torch.linspace(0, 1, 12).view(1, 3, 4).bfloat16()
    stretched = PixelRange.stretched("float32", (0, 100)).stretch(image)
    torch.testing.assert_close(stretched, image.float())


@pytest.mark.parametrize(
    ("pixel_range", "options"),
    [
        (PixelRange.full("uint16"), "neither value_range nor percentiles, for images of uint16"),
        (PixelRange((0.0,), (4095.0,), "uint16"), "value_range 0 4095"),
        (PixelRange.stretched("uint8", (1, 99.8)), "percentiles 1 99.8 with percentiles_of image"),
        (PixelRange((0.0, 1.0), (2.0, 3.0), "float32"), "its data, whose percentiles are"),
    ],
)
def test_a_range_names_the_options_that_give_it(pixel_range, options):
    assert pixel_range.options.startswith(options)
