"""Maps of objects from a trained network: whole, in windows, and averaged over turns."""

import pytest
import torch

from tests.support.segmentation import image, network
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.segmentation.segmenter import TURNS, Segmenter, turned, turned_back


def segmenter(unet, tile_size=None, turns=TURNS[:1]) -> Segmenter:
    tiling = Tiling.of(unet, tile_size, symmetric=len(turns) > 1)
    return Segmenter(unet, PixelRange.full("uint8"), tiling, torch.device("cpu"), turns, None, (), None)


@torch.no_grad()
def maps(of: Segmenter, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Probabilities (K, H, W), boundary (H, W), distance (H, W), and the number of windows."""
    height, width = pixels.shape[1:]
    chances, boundary, distance = (
        torch.full((of.num_classes, height, width), torch.nan),
        *torch.full((2, height, width), torch.nan),
    )
    done: list[int] = []
    for rows, columns, *parts in of.regions_with_objects(
        lambda rows, columns: pixels[None, :, rows, columns], (height, width), [], lambda: done.append(1)
    ):
        chances[:, rows, columns], boundary[rows, columns], distance[rows, columns] = (part[0] for part in parts)
    return chances, boundary, distance, len(done)


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(image(height, width)).permute(2, 0, 1)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return network(norm="none", attention=(False, False), instances=True)


def test_the_maps_are_those_of_the_logits(unet):
    logits = unet(pixels(9, 14)[None] / 127.5 - 1, head="segmentation").logits[0]
    chances, boundary, distance, _ = maps(segmenter(unet), pixels(9, 14))
    torch.testing.assert_close(chances, logits[:3].softmax(dim=0))
    torch.testing.assert_close(boundary, logits[3].sigmoid())
    torch.testing.assert_close(distance, logits[4])


def test_windows_give_what_the_whole_gives(unet):
    *whole, one = maps(segmenter(unet), pixels(40, 61))
    *tiled, several = maps(segmenter(unet, tile_size=8), pixels(40, 61))
    assert one == 1 < several
    for a, b in zip(whole, tiled):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_turns_are_averaged_after_the_sigmoid(unet):
    alone = segmenter(unet)
    each = [maps(alone, turned(pixels(9, 14), turn))[:3] for turn in TURNS]
    expected = [torch.stack([turned_back(x, turn) for x, turn in zip(kind, TURNS)]).mean(dim=0) for kind in zip(*each)]
    for a, b in zip(maps(segmenter(unet, turns=TURNS), pixels(9, 14)), expected):
        torch.testing.assert_close(a, b)


def test_regions_of_a_network_with_objects_are_those_of_its_classes_bit_for_bit(unet):
    read = (lambda rows, columns: pixels(9, 14)[None, :, rows, columns], (9, 14), [], lambda: None)
    with torch.no_grad():
        ((_, _, classes),) = segmenter(unet).regions(*read)
        ((_, _, alone),) = segmenter(unet.to_segmentation(instances=False)).regions(*read)
        assert classes.shape == (1, 3, 9, 14) and torch.equal(classes, alone)
        with pytest.raises(ValueError, match="this network gives classes alone; train it with instances=True"):
            next(segmenter(unet).regions_with_objects(*read))


@pytest.mark.parametrize("turns", [TURNS[:1], TURNS])
def test_scores_that_overflow_are_refused_rather_than_a_class(unet, turns):
    """fp16 holds numbers up to 65504; the largest of NaN scores would be class 0 everywhere."""

    def with_bias(bias: float) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            unet.segmentation_head.weight.fill_(0)
            unet.segmentation_head.bias.fill_(bias)
            return maps(segmenter(unet, turns=turns), pixels(9, 14))[0]

    torch.testing.assert_close(with_bias(60000), torch.full((3, 9, 14), 1 / 3))
    with pytest.raises(ValueError, match="the scores of the classes .* NaN .*; set mixed_precision to 'no' if"):
        with_bias(70000)
