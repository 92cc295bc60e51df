import numpy as np
from PIL import Image

from unet_diffusion.images.figures import array_images, grid
from unet_diffusion.images.palette import colour, mask_image, overlay, viewable


def test_a_grid_has_the_images_where_they_belong():
    images = [Image.new("L", (4, 3), value) for value in (10, 20, 30)]
    sheet = grid(images, columns=2, gap=1)
    assert sheet.size == (2 * 5 + 1, 2 * 4 + 1)
    assert [sheet.getpixel(place)[0] for place in ((1, 1), (6, 1), (1, 5), (6, 5), (0, 0))] == [10, 20, 30, 255, 255]


def test_images_of_other_sizes_keep_their_shape_in_a_grid():
    """A square in a place of 4 x 2 pixels becomes 2 x 2, in its middle; a tall image becomes 1 x 2."""
    black = [Image.new("L", size) for size in ((4, 2), (6, 6), (3, 6))]
    sheet = np.asarray(grid(black, columns=3, gap=0).convert("L")) == 0
    assert sheet.tolist() == 2 * [[True] * 4 + [False, True, True, False] + [False, True, False, False]]


def test_sixteen_bit_and_float_images_are_stretched_to_be_seen():
    values = np.array([[100, 200], [300, 300]])
    for dtype in (np.uint16, np.float32):
        seen = np.asarray(viewable(Image.fromarray(values.astype(dtype))))
        assert seen[..., 0].tolist() == [[0, 128], [255, 255]]


def test_a_mask_image_keeps_the_indices_and_shows_the_palette():
    mask = np.array([[0, 1], [2, 255]])
    image = mask_image(mask)
    assert np.asarray(image).tolist() == mask.tolist()
    assert image.convert("RGB").getpixel((1, 0)) == colour(1)


def test_an_overlay_changes_labelled_pixels_only():
    shown = np.asarray(overlay(Image.new("L", (2, 1), 100), np.array([[0, 1]]), opacity=0.5))
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [round((100 + channel) / 2) for channel in colour(1)]


def test_arrays_of_any_channel_count_can_be_seen():
    modes = [array_images(np.full((1, 2, 2, channels), 0.5))[0].mode for channels in (1, 2, 3, 4, 7)]
    assert modes == ["L", "L", "RGB", "RGB", "RGB"]
