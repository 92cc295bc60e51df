"""Every kind of mask file gives its classes, or an error that says why it cannot."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.support.image_files import npy
from unet_diffusion.data.masked.encoding import find_encoding, parse_colours
from unet_diffusion.data.masked.parts import read_mask
from unet_diffusion.images.decoding import decode
from unet_diffusion.images.masks import (
    COLOURED,
    colour_key,
    decode_instances,
    decode_mask,
    describe_keys,
    fit_orientation,
    key_colour,
)
from unet_diffusion.images.resizing import Preparation, resize_labels

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
INDICES = np.array([[0, 1, 2], [2, 1, 255]])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def palette_image(indices: np.ndarray, colours) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette([channel for each in colours for channel in each])
    return image


# reading


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray(INDICES.astype(np.uint8))),
        encoded(Image.fromarray(INDICES.astype(np.uint16))),
        encoded(palette_image(INDICES, [(i, 0, 255 - i) for i in range(256)])),
        encoded(Image.fromarray(np.repeat(INDICES[..., None], 3, axis=2).astype(np.uint8))),  # grey saved as colour
        npy(INDICES),
        npy(INDICES.astype(np.float32)),
        INDICES,
    ],
)
def test_indices_are_read_from_any_file(source):
    assert np.array_equal(decode_mask(source).keys, INDICES)


def test_a_palette_gives_indices_with_their_colours_or_colours():
    source = encoded(palette_image(np.array([[0, 1], [1, 3]]), [BLACK, RED, WHITE, GREEN]))
    mask = decode_mask(source)
    assert mask.keys.tolist() == [[0, 1], [1, 3]]
    assert mask.palette == {0: BLACK, 1: RED, 3: GREEN}
    assert decode_mask(source, reading="colours").keys.tolist() == [
        [0, colour_key(RED)],
        [colour_key(RED), colour_key(GREEN)],
    ]
    assert decode(source).pixels.shape == (2, 2, 3)  # as an image it is in colour


def test_colours_have_keys_of_their_own_and_transparent_pixels_are_black():
    pixels = np.array([[(0, 1, 0, 255), (9, 9, 9, 255), (255, 0, 0, 0)]], dtype=np.uint8)
    keys = decode_mask(encoded(Image.fromarray(pixels))).keys
    assert keys.tolist() == [[COLOURED + 256, 9, 0]]  # (0, 1, 0) is not the grey value 256
    for colour in (BLACK, WHITE, RED, (1, 2, 3)):
        assert key_colour(colour_key(colour)) == colour
    assert describe_keys([0, 1, 2, 7, colour_key(RED)]) == "0..2, 7, (255, 0, 0)"


def test_black_and_white_files_and_bools_are_0_and_255():
    bits = np.array([[True, False]])
    for source in (encoded(Image.fromarray(bits)), bits, npy(bits)):
        assert decode_mask(source).keys.tolist() == [[255, 0]]


def test_several_mask_channels_are_refused_and_overlaps_are_counted():
    channels = np.zeros((4, 5, 3), dtype=np.uint8)
    channels[:2, :, 0] = channels[1:3, :, 1] = 1
    with pytest.raises(ValueError, match=r"3 channels of uint8, and they overlap at 5 pixels \(multi-label\)"):
        decode_mask(channels)
    channels[1, :, 1] = 0
    with pytest.raises(ValueError, match="a channel for each class is not read"):
        decode_mask(channels)
    with pytest.raises(ValueError, match="5 channels"):
        decode_mask(np.eye(5, dtype=np.uint8)[[[0, 1, 2, 3, 4]] * 6] * 255)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_channel_for_each_class_is_not_taken_for_colours_with_alpha(channels):
    """Its last channel is 0 or 255, as alpha is; an empty mask whose pixels are all opaque stays one."""
    one_hot = np.eye(channels, dtype=np.uint8)[np.arange(12).reshape(3, 4) % channels] * 255
    with pytest.raises(ValueError, match="a channel for each class is not read"):
        decode_mask(one_hot)
    empty = np.zeros((3, 4, channels), dtype=np.uint8)
    empty[:, :, -1] = 255
    assert (decode_mask(empty).keys == 0).all()
    with pytest.raises(ValueError, match="not alpha of 0 or 255 alone. .* give mask_encoding='binary'"):
        decode_mask(np.array([[(255, 0, 0, 128)]], dtype=np.uint8))


def test_files_that_are_not_masks_are_refused():
    for source, message in (
        (np.array([[0.0, 0.37]]), "0.37, but classes are whole numbers"),
        (
            np.array([[0.5, -1.0]]),
            "-1, but classes are whole numbers from 0 up; where it stands for pixels without a class, write 255",
        ),
        (np.array([[0.0, np.nan]]), "NaN"),
        (b"", "empty"),
        (encoded(Image.new("P", (50, 50)))[:60], "cannot be decoded"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_mask(source)


def test_instance_maps_keep_16_bits():
    instances = np.array([[0, 300], [65535, 1]])
    assert np.array_equal(decode_instances(encoded(Image.fromarray(instances.astype(np.uint16)))), instances)
    with pytest.raises(ValueError, match="in colour"):
        decode_instances(encoded(Image.new("RGB", (2, 2), RED)))


# brightness


def brightness(pixels, **options) -> list:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    return decode_mask(encoded(image), reading="brightness", **options).keys.tolist()


def test_brightness_is_the_grey_value_or_the_largest_channel_times_alpha():
    assert brightness([[0, 100, 255]]) == [[0, 100, 255]]
    assert brightness([[(10, 200, 30), (0, 0, 7)]]) == [[200, 7]]
    assert brightness([[(10, 200, 30, 255), (255, 0, 0, 128), (255, 0, 0, 0)]]) == [[200, 128, 0]]
    assert brightness([[(200, 51), (200, 255)]]) == [[40, 200]]  # 200 * 51 / 255
    assert brightness(np.zeros((2, 2, 3))) == [[0, 0]] * 2
    empty = np.zeros((2, 2, 4))
    empty[..., 0] = 255  # an untouched layer of a transparent colour
    assert brightness(empty) == [[0, 0]] * 2
    assert decode_mask(np.array([[True, False]]), reading="brightness").keys.tolist() == [[255, 0]]
    assert decode_mask(np.array([[0, 40000]]), reading="brightness").keys.tolist() == [[0, 40000]]


def test_brightness_of_floats_from_0_to_1_is_of_8_bits():
    assert decode_mask(np.array([[0.0, 0.5, 1.0]]), reading="brightness").keys.tolist() == [[0, 128, 255]]
    assert decode_mask(np.array([[0.0, 127.4, 255.0]]), reading="brightness").keys.tolist() == [[0, 127, 255]]
    with pytest.raises(ValueError, match="the mask holds -1 to 0.5"):
        decode_mask(np.array([[-1.0, 0.5]]), reading="brightness")


def test_the_first_entry_of_a_palette_is_dark_unless_it_is_white_and_the_next_black():
    """An indexed mask of white background and red object is not turned round."""
    for colours in ([WHITE, RED], [BLACK, WHITE], [WHITE] + [RED] * 255):
        for index in {1, len(colours) - 1}:
            mask = decode_mask(encoded(palette_image(np.array([[0, index]]), colours)), reading="brightness")
            assert mask.keys.tolist() == [[0, 255]]
        assert not mask.palette  # the keys are not its indices
    greys = palette_image(np.array([[0, 1, 2]]), [(40, 40, 40), BLACK, WHITE])
    assert brightness(greys) == [[40, 0, 255]]
    with pytest.raises(ValueError, match=r"a palette of colours and the indices 0..2; give mask_encoding='palette'"):
        brightness(palette_image(np.array([[0, 1, 2]]), [BLACK, RED, GREEN]))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("width", [0, 3, 8])
def test_black_and_white_in_any_order_of_the_palette_is_read_as_shown(kind, width):
    shown = np.zeros((8, 8), dtype=np.uint8)
    shown[:, :width] = 255
    quantised = encoded(Image.fromarray(shown).convert("RGB").quantize(2), kind)  # white is index 0, if there is any
    assert np.array_equal(decode_mask(quantised, reading="brightness").keys, shown)
    merged = read_mask([{"bytes": quantised, "path": None}, None], "instances")
    assert np.array_equal(merged.keys, shown > 0)


def test_a_channel_for_each_class_is_no_brightness():
    for channels in (2, 4, 5):
        one_hot = np.eye(channels, dtype=np.uint8)[np.arange(72).reshape(8, 9) % channels]
        for most in (1, 255):
            with pytest.raises(ValueError, match="a channel for each class is not read"):
                decode_mask(one_hot * most, reading="brightness")


def test_soft_edges_are_refused_with_a_step_that_works():
    half = np.array([[(255, 0, 0, 128), (255, 0, 0, 255), (255, 0, 0, 0)]], dtype=np.uint8)
    for source, reading in ((half, "values"), (half, "colours"), (np.array([[0.0, 0.3]]), "values")):
        with pytest.raises(ValueError, match="give mask_encoding='binary'"):
            decode_mask(source, reading=reading)
        decode_mask(source, reading="brightness")


def test_pages_of_a_tiff_are_no_colours_of_a_mask():
    tifffile = pytest.importorskip("tifffile")
    classes = np.eye(3, dtype=np.uint8)[np.arange(80).reshape(8, 10) % 3] * 255
    file = io.BytesIO()
    tifffile.imwrite(file, np.moveaxis(classes, 2, 0), photometric="minisblack", metadata=None)
    for reading in ("values", "colours", "brightness"):
        with pytest.raises(ValueError, match="a channel for each class is not read"):
            decode_mask(file.getvalue(), reading=reading)


# orientation


@pytest.mark.parametrize("tag", range(1, 9))
def test_a_mask_of_the_stored_pixels_is_turned_with_its_image(tag):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    exif = Image.Exif()
    exif[0x0112] = tag
    image = encoded(Image.fromarray(stored), exif=exif)
    decoded = decode(image)
    upright = decoded.pixels[:, :, 0]  # turned by Pillow: the reference
    assert decoded.orientation == tag
    assert np.array_equal(fit_orientation(upright.copy(), upright.shape, tag), upright)  # drawn on what viewers show
    if tag >= 5:  # height and width are exchanged, so the sizes show it
        assert np.array_equal(fit_orientation(stored, upright.shape, tag), upright)
    else:
        assert np.array_equal(fit_orientation(stored, upright.shape, tag), stored)
    assert np.array_equal(decode_mask(image).keys, upright)  # a mask that states its own orientation


# size


def test_masks_are_resized_by_nearest_neighbour_as_pillow_does():
    mask = np.random.default_rng(0).integers(0, 5, (13, 17), dtype=np.uint8)
    for size in ((13, 17), (26, 34), (5, 9), (20, 7), (1, 1)):
        expected = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(resize_labels(mask, *size), np.asarray(expected))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_masks_are_cut_and_resized_as_their_images(crop):
    image = np.zeros((20, 40, 1), dtype=np.uint8)
    image[4:16, 20:26] = 255
    preparation = Preparation(10, crop)
    prepared, mask = preparation(image)[:, :, 0], preparation.labels(image[:, :, 0])
    assert prepared.shape == mask.shape == ((10, 10) if crop == "center" else (10, 20))
    assert np.array_equal(prepared > 127, mask == 255)  # edges fall between pixels
    assert Preparation().labels(mask) is mask


# what values mean


def classes_of(keys, *arguments, **options) -> dict[int, int]:
    return dict(find_encoding(keys, *arguments, **options).classes)


def test_auto_finds_indices_binary_and_palettes():
    assert classes_of([0, 1, 2]) == {0: 0, 1: 1, 2: 2, 255: 255}
    assert classes_of([0, 1, 255])[255] == 255  # ignored
    assert classes_of([0, 255]) == {0: 0, 255: 1}
    green, red = colour_key(GREEN), colour_key(RED)
    found = find_encoding([red, 255, green, 0])
    assert found.classes == {0: 0, green: 1, red: 2, 255: 3}  # sorted by (red, green, blue), black first
    assert (found.num_classes, found.palette) == (4, (BLACK, GREEN, RED, WHITE))


def test_the_number_of_classes_is_found_or_stated():
    assert find_encoding([0]).num_classes == 2
    assert find_encoding([0, 4], "indices").num_classes == 5
    assert find_encoding([0, 1], num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match="4 classes, but num_classes is 3"):
        find_encoding([0, 1, 2, 3], "palette", num_classes=3)
    with pytest.raises(ValueError, match="number of classes is 300, but must be from 2 to 255"):
        find_encoding([0, 299], "indices")


def test_stated_encodings_are_obeyed():
    assert classes_of([0, 255], "indices") == {0: 0, 1: 1, 255: 255}
    assert classes_of([0, 128], "binary") == {0: 0, 128: 1}
    assert classes_of([0, 128, 255], "palette") == {0: 0, 128: 1, 255: 2}
    assert classes_of([0, 3, 127, 128, 255], "binary") == {0: 0, 3: 0, 127: 0, 128: 1, 255: 1}
    with pytest.raises(ValueError, match=r"'indices', but masks hold the colours \(255, 0, 0\); use 'palette'"):
        find_encoding([0, colour_key(RED)], "indices")
    with pytest.raises(ValueError, match="'colour', but must be one of 'auto'"):
        find_encoding([0, 1], "colour")


def test_given_colours_may_share_a_class_and_be_ignored():
    colours = parse_colours({"black": 0, "#ff0000": 1, "#00ff00": 1, "white": 255})
    found = find_encoding([0, colour_key(RED)], colours=colours)
    assert found.table([0, colour_key(GREEN), 255]).tolist()[:3] == [0, 1, 255]
    assert (found.num_classes, found.palette) == (2, (BLACK, RED))
    with pytest.raises(ValueError, match="'#zz', which is not a colour"):
        parse_colours({"#zz": 0})
    with pytest.raises(ValueError, match="mask_colours are given, but mask_encoding is 'binary'"):
        find_encoding([0, 255], "binary", colours=colours)


def test_the_palette_of_index_files_is_kept():
    assert find_encoding([0, 1, 2], palette={0: BLACK, 2: RED}).palette == (BLACK, (230, 159, 0), RED)
    assert find_encoding([0, 1, 2]).palette is None


def test_values_that_are_not_a_class_are_named():
    with pytest.raises(ValueError, match=r"masks hold 2, 7, but the classes are 0..1 and 255 \(ignored\)"):
        find_encoding([0, 1]).table([0, 1, 2, 7, 255])


def test_very_many_values_are_refused_unless_their_number_is_given():
    with pytest.raises(ValueError, match=r"0..87, which would be 88 classes.*'instances'"):
        find_encoding(range(88))
    assert find_encoding(range(88), num_classes=88).num_classes == 88
    with pytest.raises(ValueError, match="100 different colours.*JPEG"):
        find_encoding([COLOURED + 1 + key for key in range(100)])
