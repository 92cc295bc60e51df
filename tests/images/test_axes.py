"""The order of axes that have no names: what is plain, what is asked, and what an option or a network settles."""

import numpy as np
import pytest

from tests.support.image_files import npy, tiff
from unet_diffusion.images.decoding import decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.masks import decode_mask

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")


def counted(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)


@pytest.mark.parametrize("shape", [(64, 48, 1), (3, 5, 4), (2, 2, 4), (20, 20, 19), (64, 48, 32), (1, 9, 3)])
def test_a_short_last_axis_is_the_channels(shape):
    array = counted(*shape)
    assert np.array_equal(decode_image(array), array)
    assert np.array_equal(decode_image(npy(array)), array)


@pytest.mark.parametrize(
    "shape", [(3, 64, 48), (1, 64, 48), (12, 64, 48), (5, 20, 20), (64, 48, 33), (40, 64, 5), (64, 64, 64)]
)
def test_stated_axes_settle_every_shape(shape):
    array = counted(*shape)
    for source in (array, npy(array)):
        assert np.array_equal(decode_image(source, axes="HWC"), array)
        assert np.array_equal(decode_image(source, axes="CHW"), np.moveaxis(array, 0, 2))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            (3, 64, 48),
            r"its shape is \(3, 64, 48\), which may be 3 channels of 64 x 48 pixels, or 3 x 64 pixels with 48 "
            r"channels\. Which axis .* axes='CHW' if it is the first, or axes='HWC' if it is the last",
        ),
        ((12, 64, 48), r"\(12, 64, 48\).*, or 12 images\. .*store each image in a file of its own\.$"),
        ((1, 64, 48), "which may be 1 channel of 64 x 48 pixels"),
        ((64, 48, 33), "or 64 x 48 pixels with 33 channels"),
        ((5, 20, 20), "which may be 5 channels of 20 x 20 pixels"),
        ((100, 28, 28), r"or 100 x 28 pixels with 28 channels, or 100 images\. "),
        ((20, 20, 20), "which may be 20 channels of 20 x 20 pixels"),
    ],
)
def test_an_order_that_is_not_plain_is_asked(shape, says, tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(counted(*shape)))
    for source in (counted(*shape), npy(counted(*shape)), tmp_path / "a.npy"):
        with pytest.raises(ValueError, match=says):
            decode_image(source)
    with pytest.raises(ValueError, match=r"a\.npy is unclear: its shape"):
        decode_image(tmp_path / "a.npy")


@pytest.mark.parametrize("axes", [None, "HWC", "CHW"])
@pytest.mark.parametrize("shape", [(12, 64, 48, 3), (2, 3, 64, 48)])
def test_four_axes_are_not_one_image(shape, axes):
    for source in (counted(*shape), npy(counted(*shape))):
        with pytest.raises(ValueError, match=rf"shape \({', '.join(map(str, shape))}\).*a file or an array of its own"):
            decode_image(source, axes=axes)


@pytest.mark.parametrize("channels", [1, 3, 5, 40])
def test_a_known_number_of_channels_settles_the_order(channels, tmp_path):
    last = counted(48, 50, channels)
    first = np.moveaxis(last, 2, 0)
    for array in (last, first):
        np.save(tmp_path / "a.npy", array)
        assert np.array_equal(decode_image(array, channels=channels), last)
        assert np.array_equal(decode_image(tmp_path / "a.npy", channels=channels), last)
        opened = open_image(tmp_path / "a.npy", channels)
        assert opened.shape == last.shape
        assert np.array_equal(opened.read(slice(3, 9), slice(2, 50)), last[3:9, 2:])
    assert np.array_equal(decode_image(tiff(first, photometric="minisblack"), channels=channels), last)


def test_an_array_without_the_channels_of_the_network_names_them():
    with pytest.raises(ValueError, match=r"its shape is \(12, 64, 48\), but 3 channels must be its first or its last"):
        decode_image(counted(12, 64, 48), channels=3)


# TIFF


@pytest.mark.parametrize("metadata", [None, {}])
def test_few_pages_are_channels(metadata):
    pages = counted(5, 20, 10)
    assert np.array_equal(
        decode_image(tiff(pages, photometric="minisblack", metadata=metadata)), np.moveaxis(pages, 0, 2)
    )


@pytest.mark.parametrize("shape", [(64, 48, 5), (64, 48, 3), (33, 64, 48), (12, 10, 9)])
def test_pages_that_may_be_rows_or_images_are_asked_about(shape):
    """tifffile writes an array (64, 48, 5) as 64 pages of 48 x 5."""
    array = counted(*shape)
    data = tiff(array, photometric="minisblack")
    with pytest.raises(
        ValueError, match=rf"its shape is \({shape[0]}, {shape[1]}, {shape[2]}\), which may be .* channels"
    ):
        decode_image(data)
    assert np.array_equal(decode_image(data, axes="HWC"), array)
    assert np.array_equal(decode_image(data, axes="CHW"), np.moveaxis(array, 0, 2))


@pytest.mark.parametrize("axes", [None, "HWC", "CHW"])
def test_axes_that_a_tiff_names_are_followed_whatever_is_stated(axes):
    planes = counted(3, 20, 30)
    last = np.moveaxis(planes, 0, 2)
    named = [
        tiff(planes, imagej=True, metadata={"axes": "CYX"}),
        tiff(planes[None, :, None], ome=True, metadata={"axes": "TCZYX"}),
        tiff(planes, photometric="rgb", planarconfig="separate"),
        tiff(last, photometric="rgb"),
        tiff(np.repeat(planes, 14, axis=0), imagej=True, metadata={"axes": "CYX"}),  # 42 channels
    ]
    for data, expected in zip(named, [last] * 4 + [np.repeat(last, 14, axis=2)]):
        assert np.array_equal(decode_image(data, axes=axes), expected)
    for letters in ("ZYX", "TYX"):
        with pytest.raises(ValueError, match=rf"its axes {letters} have the sizes \(3, 20, 30\)"):
            decode_image(tiff(planes, imagej=True, metadata={"axes": letters}), axes=axes)


def test_a_series_of_stacks_is_refused_with_its_axes():
    with pytest.raises(ValueError, match=r"its axes QQYX have the sizes \(2, 3, 20, 30\)"):
        decode_image(tiff(counted(2, 3, 20, 30), photometric="minisblack"))


def test_colours_of_a_mask_are_read_from_rows_as_pages():
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[10:20, 5:30, 0] = 255
    data = tiff(colours, photometric="minisblack")
    assert len(np.unique(decode_mask(data, axes="HWC").keys)) == 2


def test_a_stack_in_one_page_is_not_read_as_its_first_plane():
    """ImageJ describes the planes of a large stack in its only page."""
    with pytest.raises(ValueError, match=r"its axes ZYX have the sizes \(5, 20, 30\)"):
        decode_image(tiff(counted(5, 20, 30), imagej=True, metadata={"axes": "ZYX"}, truncate=True))
    pages = counted(5, 20, 30)
    assert np.array_equal(decode_image(tiff(pages, truncate=True)), np.moveaxis(pages, 0, 2))


def test_a_large_tiff_of_rows_as_pages_is_read_by_the_channels_of_the_network(tmp_path):
    array = counted(64, 48, 5)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert np.array_equal(open_image(tmp_path / "a.tif", 5).read(slice(0, 64), slice(0, 48)), array)
    assert open_image(tmp_path / "a.tif", 64).shape == (48, 5, 64)


# masks


def test_a_mask_of_one_channel_needs_no_axes():
    mask = np.arange(64 * 48).reshape(64, 48) % 5
    for array in (mask, mask[None], mask[:, :, None]):
        for axes in (None, "CHW"):
            assert np.array_equal(decode_mask(npy(array), axes=axes).keys, mask)


@pytest.mark.parametrize("shape", [(1, 1, 64, 48), (1, 64, 48, 1), (1, 1, 64, 48, 1), (64, 48, 1, 1)])
def test_axes_of_length_1_beyond_three_are_dropped(shape):
    array = counted(*shape)
    for source in (array, npy(array)):
        assert np.array_equal(decode_mask(source).keys, array.reshape(64, 48))
        axes = None if shape[-1] == 1 else "CHW"
        assert np.array_equal(decode_image(source, axes=axes), array.reshape(64, 48, 1))
    with pytest.raises(ValueError, match=r"has shape \(2, 3, 64, 48\), but an image is .*store each image in a file"):
        decode_mask(npy(counted(2, 3, 64, 48)))
