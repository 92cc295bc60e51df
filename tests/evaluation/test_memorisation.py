"""Copies of training images are found, and new images of the same kind are not taken for copies."""

import numpy as np
import pytest
import torch

from unet_diffusion.evaluation import memorisation as module
from unet_diffusion.evaluation.memorisation import CopySearch, memorisation


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 1, 3, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_copies_are_found_and_shown_beside_their_originals():
    training = noise(50, seed=0)
    generated = torch.cat([noise(9, seed=1), training[[7, 30]]])
    figures, pairs = memorisation(generated, training, noise(40, seed=2), pairs=2)
    assert figures.near >= 2 / 11
    assert (figures.generated_count, figures.held_out_count, figures.training_count) == (11, 40, 50)
    first, second, *others = (np.asarray(pairs)[2:5, left : left + 5] for left in (2, 9, 16, 23))
    assert np.array_equal(first, second) and np.array_equal(*others)
    assert not np.array_equal(first, others[0])


def test_copies_of_mirrored_images_are_found_where_the_training_mirrored():
    training = noise(50, seed=0)
    generated = torch.cat([noise(9, seed=1), training[[7]].flip(-1), training[[30]]])
    distances, held_out = [], []
    for mirrored in (False, True):
        search = CopySearch(training, pairs=2, mirrored=mirrored)
        search.add(generated)
        scores, pairs = search.scores(noise(400, seed=2))
        distances.append(search.distances)
        held_out.append(scores.held_out)
    assert distances[1][9:].tolist() == pytest.approx([0, 0], abs=1e-6) and distances[0][9] > 0.1
    assert (distances[1][:9] <= distances[0][:9]).all()
    assert held_out[1] < held_out[0]  # held-out images are compared in the same way
    first, second, *others = (np.asarray(pairs)[2:5, left : left + 5] for left in (2, 9, 16, 23))
    assert np.array_equal(first, second) and np.array_equal(*others)


def test_distances_are_root_mean_squares_of_pixels():
    training = torch.zeros(3, 2, 4, 4)
    figures, _ = memorisation(torch.full((1, 2, 4, 4), 0.5), training, torch.full((20, 2, 4, 4), -0.25))
    assert figures.generated == pytest.approx(0.5) and figures.held_out == pytest.approx(0.25)
    assert figures.near == 0


def test_new_images_are_as_near_as_held_out_ones():
    count = 2000
    figures, _ = memorisation(noise(count, seed=3), noise(500, seed=4), noise(count, seed=5))
    deviation = (0.05 * 0.95 * 2 / count) ** 0.5  # of the share, and of the quantile that it is measured against
    assert figures.near == pytest.approx(0.05, abs=4 * deviation)
    assert figures.generated == pytest.approx(figures.held_out, rel=0.02)
    assert 0.5 < figures.near_error / deviation < 2
    for error in (figures.generated_error, figures.held_out_error):  # the spread of medians of 2000 of these distances
        assert 0.5 < error / spread_of_medians(count) < 2
    assert figures.flag == "" and f"{figures.near:.1%} +- {figures.near_error:.1%} of the generated" in str(figures)


def spread_of_medians(count: int) -> float:
    """The spread of the median distances of new images to the images of the test above."""
    medians = [memorisation(noise(count, seed), noise(500, seed=4))[0].generated for seed in range(10, 22)]
    return torch.tensor(medians, dtype=torch.float64).std().item()


def test_too_few_held_out_images_are_flagged_and_have_no_error():
    figures, _ = memorisation(noise(100, seed=8), noise(50, seed=9), noise(63, seed=10))
    assert figures.generated_error > 0 and figures.held_out_error is None and figures.near_error is None
    assert str(figures).endswith(
        "63 held-out images are too few to measure how near the nearest 5 % of them are; hold out 64 or more."
    )


@pytest.mark.parametrize(("count", "words"), [(1, "1 held-out image "), (2, "2 held-out images ")])
def test_no_share_is_measured_against_less_than_one_image(count, words):
    """5 % of 19 images are less than one, of 20 images one."""
    figures, _ = memorisation(noise(100, seed=8), noise(50, seed=9), noise(count, seed=10))
    assert figures.near is None and figures.held_out > 0
    assert str(figures).count(words) == 2 and "nearer than" not in str(figures)
    assert memorisation(noise(3, seed=8), noise(5, seed=9), noise(19, seed=10))[0].near is None
    assert memorisation(noise(3, seed=8), noise(5, seed=9), noise(20, seed=10))[0].near is not None


@pytest.mark.parametrize("held_out", [None, torch.zeros(0, 1, 3, 5)])
def test_without_held_out_images_nothing_is_compared(held_out):
    figures, _ = memorisation(noise(4, seed=6), noise(5, seed=7), held_out)
    assert figures.held_out is None and figures.near is None
    assert "none were held out" in str(figures)


@pytest.mark.parametrize("waiting", [1, 30])  # images that are compared at once
def test_batches_give_the_scores_and_pairs_of_the_whole(waiting, monkeypatch):
    generated, training, held_out = noise(100, seed=1), noise(50, seed=2), noise(70, seed=3)
    generated[[70, 3, 95]] = training[[7, 30, 49]]
    whole, pairs = memorisation(generated, training, held_out, pairs=5)
    monkeypatch.setattr(module, "LARGEST_MATRIX", waiting * 15)
    search = CopySearch(training, pairs=5)
    for batch in generated.split(8):
        search.add(batch)
        assert len(search.shown) <= 5 and sum(map(len, search._waiting)) < max(waiting, 8)
    scores, shown = search.scores(held_out)
    assert np.array_equal(shown, pairs)
    assert str(scores) == str(whole)
    assert scores.generated == pytest.approx(whole.generated, rel=1e-12)
