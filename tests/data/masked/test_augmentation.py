import math

import pytest
import torch

from unet_diffusion.data.masked.augmentation import (
    augment,
    elastic_displacement,
    orient,
    sampling_grid,
    vary_colours,
    vary_intensity,
    warp_images,
    warp_masks,
    warp_weights,
)
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.randomness import keyed_generator
from unet_diffusion.segmentation.instance_maps import UNKNOWN

OFF = AugmentationConfig(
    elastic=0, flip=False, rotate90=False, rotation=0, scale=(1, 1), brightness=0, contrast=0, gamma=0, noise=0
)
GEOMETRIC = AugmentationConfig(elastic=3, brightness=0, contrast=0, gamma=0, noise=0)
SIZES = [(17, 29), (32, 32), (30, 21)]


def random_batch(size, batch=2, channels=3, num_classes=4):
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(batch, channels, *size, generator=generator) - 1
    masks = torch.randint(0, num_classes, (batch, *size), generator=generator)
    return images, masks


def generators(batch=2, epoch=0):
    return [keyed_generator(0, "augmentation", epoch, index) for index in range(batch)]


def grid_of(size, batch=2, displacement=(0.0, 0.0), angle=0.0, scale=1.0):
    vectors = torch.tensor(displacement).view(1, 2, 1, 1).expand(batch, 2, 3, 3)
    return sampling_grid(elastic_displacement(vectors, size), torch.full((batch,), angle), torch.full((batch,), scale))


def test_everything_off_is_the_identity_exactly():
    images, masks = random_batch((17, 29))
    result = augment(images, masks, OFF, generators(), weights=images[:, :1], objects=images[:, :2])
    torch.testing.assert_close(result.objects, images[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(result.images, images, rtol=0, atol=0)
    torch.testing.assert_close(result.masks, masks, rtol=0, atol=0)
    torch.testing.assert_close(result.weights, images[:, :1], rtol=0, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_zero_displacement_is_the_identity(size):
    images, masks = random_batch(size)
    grid = grid_of(size)
    # positions in float32 are right to about 1e-6 pixels, and exactly right where the side is a power of two
    tolerance = 0 if size == (32, 32) else 1e-5
    torch.testing.assert_close(warp_images(images, grid), images, rtol=0, atol=tolerance)
    torch.testing.assert_close(warp_masks(masks, grid), masks, rtol=0, atol=0)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turning_by_the_grid_equals_rot90(turns):
    images, masks = random_batch((31, 31))
    grid = grid_of((31, 31), angle=turns * math.pi / 2)
    torch.testing.assert_close(warp_images(images, grid), images.rot90(turns, (-2, -1)), rtol=0, atol=1e-4)
    torch.testing.assert_close(warp_masks(masks, grid), masks.rot90(turns, (-2, -1)), rtol=0, atol=0)


def test_turning_a_wide_image_keeps_distances():
    masks = torch.zeros(1, 9, 15, dtype=torch.int64)
    masks[0, 4, 7 + 3] = 1  # three pixels right of the centre
    turned = warp_masks(masks, grid_of((9, 15), batch=1, angle=math.pi / 2))
    assert (turned == 1).nonzero().tolist() == [[0, 4 - 3, 7]]  # three pixels above it
    assert (turned[0, :, :3] == IGNORE_INDEX).all()  # the turned image is 9 wide
    assert (turned[0, :, 3:12] != IGNORE_INDEX).all()


def test_magnification_moves_content_away_from_the_centre():
    masks = torch.zeros(1, 13, 17, dtype=torch.int64)
    masks[0, 6 + 2, 8 - 3] = 1
    grown = warp_masks(masks, grid_of((13, 17), batch=1, scale=2.0))
    assert grown[0, 6 + 4, 8 - 6] == 1
    assert (grown == IGNORE_INDEX).sum() == 0
    shrunk = warp_masks(masks, grid_of((13, 17), batch=1, scale=0.5))
    assert shrunk[0, 6 + 1, 8 - 2] != IGNORE_INDEX
    assert (shrunk[0, 0] == IGNORE_INDEX).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_constant_displacement_shifts_and_fills_by_the_rules(size):
    images, masks = random_batch(size)
    grid = grid_of(size, displacement=(3.0, -2.0))  # output (y, x) reads (y - 2, x + 3)
    images_out, masks_out = warp_images(images, grid), warp_masks(masks, grid)
    weights_out = warp_weights(images[:, :1] + 2, grid)
    torch.testing.assert_close(images_out[..., 2:, :-3], images[..., :-2, 3:], rtol=0, atol=1e-4)
    torch.testing.assert_close(weights_out[..., 2:, :-3], images[:, :1, :-2, 3:] + 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(masks_out[:, 2:, :-3], masks[:, :-2, 3:], rtol=0, atol=0)
    for strip in (masks_out[:, :2], masks_out[:, :, -3:]):
        assert (strip == IGNORE_INDEX).all()
    assert weights_out[..., -2:].abs().max() < 1e-4
    mirrored = images[..., -3:].flip(-1)  # the edge of the image is the mirror
    torch.testing.assert_close(images_out[..., 2:, -3:], mirrored[..., :-2, :], rtol=0, atol=1e-4)


def test_displacement_passes_through_the_vectors_of_the_grid():
    vectors = 10 * torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    displacement = elastic_displacement(vectors, (33, 17))
    torch.testing.assert_close(displacement[..., ::16, ::8], vectors)
    assert displacement.shape == (2, 2, 33, 17)


def test_displacement_is_smooth():
    vectors = 10 * torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    displacement = elastic_displacement(vectors, (129, 129))
    # the steepest slope of cubic convolution (A = -0.75) between values v is below 2 * max|v| * 1.5 a spacing, here 64
    assert displacement.diff(dim=-1).abs().max() < 3 * vectors.abs().max() / 64


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("vectors", [2, 3, 5])
def test_the_default_deformation_does_not_fold_small_crops(side, vectors):
    """The area that a pixel takes, the determinant of the Jacobian, stays positive everywhere."""
    config = AugmentationConfig(elastic_grid=vectors)
    normal = torch.randn(100, 2, vectors, vectors, generator=torch.Generator().manual_seed(0))
    x, y = elastic_displacement(config.elastic_pixels(side, 2 * side) * normal, (side, side)).unbind(1)
    across = [moved.diff(dim=2)[:, :-1] for moved in (x, y)]
    down = [moved.diff(dim=1)[:, :, :-1] for moved in (x, y)]
    assert ((1 + across[0]) * (1 + down[1]) - across[1] * down[0]).min() > 0


def test_large_crops_are_deformed_as_in_the_paper_and_an_explicit_value_stays():
    assert AugmentationConfig().elastic_pixels(512, 1024) == 10
    assert AugmentationConfig().elastic_pixels(64, 64) == pytest.approx(63 / 2 / 8)
    assert AugmentationConfig(elastic=7).elastic_pixels(64, 64) == 7
    assert AugmentationConfig(elastic=0).elastic_pixels(64, 64) == 0


def test_flips_are_flips_and_quarter_turns_are_rot90():
    images, _ = random_batch((5, 5), batch=3)
    moved = orient(images, torch.tensor([(1, 0, 0), (0, 1, 0), (0, 0, 3)]))
    expected = torch.stack([images[0].flip(-1), images[1].flip(-2), images[2].rot90(3, (-2, -1))])
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)


def test_all_eight_orientations_occur_and_nothing_else():
    images = torch.arange(9.0).view(1, 1, 3, 3) / 9
    config = AugmentationConfig(elastic=0, rotation=0, scale=(1, 1), brightness=0, contrast=0, gamma=0, noise=0)
    eight = {tuple(x.rot90(k, (-2, -1)).flatten().tolist()) for x in (images, images.flip(-1)) for k in range(4)}
    batch = augment(images.expand(100, 1, 3, 3), torch.zeros(100, 3, 3).long(), config, generators(100)).images
    assert {tuple(x.flatten().tolist()) for x in batch} == eight


def test_an_image_that_is_not_square_keeps_its_shape_and_all_its_pixels_under_quarter_turns():
    images, masks = random_batch((4, 6), batch=20)
    config = AugmentationConfig(elastic=0, rotation=0, scale=(1, 1), brightness=0, contrast=0, gamma=0, noise=0)
    result = augment(images, masks, config, generators(20))
    assert result.images.shape == images.shape
    torch.testing.assert_close(result.images.flatten(1).sort().values, images.flatten(1).sort().values)
    assert not torch.equal(result.images, images)


@pytest.mark.parametrize("size", SIZES)
def test_masks_keep_to_their_classes(size):
    images, masks = random_batch(size, batch=8)
    masks = torch.where(masks == 3, 200, masks)
    result = augment(images, masks, AugmentationConfig(rotation=180), generators(8))
    assert result.masks.dtype == torch.int64
    assert set(result.masks.unique().tolist()) == {0, 1, 2, 200, IGNORE_INDEX}


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (80, 80)])
def test_image_mask_and_weights_stay_aligned(size):
    column = torch.arange(size[1]).expand(4, *size)
    row = torch.arange(size[0])[:, None].expand(4, *size)
    whole = augment(row[:, None] / 64 - 1, row, GEOMETRIC, generators(4), weights=torch.ones(4, 1, *size)).weights[:, 0]
    for ramp in (column, row):
        result = augment(ramp[:, None] / 64 - 1, ramp, GEOMETRIC, generators(4), weights=ramp[:, None].float())
        position = 64 * (result.images[:, 0] + 1)
        # bilinear interpolation keeps a ramp; PyTorch's bicubic (A = -0.75) moves it by at most 0.048 pixels, and more
        # within two pixels of the mirror; the mask, the nearest pixel, is 1/2 away at most
        inner = (whole > 0.9999) & (position > 2) & (position < ramp.max() - 2)
        assert inner.float().mean() > 0.7
        assert (position - result.weights[:, 0])[inner].abs().max() < 0.06
        assert (position - result.masks)[inner].abs().max() < 0.55
        assert (position - result.masks)[result.masks != IGNORE_INDEX].abs().max() < 1.5


@pytest.mark.parametrize("size", [(64, 96), (80, 80)])
def test_objects_move_with_the_mask_pixel_for_pixel_and_are_unknown_outside(size):
    """The mask says which pixel of the image each pixel shows, and numbers of objects may be large."""
    place = torch.arange(size[0] * size[1]).view(1, *size).expand(4, *size) + 1000  # none is IGNORE_INDEX
    objects = torch.stack([place + 60000.0, 1 / place], dim=1)
    images = torch.zeros(4, 1, *size)
    _, masks, _, moved = augment(images, place, GEOMETRIC, generators(4), objects=objects)
    outside = masks == IGNORE_INDEX
    assert 0 < outside.float().mean() < 0.5
    assert (moved[:, 0] == torch.where(outside, UNKNOWN, masks + 60000)).all()
    torch.testing.assert_close(moved[:, 1], torch.where(outside, UNKNOWN, 1 / masks), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "size", [(24, 20), (129, 257)]
)  # the second is large and odd enough for chunks with remainders
def test_the_result_depends_on_the_generator_alone(size):
    images, masks = random_batch(size, batch=5)
    weights = images[:, :1] + 1
    first = augment(images, masks, AugmentationConfig(), generators(5), weights, weights)
    again = augment(images, masks, AugmentationConfig(), generators(5), weights, weights)
    other = augment(images, masks, AugmentationConfig(), generators(5, epoch=1), weights, weights)
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    for index in range(5):
        alone = augment(
            images[index, None],
            masks[index, None],
            AugmentationConfig(),
            [keyed_generator(0, "augmentation", 0, index)],
            weights[index, None],
            weights[index, None],
        )
        for a, b in zip(first, alone):
            torch.testing.assert_close(a[index], b[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(24, 20), (33, 47)])
def test_a_batch_at_once_is_varied_as_image_by_image(size):
    """An accelerator varies the whole batch at once, which must give the same images up to rounding."""
    images, _ = random_batch(size, batch=5)
    draws = torch.rand(5, 4, dtype=torch.float64)
    config = AugmentationConfig(contrast=0.5, gamma=0.5, brightness=0.3, noise=0.2)
    for vary in (
        lambda part: vary_intensity(images[part], config, draws[part], generators(5)[part]),
        lambda part: vary_colours(images[part], 0.5, generators(5)[part]),
    ):
        single = torch.cat([vary(slice(i, i + 1)) for i in range(5)])
        torch.testing.assert_close(vary(slice(None)), single, rtol=0, atol=2e-6)
        assert (single - images).flatten(1).abs().amax(dim=1).min() > 0.01


def test_switching_one_part_off_leaves_the_draws_of_the_others():
    images, masks = random_batch((24, 24))
    with_noise = augment(images, masks, AugmentationConfig(), generators())
    without = augment(images, masks, AugmentationConfig(noise=0, gamma=0), generators())
    assert torch.equal(with_noise.masks, without.masks)


def test_intensity_keeps_the_range_and_the_mask():
    images, masks = random_batch((16, 16))
    config = AugmentationConfig(
        elastic=0, flip=False, rotate90=False, rotation=0, scale=(1, 1), brightness=0.5, contrast=2, gamma=2, noise=0.5
    )
    result = augment(images, masks, config, generators())
    assert result.images.min() >= -1
    assert result.images.max() <= 1
    assert not torch.equal(result.images, images)
    assert torch.equal(result.masks, masks)


def test_brightness_shifts_by_a_fraction_of_the_range():
    images = torch.zeros(200, 1, 2, 2)
    config = AugmentationConfig(**{**vars(OFF), "brightness": 0.1})
    shifts = augment(images, torch.zeros(200, 2, 2).long(), config, generators(200)).images[:, 0, 0, 0] / 2
    assert -0.1 <= shifts.min() < -0.09
    assert 0.09 < shifts.max() <= 0.1


def test_contrast_keeps_the_mean_and_scales_about_it():
    images = torch.tensor([-0.1, 0.3]).view(1, 1, 1, 2).expand(200, 1, 1, 2)
    config = AugmentationConfig(**{**vars(OFF), "contrast": 0.25})
    result = augment(images, torch.zeros(200, 1, 2).long(), config, generators(200)).images[:, 0, 0]
    torch.testing.assert_close(result.mean(dim=1), torch.full((200,), 0.1))
    factors = (result[:, 1] - result[:, 0]) / 0.4
    assert 0.8 - 1e-6 <= factors.min() < 0.82
    assert 1.23 < factors.max() <= 1.25 + 1e-6


def test_gamma_is_a_power_of_values_in_0_to_1():
    images = torch.full((200, 1, 1, 1), 0.0)  # 1/2 of the range
    config = AugmentationConfig(**{**vars(OFF), "gamma": 1.0})
    result = augment(images, torch.zeros(200, 1, 1).long(), config, generators(200)).images.flatten()
    exponents = torch.log((result + 1) / 2) / math.log(0.5)
    assert 0.5 - 1e-5 <= exponents.min() < 0.52
    assert 1.9 < exponents.max() <= 2 + 1e-5


def test_noise_has_at_most_its_standard_deviation():
    images = torch.zeros(100, 1, 32, 32)
    config = AugmentationConfig(**{**vars(OFF), "noise": 0.1})
    result = augment(images, torch.zeros(100, 32, 32).long(), config, generators(100)).images
    deviations = result.flatten(1).std(dim=1) / 2  # as a fraction of the range of [-1, 1]; standard error 2.2%
    assert deviations.max() < 0.1 * 1.1
    assert deviations.mean().item() == pytest.approx(0.05, abs=4 * 0.1 / 12**0.5 / 10)  # uniform levels, 100 of them


def test_inverting_negates_its_share_of_the_images_and_no_mask():
    images, masks = random_batch((4, 4), batch=200)
    result = augment(images, masks, AugmentationConfig(**{**vars(OFF), "invert": 0.3}), generators(200))
    changed = torch.tensor([not torch.equal(after, before) for after, before in zip(result.images, images)])
    assert torch.equal(result.images, torch.where(changed.view(-1, 1, 1, 1), -images, images))
    assert torch.equal(result.masks, masks)
    assert 40 <= changed.sum() <= 80  # 60 on average, with a standard deviation of 6.5


def colours(images):
    config = AugmentationConfig(**{**vars(OFF), "colour": 0.5})
    count, _, *size = images.shape
    return augment(images, torch.zeros(count, *size).long(), config, generators(count)).images


def test_colours_vary_each_channel_on_its_own_and_keep_the_order_of_its_values():
    ramp = torch.linspace(-0.5, 0.5, 16).view(1, 1, 1, 16).expand(100, 3, 4, 16)
    varied = colours(ramp)
    assert (varied.diff(dim=-1) > 0).logical_or(varied[..., 1:].abs() == 1).all()
    assert (
        (varied[:, 0] - varied[:, 1]).abs().amax((1, 2)) > 0.01
    ).float().mean() > 0.9  # equal ones do not stay equal
    other = ramp.clone()
    other[:, 1] = 0.3
    assert torch.equal(colours(other)[:, [0, 2]], varied[:, [0, 2]])


def test_colours_reach_their_limits_and_leave_a_single_channel_alone():
    flat = torch.zeros(2000, 2, 1, 1)  # 1/2 of the range, which contrast about the mean does not move
    values = (colours(flat) + 1) / 2
    low, high = 0.25**1.5, 0.75 ** (1 / 1.5)  # brightness and gamma at their ends together
    assert low - 1e-6 <= values.min() < low + 0.04
    assert high - 0.04 < values.max() <= high + 1e-6
    grey, _ = random_batch((6, 8))
    assert torch.equal(colours(grey[:, :1]), grey[:, :1])


def test_free_rotation_reaches_its_limits_in_both_directions():
    masks = torch.zeros(60, 41, 41, dtype=torch.int64)
    masks[:, 20, 35] = 1
    config = AugmentationConfig(**{**vars(OFF), "rotation": 30.0})
    rows = [(mask == 1).nonzero() for mask in augment(masks[:, None] * 1.0, masks, config, generators(60)).masks]
    heights = torch.cat([found[:1, 0] for found in rows]) - 20  # 15 sin(30 degrees) is 7.5
    assert heights.min() in (-8, -7)
    assert heights.max() in (7, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elastic": -1}, "elastic is -1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"invert": 1.5}, "invert is 1.5"),
        ({"colour": -0.1}, "colour is -0.1"),
        ({"elastic_grid": 1}, "elastic_grid is 1"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"scale": (1.2, 0.8)}, "scale is"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**options)


def test_batches_that_do_not_belong_together_are_refused():
    images, masks = random_batch((6, 8))
    with pytest.raises(ValueError, match=r"masks have shape \(2, 8, 6\)"):
        augment(images, masks.mT, OFF, generators())
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        augment(images, masks, OFF, generators(1))
    with pytest.raises(ValueError, match="weights have shape"):
        augment(images, masks, OFF, generators(), weights=torch.ones(2, 6, 8))
    with pytest.raises(ValueError, match=r"objects have shape \(2, 2, 8, 6\), but must be maps"):
        augment(images, masks, OFF, generators(), objects=torch.ones(2, 2, 8, 6))
