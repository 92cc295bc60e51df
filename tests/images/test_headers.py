"""What files say about themselves: format, lossy compression, pages, bits per channel, and white that is zero."""

import io

import numpy as np
import pytest
from PIL import Image, features

from tests.support.image_files import tiff
from unet_diffusion.images.decoding import decode, decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.masks import decode_mask

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def animation(kind: str, **options) -> bytes:
    frames = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
    return encoded(kind, save_all=True, append_images=frames, **options)


@pytest.mark.parametrize(
    ("kind", "options", "lossy"),
    [
        ("PNG", {}, False),
        ("BMP", {}, False),
        ("GIF", {}, False),
        ("PPM", {}, False),
        ("TGA", {}, False),
        ("JPEG", {}, True),
        ("JPEG", {"quality": 100}, True),
        ("WEBP", {}, True),
        ("WEBP", {"lossless": True}, False),
        ("JPEG2000", {}, False),
        ("JPEG2000", {"irreversible": True}, True),
        ("JPEG2000", {"irreversible": True, "no_jp2": True}, True),
        ("TIFF", {}, False),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, False),
        ("TIFF", {"compression": "jpeg"}, True),
        pytest.param("AVIF", {}, True, marks=avif),
    ],
)
def test_formats_and_whether_they_are_lossy(kind, options, lossy):
    data = encoded(kind, **options)
    for found in (decode(data), decode_mask(data, reading="colours")):
        assert (found.format, found.lossy, found.pages, found.unread_pages) == (kind, lossy, 1, 0)
    with Image.open(io.BytesIO(data)) as image:
        assert decode(image).format == kind


def test_lossy_webp_inside_of_a_container_is_found():
    transparent = Image.fromarray(np.dstack([PIXELS, PIXELS[:, :, 0]]))
    assert decode(encoded("WEBP", transparent)).lossy  # with a chunk for alpha
    assert not decode(encoded("WEBP", transparent, lossless=True)).lossy
    assert decode(animation("WEBP")).lossy
    assert not decode(animation("WEBP", lossless=True)).lossy


def test_arrays_have_no_format_and_npy_files_do():
    file = io.BytesIO()
    np.save(file, PIXELS)
    assert (decode(PIXELS).format, decode(file.getvalue()).format) == ("", "NPY")
    assert not decode(file.getvalue()).lossy


@pytest.mark.parametrize("compression", ["jpeg", "jpegxl"])
def test_lossy_tiff_of_several_pages(compression):
    pages = np.stack([PIXELS[:, :, 0]] * 2)
    assert decode(tiff(pages, photometric="minisblack", compression=compression, tile=(16, 16))).lossy
    assert not decode(tiff(pages, photometric="minisblack", compression="zlib")).lossy


# pages


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", pytest.param("AVIF", marks=avif)])
def test_an_animation_gives_its_first_frame_and_says_how_many_there_are(kind):
    found = decode(animation(kind))
    assert (found.pages, found.unread_pages) == (3, 2)
    assert found.pixels.shape[:2] == (16, 20)
    assert abs(found.pixels[..., :3].astype(int) - PIXELS).mean() < 60  # the first frame, not a red one


def test_the_second_image_of_a_phone_is_not_counted():
    found = decode(encoded("MPO", save_all=True, append_images=[Image.new("RGB", (20, 16))]))
    assert (found.format, found.lossy, found.pages) == ("JPEG", True, 1)


def test_pages_of_a_tiff_are_counted():
    grey = PIXELS[:, :, 0]
    found = decode(tiff(np.stack([grey] * 5), photometric="minisblack"))
    assert (found.pixels.shape, found.pages, found.unread_pages) == ((16, 20, 5), 5, 0)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(PIXELS, photometric="rgb")
        writer.write(PIXELS[::4, ::4], photometric="rgb")
    found = decode(file.getvalue())
    assert np.array_equal(found.pixels, PIXELS)
    assert (found.pages, found.unread_pages) == (2, 1)


def test_a_palette_beside_a_preview_is_read_in_its_colours():
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colours = np.arange(3 * 256, dtype=np.uint16).reshape(3, 256) * 256
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(indices, photometric="palette", colormap=colours)
        writer.write(indices[::2, ::2])
    assert decode_image(file.getvalue()).shape == (3, 4, 3)
    assert np.array_equal(decode_mask(file.getvalue()).keys, indices)


# bits


@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 2), (9, 8, 3), (9, 8, 4)])
@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("container", ["jp2", "j2k"])
def test_jpeg_2000_keeps_more_than_8_bits(shape, bits, container):
    values = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(np.uint16)
    data = imagecodecs.jpeg2k_encode(values, bitspersample=bits, reversible=True, codecformat=container)
    found = decode(data)
    assert np.array_equal(found.pixels.squeeze(), values)
    assert (found.format, found.lossy) == ("JPEG2000", False)
    if len(shape) == 3:
        with pytest.raises(ValueError, match=f"would not keep the {bits} bits"), Image.open(io.BytesIO(data)) as image:
            decode_image(image)


@avif
@pytest.mark.parametrize("shape", [(9, 8), (9, 8, 3), (9, 8, 4)])
@pytest.mark.parametrize("bits", [10, 12])
def test_avif_keeps_10_and_12_bits(shape, bits):
    values = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(np.uint16)
    data = imagecodecs.avif_encode(values, level=100, bitspersample=bits)
    assert np.array_equal(decode_image(data).squeeze(), values)
    with pytest.raises(ValueError, match=f"would not keep the {bits} bits"), Image.open(io.BytesIO(data)) as image:
        decode_image(image)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_png_keeps_its_channels_and_is_turned_upright(channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 8, channels)).astype(np.uint16)
    assert np.array_equal(decode_image(imagecodecs.png_encode(values)), values)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_of_decoding_turns_images_upright_alike(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = decode_image(encoded("PNG", exif=exif))
    tag = (274, "H", 1, orientation, True)
    assert np.array_equal(decode_image(tiff(PIXELS, photometric="rgb", extratags=[tag])), expected)
    deep = PIXELS.astype(np.uint16) * 257
    found = decode(tiff(deep, photometric="rgb", extratags=[tag]))
    assert np.array_equal(found.pixels, expected * np.uint16(257))
    assert found.orientation == orientation


def test_16_bit_tiff_in_planes_keeps_its_depth():
    values = np.random.default_rng(0).integers(0, 65536, (3, 9, 8)).astype(np.uint16)
    for options in ({}, {"compression": "zlib"}, {"byteorder": ">"}):
        data = tiff(values, photometric="rgb", planarconfig="separate", **options)
        assert np.array_equal(decode_image(data), np.moveaxis(values, 0, 2))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16, np.float32])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_big_endian_tiff_keeps_its_values(dtype, compression):
    values = np.arange(130).reshape(10, 13).astype(dtype)
    data = tiff(values, byteorder=">", compression=compression)
    assert np.array_equal(decode_image(data)[:, :, 0], values)
    assert np.array_equal(decode_mask(data).keys, values)
    if compression is not None and dtype != np.uint16:
        with pytest.raises(ValueError, match="give the path"), Image.open(io.BytesIO(data)) as image:
            decode_image(image)


def test_signed_values_are_not_taken_for_large_ones():
    assert decode_image(tiff(np.array([[0, 127]], np.int8)))[:, :, 0].tolist() == [[0, 127]]
    for dtype in (np.int8, np.int16, np.int32):
        with pytest.raises(ValueError, match="holds -2 to 3"):
            decode_image(tiff(np.array([[-2, 3]], dtype)))


def test_16_bit_cmyk_and_lab_are_refused_rather_than_reduced():
    for photometric, channels in (("separated", 4), ("cielab", 3)):
        with pytest.raises(ValueError, match="CMYK or Lab .* convert it to RGB"):
            decode_image(tiff(np.zeros((5, 6, channels), np.uint16), photometric=photometric))


# white is zero


def ways_of_writing(values: np.ndarray) -> list[bytes]:
    """TIFF files in which white is zero: with one page by Pillow and with two by tifffile."""
    pages = [values, np.stack([values, values])]
    return [
        tiff(each, photometric="miniswhite", compression=compression, metadata=None)
        for each in pages
        for compression in (None, "zlib")
    ]


@pytest.mark.parametrize(("dtype", "most"), [(np.uint8, 255), (np.uint16, 65535)])
def test_where_white_is_zero_images_are_as_shown_and_masks_as_stored(dtype, most, tmp_path):
    values = np.random.default_rng(0).integers(0, 3, (12, 10)).astype(dtype)
    for data in ways_of_writing(values):
        found = decode(data)
        assert found.pixels.dtype == dtype and found.white_is_zero
        assert (found.pixels == (most - values)[:, :, None]).all()
        (tmp_path / "a.tif").write_bytes(data)
        assert np.array_equal(open_image(tmp_path / "a.tif").read(slice(2, 9), slice(0, 10)), found.pixels[2:9])
        assert (decode(data, reading="values").pixels == values[:, :, None]).all()
    for data in ways_of_writing(values)[:2]:
        for reading in ("values", "colours", "brightness"):
            mask = decode_mask(data, reading=reading)
            assert np.array_equal(mask.keys, values) and mask.white_is_zero
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(decode_mask(image).keys, values)
            assert np.array_equal(decode_image(image)[:, :, 0], most - values)


@pytest.mark.parametrize("compression", ["raw", "packbits", "tiff_lzw", "group3", "group4"])
def test_bits_of_a_mask_are_as_stored(compression):
    shown = np.random.default_rng(0).integers(0, 2, (12, 10)).astype(bool)
    data = encoded("TIFF", Image.fromarray(shown), compression=compression, tiffinfo={262: 0})
    assert np.array_equal(decode_image(data)[:, :, 0], shown * np.uint8(255))
    assert np.array_equal(decode_mask(data).keys, ~shown * 255)
    usual = encoded("TIFF", Image.fromarray(shown), compression=compression)
    assert np.array_equal(decode_mask(usual).keys, shown * 255)
    assert not decode_mask(usual).white_is_zero


def test_12_bits_are_turned_round_within_12_bits():
    values = np.random.default_rng(0).integers(0, 4096, (12, 10)).astype(np.uint16)
    for each in (values, np.stack([values, values])):
        data = tiff(each, photometric="miniswhite", bitspersample=12, metadata=None)
        assert (decode_image(data) == (4095 - values)[:, :, None]).all()


def test_alpha_is_not_turned_round():
    values = np.random.default_rng(0).integers(0, 256, (12, 10, 2), dtype=np.uint8)
    data = tiff(values, photometric="miniswhite", planarconfig="contig", extrasamples=["unassalpha"])
    assert np.array_equal(decode_image(data), np.dstack([255 - values[:, :, 0], values[:, :, 1]]))


def test_labels_of_32_bits_and_floats_are_not_turned_round():
    values = np.arange(12).reshape(3, 4)
    for dtype in (np.uint32, np.float32):
        data = tiff(values.astype(dtype), photometric="miniswhite")
        assert np.array_equal(decode_mask(data).keys, values)
        assert np.array_equal(decode_image(data)[:, :, 0], values)


@pytest.mark.parametrize(
    ("begins", "says"),
    [
        (b"\0\0\0\x18ftypheic", "a HEIC image, which is not read; convert it to PNG or JPEG"),
        (b"\xff\x0a", "a JPEG XL image"),
        (b"v/1\x01", "an OpenEXR or Radiance image"),
        (bytes(128) + b"DICM", "a DICOM image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript, which is a program and not read; convert it to PNG"),
        (b"PK\x03\x04", "an archive, such as .npz"),
        (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
        (b"<!doctype html>", "a web page"),
        (b"hello", "it is not an image of a format that is read; it begins with b'hello"),
    ],
)
def test_a_file_that_is_not_read_is_called_what_it_is(begins, says):
    with pytest.raises(ValueError, match=f"cannot be decoded: .*{says}"):
        decode_image(begins + bytes(64))
