"""Images of any size, channels and data type: reading, mapping to [-1, 1], and the pipelines."""

import io
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from unet_diffusion import UNet
from unet_diffusion.images.decoding import LARGEST, decode_image
from unet_diffusion.images.pixel_range import DTYPES, PixelRange
from unet_diffusion.pipelines import ImageGenerationPipeline, SegmentationPipeline
from unet_diffusion.randomness import keyed_generator

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
CHANNELS = st.integers(1, 13)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))
STORED = {  # the dtype in which each is kept, and its possible values
    "uint8": ("uint8", st.integers(0, 255)),
    "uint16": ("uint16", st.integers(0, 65535)),
    "int16": ("uint16", st.integers(0, 32767)),
    "int64": ("uint16", st.integers(0, 65535)),
    ">u2": ("uint16", st.integers(0, 65535)),
    "float16": ("float32", st.floats(-10, 10, width=16)),
    "float32": ("float32", st.floats(-1e6, 1e6, width=32)),
    "float64": ("float32", st.floats(-1e6, 1e6)),
    "bool": ("uint8", st.booleans()),
}


@st.composite
def images(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(STORED)) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, C) of any data type, and the values that are kept."""
    kind = draw(st.sampled_from(kinds))
    kept, values = STORED[kind]
    image = draw(hnp.arrays(kind, (*draw(SIZES), draw(CHANNELS)), elements=values))
    return image, image.astype(kept) * (255 if kind == "bool" else 1)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


@PROPERTY
@given(image=images())
def test_arrays_and_npy_files_keep_their_values(image):
    given, kept = image
    assert same(decode_image(given, axes="HWC"), kept)
    assert same(decode_image(np.moveaxis(given, 2, 0), axes="CHW"), kept)
    assert same(decode_image(given[:, :, 0]), kept[:, :, :1])
    file = io.BytesIO()
    np.save(file, given)
    assert same(decode_image(file.getvalue(), axes="HWC"), kept)


@PROPERTY
@given(
    image=images(("uint8", "uint16", "float32")),
    compression=st.sampled_from([None, "zlib"]),
    planar=st.sampled_from(["contig", "separate"]),
)
def test_tiff_files_keep_their_values(image, compression, planar):
    given, kept = image
    file = io.BytesIO()
    if planar == "separate" or given.shape[2] == 1:  # one channel has no axis in a file
        given = np.moveaxis(given, 2, 0)[0] if given.shape[2] == 1 else np.moveaxis(given, 2, 0)
        planar = None if given.ndim == 2 else planar
    tifffile.imwrite(file, given, photometric="minisblack", planarconfig=planar, compression=compression)
    assert same(decode_image(file.getvalue()), kept)


@PROPERTY
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"]), size=SIZES, seed=st.integers(0, 99)
)
def test_images_of_pillow_are_read_as_it_shows_them(mode, size, seed):
    """Palettes as their colours, black and white as 0 and 255, and the rest as it is."""
    random = np.random.default_rng(seed)
    channels = {"LA": (2,), "RGB": (3,), "RGBA": (4,)}.get(mode, ())
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8)
    values = random.integers(0, 256, (*size, *channels)).astype(dtype)
    image = Image.fromarray(values) if mode not in ("1", "P") else Image.fromarray(values).convert(mode)
    assert image.mode == mode
    kept = {"1": "L", "P": "RGB"}.get(mode, mode)
    shown = np.asarray(image.convert(kept) if kept != mode else image)
    expected = shown.reshape(*size, -1).astype({"I;16": np.uint16, "I": np.uint16}.get(mode, dtype))
    assert same(decode_image(image), expected)
    if mode not in ("F", "I"):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert same(decode_image(file.getvalue()), expected)


@PROPERTY
@given(data=st.data(), dtype=st.sampled_from(["uint8", "uint16"]), channels=st.integers(0, 5))
def test_every_integer_of_any_range_comes_back(data, dtype, channels):
    """Model values lie in [-1, 1]; values beyond the range come back as its ends, as far as the data type has them."""
    largest = LARGEST[dtype]
    count = max(channels, 1)
    lows = data.draw(st.lists(st.floats(-100, largest - 1), min_size=count, max_size=count))
    highs = [data.draw(st.floats(low + 1, largest + 100.0)) for low in lows]
    pixel_range = PixelRange(tuple(lows), tuple(highs), dtype)
    stored = torch.from_numpy(data.draw(hnp.arrays(dtype, (max(channels, 2), 2, 3))))[: channels or 2]
    images = pixel_range.to_model(stored)
    assert images.dtype == torch.float32 and images.abs().max() <= 1
    low, high = (torch.tensor(bound, dtype=torch.float64)[:, None, None] for bound in (lows, highs))
    expected = stored.double().clamp(low, high).round().clamp(0, largest)
    inside = (stored.double() >= low) & (stored.double() <= high)
    back = pixel_range.to_stored(images)
    assert back.dtype == DTYPES[dtype]
    assert torch.equal(back.double()[inside], stored.double()[inside])
    assert (back.double() - expected).abs().max() <= 1  # a bound halfway between two integers may go to either
    assert PixelRange.from_dict(pixel_range.to_dict()) == pixel_range


NETWORKS: dict[int, UNet] = {}


def network(channels: int) -> UNet:
    """One network for each number of channels, with both heads."""
    if channels not in NETWORKS:
        torch.manual_seed(channels)
        unet = UNet(8, in_channels=channels, out_channels=channels, channels=(4, 8), head_channels=8, num_classes=3)
        NETWORKS[channels] = unet.eval()
    return NETWORKS[channels]


@PROPERTY
@given(
    channels=CHANNELS,
    dtype=st.sampled_from([*DTYPES]),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    seed=st.integers(),
)
def test_masks_have_the_size_of_their_images_in_any_batch(channels, dtype, sizes, seed):
    pixel_range = PixelRange((0.0,), (float(LARGEST.get(dtype, 1)),), dtype)
    pipe = SegmentationPipeline(network(channels), pixel_range=pixel_range.to_dict())
    generator = keyed_generator(seed, "images")
    images = [pixel_range.to_stored(torch.rand(channels, *size, generator=generator) * 2 - 1) for size in sizes]
    together = pipe(images, output_type="np")
    for image, size, mask, chances, unsure in zip(
        images, sizes, together.masks, together.probabilities, together.uncertainty, strict=True
    ):
        assert mask.shape == unsure.shape == size and chances.shape == (3, *size)
        assert np.array_equal(mask, chances.argmax(axis=0))
        np.testing.assert_allclose(chances.sum(axis=0), 1, atol=1e-5)
        assert unsure.min() >= 0 and unsure.max() <= 1 + 1e-6
        alone: Any = pipe(image, output_type="np").probabilities[0]
        np.testing.assert_allclose(chances, alone, atol=1e-5)


@settings(PROPERTY, max_examples=30)
@given(
    channels=CHANNELS, dtype=st.sampled_from([*DTYPES]), size=SIZES, count=st.integers(1, 3), together=st.integers(1, 3)
)
def test_images_of_any_size_and_channels_are_generated_each_from_its_own_generator(
    channels, dtype, size, count, together
):
    pixel_range = PixelRange((0.0,), (float(LARGEST.get(dtype, 1)),), dtype)
    pipe = ImageGenerationPipeline(network(channels), DDPMScheduler(), pixel_range.to_dict())
    pipe.set_progress_bar_config(disable=True)

    def make(numbers: range, max_batch: int, output_type: str) -> Any:
        generators = [keyed_generator(number, "image") for number in numbers]
        options = {"height": size[0], "width": size[1], "num_inference_steps": 2, "max_batch": max_batch}
        return pipe(len(numbers), generator=generators, output_type=output_type, **options).images

    stored = make(range(count), together, "stored")
    assert stored.shape == (count, channels, *size) and stored.dtype == DTYPES[dtype]
    values = make(range(count), together, "np")
    assert values.shape == (count, *size, channels) and values.min() >= 0 and values.max() <= 1
    alone = make(range(count - 1, count), 1, "np")
    assert values[-1:] == pytest.approx(alone, abs=1e-4)
