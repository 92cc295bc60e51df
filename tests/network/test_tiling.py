import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unet_diffusion import UNet
from unet_diffusion.network.feature_maps import mirrored
from unet_diffusion.network.tiling import (
    ATTENDED,
    LENGTH,
    MAPS,
    MEMORY,
    WHOLE,
    Tiling,
    context,
    context_of_convolutions,
    noise_window,
    read_mirrored,
    tiled,
)
from unet_diffusion.segmentation.segmenter import TURNS, turned, turned_back

EXACT = {
    "in_channels": 1,
    "out_channels": None,
    "num_classes": 2,
    "channels": (4, 6, 8),
    "norm": "none",
    "time_embedding": None,
}
KINDS = [
    {"block": "residual"},
    {"block": "plain", "activation": "relu"},
    {"block": "residual", "upsample": "nearest"},
    {"block": "plain", "downsample": "conv", "upsample": "nearest", "channels": (4, 6)},
    {"block": "residual", "downsample": "conv", "blocks_per_stage": 2, "channels": (4, 6)},
    {"block": "residual", "norm": "batch"},
]


def network(**overrides) -> UNet:
    """A network whose zero-initialised layers have weights, with larger ones than usual so that far pixels count."""
    torch.manual_seed(1)
    values = {**EXACT, **overrides}
    unet = UNet(**{"attention": (False,) * len(values["channels"]), **values})
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return unet.eval()


def run(unet: UNet, image: Tensor, tiling: Tiling, turn=(0, False)) -> Tensor:
    """Logits (B, K, H, W); checks that every pixel is written once."""
    logits = torch.full((len(image), unet.config.num_classes, *image.shape[2:]), torch.nan)
    parts = tiled(
        lambda window: turned_back(unet(turned(window, turn), head="segmentation").logits, turn),
        lambda rows, columns: image[..., rows, columns],
        image.shape[2:],
        tiling,
    )
    with torch.no_grad():
        for rows, columns, part in parts:
            assert logits[..., rows, columns].isnan().all()
            logits[..., rows, columns] = part
    assert not logits.isnan().any()
    return logits


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest absolute logit."""
    return ((a - b).abs().max() / b.abs().max()).item()


# --- context ---


def pixels_that_matter(unet: UNet, side: int, pixel: int) -> tuple[int, int]:
    """First and last row that changes the output at row `pixel`, by trying every row."""
    torch.manual_seed(2)
    image = torch.randn(1, 1, side, 3, dtype=torch.float64)
    changed = image.repeat(side, 1, 1, 1)
    changed[torch.arange(side), :, torch.arange(side)] += 3.0
    with torch.no_grad():
        clean, *others = unet(torch.cat([image, changed])).logits[..., pixel, :]
    effect = torch.stack([(other - clean).abs().max() for other in others])
    rows = (effect > 1e-12 * clean.abs().max()).nonzero()  # float64: rounding is 1e-16
    return int(rows.min()), int(rows.max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [72, 69])
def test_context_is_the_reach_of_the_network(kind, side):
    """Perturbing each row of the image: nothing beyond the context matters, and its last row does somewhere."""
    unet = network(**kind).double()
    stride = 2 ** (len(unet.config.channels) - 1)
    reach = []
    for pixel in range(32, 32 + stride):
        first, last = pixels_that_matter(unet, side, pixel)
        reach.append((pixel - first, last - pixel))
    before, after = context(unet)
    assert max(b for b, _ in reach) <= before
    assert max(a for _, a in reach) <= after
    if unet.config.downsample == "conv" or unet.config.block == "residual" and unet.config.activation == "silu":
        assert (max(b for b, _ in reach), max(a for _, a in reach)) == (before, after)  # max pooling can hide a pixel


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_context_of_the_network_of_2015(upsample):
    """Its published margin is 92 pixels; a pixel at the end of its 16x16 cell looks 15 further back, and so on."""
    with torch.device("meta"):
        unet = UNet.from_preset("ronneberger-2015", upsample=upsample)
    assert context(unet) == (107, 107 if upsample == "transposed" else 122)
    tiling = Tiling.of(unet, 388)
    assert tiling.margin == 92
    assert tiling.trail == (92 if upsample == "transposed" else 92 + 15)


@pytest.mark.parametrize("wrong", [{"norm": "group"}, {"attention": (False, False, True), "head_channels": 8}])
def test_statistics_and_attention_reach_everywhere(wrong):
    assert context(network(**wrong)) is None
    assert context_of_convolutions(network(**wrong).config) == (24, 24)


def test_batch_norm_reaches_everywhere_only_while_it_trains():
    unet = network(norm="batch")
    assert context(unet) == (24, 24)
    assert context(unet.train()) is None


# --- windows ---


@given(
    side=st.integers(1, 400),
    stride=st.sampled_from([2, 4, 16]),
    tile=st.integers(1, 6),
    before=st.integers(0, 40),
    after=st.integers(0, 40),
    ramp=st.integers(0, 8),
)
def test_windows_cover_the_side_and_keep_their_context(side, stride, tile, before, after, ramp):
    tiling = Tiling(stride, tile * stride, before, after, min(ramp, tile * stride // 4))
    spans = tiling.spans(side)
    total = torch.zeros(side)
    for span in spans:
        assert 0 <= span.start < span.stop <= side
        assert span.start % stride == 0
        assert (side - span.stop) % stride == 0  # so that the flipped image is cut at multiples as well
        for piece in span.pieces:
            assert piece.start >= span.start + before or span.start == 0
            assert piece.stop <= span.stop - after or span.stop == side
            total[piece.start : piece.stop] += piece.weights
    torch.testing.assert_close(total, torch.ones(side))
    longest = max(span.stop - span.start for span in spans)
    assert longest <= tiling.tile + tiling.shared + stride
    assert len(spans) <= 1 + max(-(-(side - tiling.shared) // tiling.tile), 0)


def test_small_images_are_one_window():
    tiling = Tiling.of(network(), 16)  # 16 + 2 * 24, and up to a stride more
    assert tiling.count(64, 64) == tiling.count(65, 67) == 1
    assert tiling.count(68, 64) == 2


def test_chosen_tiles_do_not_depend_on_the_image_but_on_the_network():
    with torch.device("meta"):
        narrow, wide = (Tiling.of(network(channels=(width, 32))) for width in (16, 64))
        attending = Tiling.of(UNet(channels=(64, 64, 64), num_classes=2, attention=(False, True, False)))
    assert narrow.tile + narrow.shared == pytest.approx(2 * (wide.tile + wide.shared), abs=4)
    assert attending.tile + attending.shared == 64 * 2


@pytest.mark.parametrize("preset", ["tiny", "small-32", "ronneberger-2015"])
def test_chosen_windows_share_at_most_a_third_and_take_the_memory_that_is_stated(preset):
    with torch.device("meta"):
        unet = UNet.from_preset(preset, num_classes=2)
    tiling = Tiling.of(unet)
    lost = tiling.shared + tiling.lead + tiling.trail
    assert tiling.tile >= 2 * lost - tiling.stride  # rounded down to the stride
    assert 4 * MAPS * unet.config.channels[0] * (tiling.tile + lost) ** 2 <= max(
        MEMORY, 4 * MAPS * unet.config.channels[0] * (LENGTH * lost) ** 2
    )


def test_images_that_fit_are_not_cut_and_windows_of_larger_ones_are_small():
    with torch.device("meta"):
        tiling = Tiling.of(UNet(channels=(32, 32), num_classes=2, attention=(False, False)))
    rows, columns = tiling.windows(512, WHOLE // (4 * MAPS * 32 * 512))
    assert [(len(each), each[0].start) for each in (rows, columns)] == [(1, 0)] * 2
    assert tiling.count(512, WHOLE // (4 * MAPS * 32 * 512) + 1) == len(tiling.spans(512)) * len(tiling.spans(683)) > 1
    assert tiling.batch_size(64, 64) == WHOLE // (4 * MAPS * 32) // 64**2
    with torch.device("meta"):
        attending = Tiling.of(UNet(channels=(8, 32), num_classes=2, attention=(False, True)))
    assert attending.count(ATTENDED * 2, ATTENDED * 2) == 1 < attending.count(ATTENDED * 2 + 2, ATTENDED * 2)
    assert Tiling.of(network(), 16).whole == 0  # tiles that are asked for are used


@pytest.mark.parametrize("tile_size", [0, -8, 2.5])
def test_wrong_tile_sizes_are_refused(tile_size):
    with pytest.raises(ValueError, match="tile_size"):
        Tiling.of(network(), tile_size)


# --- tiled results ---


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(height=st.integers(1, 110), width=st.integers(1, 110), tile_size=st.integers(1, 48), seed=st.integers(0, 99))
def test_tiled_equals_whole_for_padded_networks(kind, height, width, tile_size, seed):
    unet = network(**kind)
    image = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    with torch.no_grad():
        whole = unet(image).logits
    assert difference(run(unet, image, Tiling.of(unet, max(tile_size, 12))), whole) <= 1e-5


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[2], KINDS[4]])
@settings(max_examples=4, deadline=None)
@given(height=st.integers(1, 80), width=st.integers(1, 80), tile_size=st.integers(12, 40))
def test_tiled_equals_whole_for_unpadded_networks(kind, height, width, tile_size):
    """The whole: one forward of the image, mirrored at its border by numpy."""
    unet = network(padding="valid", **kind)
    image = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    stride = 2 ** (len(unet.config.channels) - 1)
    margin = (unet.smallest_side - unet.output_size(unet.smallest_side, unet.smallest_side)[0]) // 2
    ends = []
    for side in (height, width):
        wanted = side + 2 * margin + stride  # the last rows are spoilt where upsampling pads one side
        even = unet.smallest_side + -(-max(wanted - unet.smallest_side, 0) // stride) * stride
        ends.append((margin, even - margin - side))
    padded = np.pad(image[0, 0].numpy(), ends, mode="reflect")
    with torch.no_grad():
        whole = unet(torch.from_numpy(padded)[None, None]).logits[..., :height, :width]
    tiling = Tiling.of(unet, tile_size)
    assert difference(run(unet, image, tiling), whole) <= 1e-5
    assert difference(run(unet, image, Tiling.of(unet, 512)), whole) <= 1e-5


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("turn", TURNS)
def test_tiled_equals_whole_for_flipped_and_rotated_windows(padding, turn):
    unet = network(padding=padding, upsample="nearest", channels=(4, 6))
    image = torch.randn(1, 1, 71, 46)
    whole = run(unet, image, Tiling.of(unet, 512, symmetric=True), turn)
    assert difference(run(unet, image, Tiling.of(unet, 16, symmetric=True), turn), whole) <= 1e-5


def test_off_stride_windows_would_be_wrong():
    """Windows start at multiples of the stride because one that starts one pixel off gives other logits."""
    unet = network()
    image = torch.randn(1, 1, 160, 12)
    with torch.no_grad():
        whole, off = unet(image).logits, unet(image[:, :, 21:]).logits
    assert difference(off[:, :, 50:60], whole[:, :, 71:81]) > 1e-2


def test_blended_windows_are_near_the_whole_and_have_no_seam():
    """GroupNorm and attention: the difference of this random network is bounded, and is not larger at the cuts."""
    unet = network(norm="group", attention=(False, False, True), head_channels=8)
    image = torch.nn.functional.interpolate(torch.randn(1, 1, 30, 30), scale_factor=8, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        whole = unet(image).logits
    tiling = Tiling.of(unet, 96)
    error = (run(unet, image, tiling) - whole).abs().amax(dim=(0, 1)) / whole.abs().max()
    assert error.mean() < 0.1
    cuts = [span.pieces[0].start + tiling.ramp for span in tiling.spans(240)[1:]]
    assert cuts
    jumps = error.diff(dim=0).abs().mean(dim=1)
    assert jumps[[cut - 1 for cut in cuts]].max() < 3 * jumps.mean()


def test_blending_weighs_by_distance():
    """A stand-in that returns the window's number: between two windows the value rises as a raised cosine."""
    tiling = Tiling(stride=4, tile=16, before=4, after=4, ramp=4)
    numbers = iter(range(99))
    parts = tiled(
        lambda w: torch.full_like(w, next(numbers)), lambda r, c: torch.zeros(1, 1, 48, 8)[..., r, c], (48, 8), tiling
    )
    out = torch.zeros(48)
    for rows, _, part in parts:
        out[rows] = part[0, 0, :, 0]
    cut = tiling.spans(48)[1].pieces[0].start + 4
    expected = torch.sin(torch.pi / 2 * (torch.arange(8) + 0.5) / 8).square()
    torch.testing.assert_close(out[cut - 4 : cut + 4], expected)
    assert out[0] == 0


def test_memory_held_does_not_grow_with_the_image():
    """Pixels that were read but are not finished: the strips lie along the shorter side, however long the other."""

    def most_held(height: int, width: int) -> int:
        started, finished = torch.zeros(2, height, width, dtype=torch.bool)
        most = 0

        def read(rows: slice, columns: slice) -> Tensor:
            started[rows, columns] = True
            return torch.zeros(1, 1, rows.stop - rows.start, columns.stop - columns.start)

        tiling = Tiling(stride=4, tile=32, before=4, after=4, ramp=8)
        for rows, columns, _ in tiled(lambda window: window, read, (height, width), tiling):
            most = max(most, int((started & ~finished).sum()))
            finished[rows, columns] = True
        assert finished.all()
        return most

    assert most_held(768, 96) == most_held(384, 96) == most_held(96, 768)


# --- mirrored borders and noise ---


@given(side=st.integers(1, 9), start=st.integers(-30, 5), length=st.integers(1, 40))
def test_mirrored_places_are_numpys_reflection(side, start, length):
    padded = np.pad(np.arange(side), (30, 60), mode="reflect")
    expected = padded[start + 30 : start + 30 + length]
    assert mirrored(torch.arange(start, start + length), side).tolist() == expected.tolist()


def test_windows_beyond_the_border_are_mirrored():
    image = torch.randn(2, 3, 5, 4)
    seen = read_mirrored(lambda r, c: image[..., r, c], (5, 4), range(-7, 11), range(2, 9))
    expected = np.pad(image.numpy(), [(0, 0), (0, 0), (7, 6), (0, 5)], mode="reflect")[..., 2:9]
    assert np.array_equal(seen.numpy(), expected)


@given(top=st.integers(-70, 70), left=st.integers(0, 70), height=st.integers(1, 80), width=st.integers(1, 80))
@settings(max_examples=10, deadline=None)
def test_noise_at_a_pixel_is_the_same_in_every_window(top, left, height, width):
    whole = noise_window(3, 0, 2, slice(-70, 150), slice(0, 150))
    window = noise_window(3, 0, 2, slice(top, top + height), slice(left, left + width))
    assert torch.equal(window, whole[:, top + 70 : top + 70 + height, left : left + width])


def test_noise_is_standard_normal_and_new_for_each_draw():
    first, second = (noise_window(3, draw, 1, slice(0, 256), slice(0, 256)).flatten() for draw in (0, 1))
    error = 256**-1.0  # standard error of the mean of 256**2 values
    assert abs(first.mean()) < 4 * error
    assert abs(first.square().mean() - 1) < 4 * 2**0.5 * error
    assert abs((first * second).mean()) < 4 * error
