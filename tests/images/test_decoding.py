"""Decoding keeps channels and precision; ranges map exactly; resizing changes neither dtype nor bounds."""

import importlib.util
import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.image_files import npy, tiff
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.memory import as_source
from unet_diffusion.data.sets import load_images
from unet_diffusion.images.conversion import stored_images
from unet_diffusion.images.decoding import decode, decode_image
from unet_diffusion.images.large_images import open_image
from unet_diffusion.images.masks import decode_mask
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.images.resizing import Preparation, convert_channels, resize

scientific = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("tifffile", "imagecodecs")),
    reason="needs tifffile and imagecodecs (extra scientific)",
)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colour_png_of_16_bits(pixels: np.ndarray) -> bytes:
    """PNG of colours of 16 bits."""
    height, width, _ = pixels.shape
    return png([line.astype(">u2").tobytes() for line in pixels], width, 16, 2)


def grey_png(pixels: np.ndarray, bits: int) -> bytes:
    """PNG of grey values of 2 or 4 bits."""
    places = (pixels[..., None] >> np.arange(bits)[::-1]) & 1
    lines = np.packbits(places.reshape(len(pixels), -1), axis=1)
    return png([line.tobytes() for line in lines], pixels.shape[1], bits, 0)


def png(lines: list[bytes], width: int, bits: int, colour_type: int) -> bytes:
    """PNG with filter 0 in every line (PNG specification, sections 5 and 11)."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, len(lines), bits, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# ranges


@pytest.mark.parametrize(("dtype", "count"), [("uint8", 256), ("uint16", 65536)])
def test_every_integer_of_the_full_range_comes_back(dtype, count):
    stored = torch.arange(count).to(getattr(torch, dtype)).reshape(1, 1, 16, -1)
    pixel_range = PixelRange.full(dtype)
    images = pixel_range.to_model(stored)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    back = pixel_range.to_stored(images)
    assert back.dtype == stored.dtype
    assert torch.equal(back.int(), stored.int())


def test_12_bit_values_in_16_bits_fill_minus_one_to_one():
    stored = torch.arange(4096).to(torch.uint16).reshape(1, 64, 64)
    pixel_range = PixelRange((0.0,), (4095.0,), "uint16")
    images = pixel_range.to_model(stored)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(pixel_range.to_stored(images).int(), stored.int())
    above = torch.full((1, 1, 1), 5000).to(torch.uint16)
    assert pixel_range.to_model(above).item() == 1  # clipped
    assert pixel_range.to_stored(torch.full((1, 1, 1), 7.0)).item() == 4095


def test_each_channel_has_its_own_range():
    pixel_range = PixelRange((0.0, -10.0), (1.0, 10.0), "float32")
    stored = torch.tensor([0.25, 5.0]).reshape(1, 2, 1, 1)
    images = pixel_range.to_model(stored)
    torch.testing.assert_close(images.flatten(), torch.tensor([-0.5, 0.5]))  # 2 (v - low) / (high - low) - 1
    torch.testing.assert_close(pixel_range.to_stored(images), stored)
    with pytest.raises(ValueError, match="for 2 channels"):
        pixel_range.to_model(torch.zeros(1, 3, 4, 4))


def test_integers_come_back_between_fractional_bounds():  # percentiles are seldom whole numbers
    pixel_range = PixelRange((100.4,), (60000.7,), "uint16")
    stored = torch.arange(101, 60001).to(torch.uint16)[None, None]
    assert torch.equal(pixel_range.to_stored(pixel_range.to_model(stored)).int(), stored.int())


def test_a_range_beyond_the_dtype_does_not_wrap_round():
    assert PixelRange((-10.0,), (300.0,), "uint8").to_stored(torch.tensor([[[-1.0, 1.0]]])).tolist() == [[[0, 255]]]


def test_range_survives_json_and_is_checked():
    pixel_range = PixelRange((0.0, 1.5), (2.0, 3.0), "float32")
    assert PixelRange.from_dict(pixel_range.to_dict()) == pixel_range
    assert pixel_range.to_dict() == {"low": [0.0, 1.5], "high": [2.0, 3.0], "dtype": "float32"}
    for fields in ({"low": [1], "high": [1]}, {"low": [0, 1], "high": [2]}, {"low": [], "high": []}, {"low": [0]}):
        with pytest.raises(ValueError):
            PixelRange.from_dict({"dtype": "uint8", **fields})
    with pytest.raises(ValueError, match="int8"):
        PixelRange((0.0,), (1.0,), "int8")
    with pytest.raises(ValueError, match="no natural range"):
        PixelRange.full("float32")


# decoding


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_png_keeps_its_channels(mode, channels):
    pixels = np.arange(5 * 4 * channels, dtype=np.uint8).reshape(5, 4, channels)
    image = Image.fromarray(pixels.squeeze(), mode)
    for source in (image, encoded(image, "PNG"), {"bytes": encoded(image, "PNG"), "path": None}):
        assert np.array_equal(decode_image(source), pixels)


def test_other_modes_of_pillow():
    assert decode_image(Image.new("1", (3, 2), 1)).tolist() == [[[255]] * 3] * 2
    assert decode_image(Image.new("CMYK", (3, 2))).shape == (2, 3, 3)
    palette = Image.new("P", (3, 2))
    palette.putpalette([10, 20, 30])
    assert decode_image(palette)[0, 0].tolist() == [10, 20, 30]
    assert decode_image(encoded(palette, "PNG", transparency=0))[0, 0].tolist() == [10, 20, 30, 0]


def test_16_bit_and_float_images_keep_their_precision(tmp_path):
    grey = np.array([[0, 1, 256], [4095, 40000, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(grey), kind))
        assert decoded.dtype == np.uint16
        assert np.array_equal(decoded[:, :, 0], grey)
    floats = np.array([[0.1, -2.5, 1e-7]], dtype=np.float32)
    assert np.array_equal(decode_image(encoded(Image.fromarray(floats), "TIFF"))[:, :, 0], floats)
    path = tmp_path / "seven.npy"
    path.write_bytes(npy(np.arange(504.0).reshape(8, 9, 7)))
    decoded = decode_image(path)
    assert decoded.dtype == np.float32
    assert decoded.shape == (8, 9, 7)
    assert decode_image(Image.fromarray(np.array([[70, 65535]], dtype=np.int32))).dtype == np.uint16  # mode I


@scientific
@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (np.arange(90, dtype=np.uint16).reshape(5, 6, 3) * 700, {"photometric": "rgb"}),
        (np.arange(90, dtype=np.float32).reshape(5, 6, 3), {"photometric": "rgb"}),
        (np.arange(210, dtype=np.uint8).reshape(5, 6, 7), {"photometric": "minisblack", "planarconfig": "contig"}),
    ],
)
def test_tiff_with_what_pillow_lacks(pixels, options):
    decoded = decode_image(tiff(pixels, **options))
    assert decoded.dtype == pixels.dtype
    assert np.array_equal(decoded, pixels)


@scientific
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_grey_with_alpha_in_planes(compression):
    planes = np.arange(2 * 6 * 5, dtype=np.uint8).reshape(2, 6, 5)
    options = {"photometric": "minisblack", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    file = tiff(planes, compression=compression, **options)
    assert np.array_equal(decode_image(file), np.moveaxis(planes, 0, 2))
    with Image.open(io.BytesIO(file)) as image, pytest.raises(ValueError, match="or planar; give the path"):
        decode_image(image)


@scientific
@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 6, 3), "float32"), ((4, 6, 5), "uint8"), ((4, 6, 2), "uint16"), ((4, 6, 3), "uint16")]
)
def test_orientation_is_applied_where_pillow_cannot_open_the_file(shape, dtype):
    pixels = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    kind = "rgb" if shape[2] == 3 else "minisblack"
    file = tiff(pixels, photometric=kind, planarconfig="contig", metadata=None, extratags=[(274, "H", 1, 6, True)])
    decoded = decode(file)
    assert decoded.orientation == 6
    assert np.array_equal(decoded.pixels, np.rot90(pixels, -1))


@scientific
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_premultiplied_alpha_is_divided_out_and_refused_in_windows(channels, dtype, tmp_path):
    """50 of alpha 100 is half: 255 / 2 or 65535 / 2, rounded down."""
    pixels = np.full((4, 6, channels), 50, dtype=dtype)
    pixels[..., -1] = 100
    pixels[0] = 0
    options = {"photometric": "rgb" if channels == 4 else "minisblack", "planarconfig": "contig", "metadata": None}
    (tmp_path / "a.tif").write_bytes(tiff(pixels, extrasamples=["assocalpha"], **options))
    right = pixels.copy()
    right[1:, :, :-1] = np.iinfo(dtype).max // 2
    assert np.array_equal(decode_image(tmp_path / "a.tif"), right)
    with pytest.raises(ValueError, match="multiplied by alpha; store them as they are"):
        open_image(tmp_path / "a.tif")


@scientific
def test_alpha_of_a_tiff_whose_white_is_zero_stays_in_windows(tmp_path):
    pixels = np.arange(4 * 6 * 2, dtype=np.uint8).reshape(4, 6, 2)
    options = {"photometric": "miniswhite", "planarconfig": "contig", "extrasamples": ["unassalpha"], "metadata": None}
    (tmp_path / "a.tif").write_bytes(tiff(pixels, **options))
    shown = np.stack([255 - pixels[..., 0], pixels[..., 1]], axis=2)
    assert np.array_equal(decode_image(tmp_path / "a.tif"), shown)
    assert np.array_equal(open_image(tmp_path / "a.tif").read(slice(4), slice(6)), shown)


@scientific
def test_pages_of_a_tiff_are_channels_unless_they_are_depth():
    pages = np.arange(210, dtype=np.uint16).reshape(5, 6, 7)
    assert np.array_equal(decode_image(tiff(pages)), np.moveaxis(pages, 0, 2))
    with pytest.raises(ValueError, match=r"axes ZYX have the sizes \(5, 6, 7\)"):
        decode_image(tiff(pages, imagej=True, metadata={"axes": "ZYX"}))


@scientific
def test_16_bit_colour_png_is_not_reduced_to_8_bits(tmp_path):
    pixels = np.arange(60, dtype=np.uint16).reshape(4, 5, 3) * 1001
    assert np.array_equal(decode_image(colour_png_of_16_bits(pixels)), pixels)
    with (
        pytest.raises(ValueError, match="16-bit colours"),
        Image.open(io.BytesIO(colour_png_of_16_bits(pixels))) as image,
    ):
        decode_image(image)


@pytest.mark.parametrize("kind", ["PNG of 2 bits", "PNG of 4 bits", "PGM", "plain PGM", "PGM of 12 bits"])
def test_masks_keep_grey_values_that_are_scaled_for_show(kind):
    largest = {"PNG of 2 bits": 3, "PNG of 4 bits": 15, "PGM of 12 bits": 4095}.get(kind, 20)
    values = np.arange(largest + 1).reshape(-1, 3 if largest == 20 else 4)
    height, width = values.shape
    if kind.startswith("PNG"):
        data = grey_png(values, int(kind[7]))
    elif kind == "plain PGM":
        data = f"P2 {width} {height} {largest}\n{' '.join(map(str, values.ravel()))}\n".encode()
    else:
        data = f"P5 {width} {height} {largest}\n".encode() + values.astype(">u2" if largest > 255 else "u1").tobytes()
    with Image.open(io.BytesIO(data)) as image:
        (cell,) = as_source([image], "masks").rows["image"][:]
    for source in (data, cell, Image.open(io.BytesIO(data))):
        assert np.array_equal(decode(source, reading="values").pixels[:, :, 0], values)
    full = 65535 if largest > 255 else 255
    shown = decode_image(data)[:, :, 0]
    np.testing.assert_allclose(shown, values * (full / largest), atol=0.5)
    np.testing.assert_allclose(decode_mask(data, reading="brightness").keys, values * (full / largest), atol=0.5)


@scientific
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_masks_keep_grey_values_of_4_bits_in_tiff(photometric):
    values = np.arange(16, dtype=np.uint8).reshape(2, 8)
    data = tiff(values, bitspersample=4, photometric=photometric)
    assert np.array_equal(decode(data, reading="values").pixels[:, :, 0], values)
    assert decode_image(data)[0, 1, 0] == (17 if photometric == "minisblack" else 238)


def test_16_bit_colour_ppm_is_refused_rather_than_reduced():
    with pytest.raises(ValueError, match="16-bit colours"):
        decode_image(b"P6 2 1 65535\n" + bytes(12))


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    assert decode_image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)).shape == (6, 4, 3)


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (3, 2), value) for value in (10, 200)]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded.shape[:2] == (2, 3)
    assert (decoded == 10).all()


def test_arrays_of_other_dtypes():
    assert decode_image(np.array([[True, False]]))[:, :, 0].tolist() == [[255, 0]]
    assert decode_image(np.array([[0, 65535]])).dtype == np.uint16
    assert decode_image(np.zeros((2, 3), dtype=np.float64)).dtype == np.float32
    for array, message in [
        (np.array([[-1]]), "-1 to -1, .*; convert them to float32, and give value_range"),
        (np.array([[70000]]), "70000"),
        (np.zeros((2, 3), dtype=complex), "complex"),
        (np.zeros((2, 2, 3, 3)), "shape"),
        (np.zeros((0, 3)), "shape"),
        (np.array([[np.nan]]), "NaN"),
        (np.array([[1e300]]), "infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_image(array)


def test_broken_files_are_named(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), dtype=np.uint8)), "PNG")
    contents = {
        "empty.png": b"",
        "text.png": b"not an image at all",
        "truncated.png": whole[: len(whole) // 2],
        "nan.npy": npy(np.array([[np.inf]])),
        "pickled.npy": npy(np.array([{}], dtype=object)),
        "bad.tif": b"II*\0" + bytes(20),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            decode_image(tmp_path / name)
    with pytest.raises(ValueError, match="absent.png"):
        decode_image({"bytes": None, "path": str(tmp_path / "absent.png")})
    with pytest.raises(ValueError, match="neither bytes nor a path"):
        decode_image({"bytes": None, "path": None})


@pytest.mark.parametrize("kind", ["EPS", "WMF"])
def test_an_image_that_another_program_would_draw_is_refused_until_it_is_converted(kind):
    image = Image.new("L", (2, 3), 7)
    image.format = kind  # as of an image that was opened from such a file
    with pytest.raises(ValueError, match=rf"a file of {kind}, .* give image\.convert"):
        decode_image(image)
    assert np.array_equal(decode_image(image.convert("RGB")), np.full((3, 2, 3), 7))


def test_the_documented_formats_are_read_and_no_others_of_pillow():
    image = Image.new("RGB", (8, 6), (9, 9, 9))
    for kind in ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM", "TGA"):
        assert decode_image(encoded(image, kind)).shape == (6, 8, 3)
    for kind in ("PCX", "SGI", "ICO"):
        with pytest.raises(ValueError, match="not an image of a format that is read"):
            decode_image(encoded(image, kind))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(monkeypatch):
    data = encoded(Image.new("L", (40, 30)), "PNG")
    for limit in (1000, 500):  # Pillow warns above its limit and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="decompression bomb"):
            decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decode_image(data).shape == (30, 40, 1)


# size and channels


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_a_constant_image_stays_constant_when_resized(dtype, channels):
    values = np.arange(1, channels + 1).astype(dtype) * 9
    image = np.broadcast_to(values, (13, 10, channels))
    resized = resize(image, 5, 8)
    assert resized.dtype == image.dtype
    np.testing.assert_allclose(resized, np.broadcast_to(values, (5, 8, channels)), rtol=1e-6)


def test_resizing_keeps_16_bits_and_does_not_overshoot():
    ramp = np.linspace(1000, 1900, 64).round().astype(np.uint16)  # 900 grey levels: 3 of them in 8 bits
    resized = resize(np.tile(ramp, (64, 1))[:, :, None], 32, 32)
    expected = (ramp[0::2].astype(float) + ramp[1::2]) / 2
    np.testing.assert_allclose(resized[16, 3:-3, 0], expected[3:-3], atol=1)  # a ramp is resampled to itself
    edge = np.zeros((32, 32, 1), dtype=np.float32)
    edge[:, 16:] = 5
    resized = resize(edge, 24, 24)
    assert (resized.min(), resized.max()) == (0, 5)


def test_shorter_side_becomes_image_size():
    image = np.arange(20 * 10, dtype=np.uint8).reshape(20, 10, 1)
    assert Preparation(5, "center")(image).shape == (5, 5, 1)
    assert Preparation(5, "random")(image).shape == (10, 5, 1)
    assert np.array_equal(Preparation(10, "center")(image), image[5:15])  # a cut alone changes no value
    assert Preparation()(image) is image


def test_channels_are_converted_only_when_asked():
    grey = np.full((1, 1, 1), 100, dtype=np.uint8)
    assert convert_channels(grey, 3).tolist() == [[[100, 100, 100]]]
    colour = np.array([[[255, 0, 0]]], dtype=np.uint8)
    assert convert_channels(colour, 1).item() == 76  # 0.299 * 255
    half_red = np.array([[[65535, 0, 0, 0]]], dtype=np.uint16)
    assert convert_channels(half_red, 3).tolist() == [[[65535, 65535, 65535]]]  # transparent: white
    assert convert_channels(np.array([[[40, 255]]], dtype=np.uint8), 1).item() == 40
    with pytest.raises(ValueError, match="7 channels"):
        convert_channels(np.zeros((1, 1, 7), dtype=np.uint8), 3)


@scientific
@pytest.mark.parametrize("pages", [2, 4])
def test_pages_of_a_tiff_are_not_taken_for_alpha(pages, tmp_path):
    file = tiff(np.full((pages, 8, 8), 100, dtype=np.uint8), photometric="minisblack")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tif").write_bytes(file)
    options = DataConfig(data=str(tmp_path / "data"), channels=1, validation_fraction=0, cache_dir=str(tmp_path))
    grey = Preparation(channels=1)
    for read in (
        lambda: grey(decode(file)),
        lambda: list(stored_images(file, preparation=grey)),
        lambda: load_images(options),
        lambda: load_images(replace(options, streaming=True, image_size=8)),
    ):
        with pytest.raises(ValueError, match=f"{pages} channels .* to 1: they are pages or planes, not colour and"):
            read()
    assert Preparation(channels=pages)(decode(file)).shape == (8, 8, pages)
    alpha = tiff(np.full((8, 8, 2), 255, dtype=np.uint8), photometric="minisblack", extrasamples=["unassalpha"])
    assert grey(decode(alpha)).shape == (8, 8, 1)
