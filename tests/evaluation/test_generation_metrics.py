import math

import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from unet_diffusion.evaluation import generation_metrics
from unet_diffusion.evaluation.generation_metrics import (
    frechet_distance,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)


def gaussian(count, features, seed, mean=0.0, deviation=1.0):
    generator = torch.Generator().manual_seed(seed)
    return mean + deviation * torch.randn(count, features, generator=generator, dtype=torch.float64)


def standardised(count, features, seed):
    """A set whose sample mean is 0 and whose unbiased covariance is the identity, to rounding."""
    x = gaussian(count, features, seed)
    x = x - x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)).T)


def test_frechet_distance_of_exact_moments_is_the_closed_form():
    # both sample covariances are diagonal and known: |shift|^2 + sum of (s1 - s2)^2
    deviations = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    real, generated = standardised(80, 4, seed=1), standardised(90, 4, seed=2) * deviations + shift
    expected = shift.square().sum() + (deviations - 1).square().sum()
    assert frechet_distance(real, generated).value == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_samples_is_the_closed_form_within_its_error():
    measured = frechet_distance(gaussian(4000, 5, seed=1), gaussian(4000, 5, seed=2, mean=0.5, deviation=1.5))
    assert measured.value == pytest.approx(5 * (0.5**2 + 0.5**2), abs=4 * measured.error)
    # the mean's part alone, 5 * 0.5^2, has the variance 4 * 5 * 0.5^2 * (1 + 1.5^2) / N
    assert measured.error > (5 * (1 + 1.5**2) / 4000) ** 0.5 / 2


def test_frechet_distance_agrees_with_torchmetrics():
    mixing = gaussian(12, 12, seed=3)
    for count in (200, 64):
        real, generated = gaussian(count, 12, seed=4) @ mixing, gaussian(count, 12, seed=5).exp()
        moments = [moment for x in (real, generated) for moment in (x.mean(dim=0), torch.cov(x.T))]
        assert frechet_distance(real, generated).value == pytest.approx(_compute_fid(*moments).item(), rel=1e-9)


def test_frechet_distance_of_a_set_from_itself_is_0_even_where_the_covariance_is_singular():
    for features in (10, 100):
        x = gaussian(64, features, seed=6)
        measured = frechet_distance(x, x.flip(0))
        assert measured.value == pytest.approx(0, abs=1e-9)
        assert bool(measured.flag) == (features == 100)


def test_frechet_distance_flags_as_many_images_as_features_and_states_the_counts():
    measured = frechet_distance(gaussian(64, 64, seed=1), gaussian(65, 64, seed=2))
    assert "64 images give 64 features" in measured.flag
    assert (measured.real_count, measured.generated_count) == (64, 65)
    assert not frechet_distance(gaussian(65, 64, seed=1), gaussian(65, 64, seed=2)).flag


@pytest.mark.parametrize("features", [20, 200])
def test_error_of_the_frechet_distance_is_the_spread_over_new_samples(features):
    # 30 draws give the spread to 13%; the error is rather too large, but smaller than with replacement
    scales = torch.logspace(0, -1.5, features, dtype=torch.float64)
    draws = [
        frechet_distance(
            gaussian(64, features, seed=2 * i) * scales, 1.2 * gaussian(64, features, seed=2 * i + 1) * scales
        )
        for i in range(30)
    ]
    spread = torch.tensor([draw.value for draw in draws]).std().item()
    mean_error = sum(draw.error for draw in draws) / len(draws)
    assert 0.8 < mean_error / spread < 1.6


def test_kernel_distance_of_constant_sets_is_the_closed_form():
    # every kernel is the same number: k(x, x) + k(y, y) - 2 k(x, y), in every subset
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    measured = kernel_distance(x.expand(64, 2), y.expand(100, 2))
    expected = (5 / 2 + 1) ** 3 + (10 / 2 + 1) ** 3 - 2 * (1 / 2 + 1) ** 3
    assert measured.value == pytest.approx(expected, rel=1e-12)
    assert measured.error == pytest.approx(0, abs=1e-10)
    assert measured.real_count == measured.generated_count == 60  # 10 subsets of 6


def test_kernel_distance_of_gaussians_is_the_closed_form_within_its_error():
    # D = 1, real N(0, 1): E (xy + 1)^3 from the moments leaves m3^2 + 3 (m2 - 1)^2 + 3 m1^2 of the generated N(m, s^2)
    mean, deviation = 0.5, 1.3
    m2, m3 = mean**2 + deviation**2, mean**3 + 3 * mean * deviation**2
    measured = kernel_distance(gaussian(4000, 1, seed=1), gaussian(4000, 1, seed=2, mean=mean, deviation=deviation))
    assert measured.value == pytest.approx(m3**2 + 3 * (m2 - 1) ** 2 + 3 * mean**2, abs=4 * measured.error)
    assert measured.error < 1


def test_kernel_distance_of_equal_distributions_is_0_on_average_and_its_error_is_honest():
    draws = [kernel_distance(gaussian(100, 8, seed=2 * i), gaussian(100, 8, seed=2 * i + 1)) for i in range(100)]
    values = torch.tensor([draw.value for draw in draws])
    assert values.mean().abs() < 4 * values.std() / 10
    assert (values < 0).any()
    # an error from 10 subsets: standardised values follow Student's t with 9 degrees of freedom, variance 9 / 7
    standard = values / torch.tensor([draw.error for draw in draws])
    assert 0.6 < standard.square().mean() / (9 / 7) < 1.6


def test_subsets_are_at_most_1000_images_and_share_none(monkeypatch):
    seen = []

    def noted(x, y, **kernel):
        seen.append((x[:, 0], y[:, 0]))
        return poly_mmd(x, y, **kernel)

    monkeypatch.setattr(generation_metrics, "poly_mmd", noted)
    measured = kernel_distance(torch.arange(12500.0)[:, None] / 12500, torch.arange(20000.0)[:, None] / 20000)
    assert [len(x) for x, _ in seen] == [len(y) for _, y in seen] == [1000] * 12
    assert all(len(torch.cat(side).unique()) == 12000 for side in zip(*seen))
    assert measured.real_count == measured.generated_count == 12000


def clusters(*centres, count=64, seed=0):
    """Images around each centre on a line, at most about 1 from it."""
    return torch.cat([gaussian(count, 2, seed + i, deviation=0.2) + centre for i, centre in enumerate(centres)])


def test_precision_and_recall_of_equal_sets_are_1():
    x = clusters(0)
    for measured in precision_recall(x, x.flip(0)):
        assert measured.value == 1
        assert not measured.flag


def test_precision_and_recall_of_disjoint_sets_are_0():
    for measured in precision_recall(clusters(0), clusters(100)):
        assert (measured.value, measured.error) == (0, 0)


def test_half_of_the_modes_give_precision_1_and_recall_a_half():
    # the generated set repeats the first mode's images, half of the real ones; no ball reaches the other mode
    first, second = clusters(0), clusters(100, seed=9)
    precision, recall = precision_recall(torch.cat([first, second]), first)
    assert precision.value == 1
    assert recall.value == 0.5
    assert 0 < recall.error < 0.2
    assert (precision.real_count, precision.generated_count) == (128, 64)
    assert "128 real and 64 generated" in precision.flag
    precision, recall = precision_recall(first, torch.cat([first, second]))
    assert (precision.value, recall.value) == (0.5, 1)


def test_error_of_a_share_of_separate_images_is_binomial():
    # every ball has no radius and half of the images lie at its centre, so the share is a mean of 64 zeros and ones;
    # their variance is 1/4 * 64/63, and draws of 57 without replacement vary by 1/57 - 1/64 of it
    centre = torch.zeros(64, 2)
    halves = torch.cat([centre[:32], centre[32:] + 100])
    precisions, recalls = zip(*(precision_recall(centre, halves, seed=seed) for seed in range(30)))
    swapped = [precision_recall(halves, centre, seed=seed) for seed in range(30)]
    expected = 3 * (64 / 63 / 4 * (1 / 57 - 1 / 64)) ** 0.5
    for halved in (precisions, [recall for _, recall in swapped]):
        assert {draw.value for draw in halved} == {0.5}
        error = torch.tensor([draw.error for draw in halved]).square().mean().sqrt().item()
        assert error == pytest.approx(expected, rel=4 * 0.16 / 30**0.5)  # each is good to 16%
    for whole in (recalls, [precision for precision, _ in swapped]):
        assert {(draw.value, draw.error) for draw in whole} == {(1, 0)}


def test_errors_of_precision_and_recall_are_the_spread_over_new_samples():
    # Draws of 57 from 64 show 1 - (57/64)^m of the variance that comes from m images acting together, and 9 times
    # that is reported: 0.98 of it for single images, 4.0 for the 5 of a ball (its centre, its k = 3, the judged one).
    # Samples of 57 vary by 64/57 more, so the error is from 1.05 to about 2.1 of the spread; 100 draws give it to 7%.
    draws = [
        precision_recall(gaussian(64, 8, seed=2 * i), gaussian(64, 8, seed=2 * i + 1, mean=0.5, deviation=1.2))
        for i in range(100)
    ]
    for measured in zip(*draws):  # precision is about 0.6, recall 0.9
        spread = torch.tensor([draw.value for draw in measured]).std().item()
        error = torch.tensor([draw.error for draw in measured]).square().mean().sqrt().item()
        assert 1.05 * (1 - 3 * 0.07) < error / spread < 2.1 * (1 + 3 * 0.07)


def test_balls_reach_to_the_kth_neighbour():
    # 0, 1, ..., 63: the k-th neighbour of the last is k away, and no other ball reaches beyond 63 + k
    line = torch.arange(64.0)[:, None]
    for k in (1, 3):
        judged = torch.linspace(63 + k - 0.5, 63 + k + 0.5, 64)[:, None]
        precision, _ = precision_recall(line, judged, k=k)
        assert precision.value == 0.5


def test_collapsed_sets_have_no_recall():
    x = clusters(0)
    precision, recall = precision_recall(x, x[:1].expand(64, 2))
    assert precision.value == 1
    assert recall.value == pytest.approx(1 / 64)  # the one image that is repeated, though its ball has no radius


def test_nearest_neighbours_finds_copies_and_their_places():
    training = gaussian(200, 30, seed=1) + 1000  # far from 0, where rounding is large
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:50]
    found = nearest_neighbours(training[order], training)
    assert torch.equal(found.indices[:, 0], order)
    assert not found.distances.any()


def test_nearest_neighbours_are_sorted_by_their_distance():
    found = nearest_neighbours(
        torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0], [9.0, 2.0]]), k=2
    )
    assert found.indices.tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(found.distances, torch.tensor([[1, 5], [2, 52**0.5]], dtype=torch.float64))


def test_chunks_change_nothing(monkeypatch):
    real, generated = gaussian(70, 4, seed=1), gaussian(80, 4, seed=2, mean=0.3)
    whole = precision_recall(real, generated)
    monkeypatch.setattr(generation_metrics, "LARGEST_CHUNK", 7 * 80)
    assert precision_recall(real, generated) == whole


class Parts:
    """Rows that note how many of them are read at once."""

    def __init__(self, rows):
        self.rows, self.shape, self.sizes = rows, rows.shape, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, part):
        self.sizes.append(len(self.rows[part]))
        return self.rows[part]


@pytest.mark.parametrize("shape", [(4,), (3, 8, 8)])  # bounded by distances, and by values
@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize("at_once", [7, 40])  # generated images of one pass; with 40, all
def test_nearest_neighbours_in_parts_of_both_sides_are_those_of_the_whole(shape, k, at_once, monkeypatch):
    """The reference takes differences in float64."""
    width = math.prod(shape)
    training, generated = gaussian(150, width, seed=1), gaussian(40, width, seed=2, mean=0.3)
    generated[11] = training[140]
    distances = torch.cdist(generated, training, compute_mode="donot_use_mm_for_euclid_dist")
    expected = distances.topk(k, dim=1, largest=False)
    monkeypatch.setattr(generation_metrics, "LARGEST_CHUNK", 7 * max(width, at_once))
    monkeypatch.setattr(generation_metrics, "LARGEST_MATRIX", at_once * width)
    parts = [Parts(x.unflatten(1, shape).float().double()) for x in (generated, training)]
    found = nearest_neighbours(*parts, k=k)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.distances, expected.values, atol=1e-5, rtol=1e-5)
    assert found.distances[11, 0] == 0
    assert (max(parts[0].sizes), max(parts[1].sizes)) == (at_once, 7)
    passes = -(-40 // at_once)
    assert sum(parts[1].sizes) == 7 + 150 * passes + 40 * k  # the centre, the passes, and the nearest of each again
    again = nearest_neighbours(*parts, k=k)
    assert torch.equal(again.distances, found.distances)


def test_nearest_neighbours_refuses_images_of_other_sizes():
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 8, 8\) and \(5, 3, 4, 4\).*images of one size"):
        nearest_neighbours(torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4))


def test_the_same_seed_gives_the_same_scores_and_another_seed_another_error():
    real, generated = gaussian(100, 4, seed=1), gaussian(100, 4, seed=2, mean=0.3)
    for measure in (frechet_distance, kernel_distance, lambda *x, seed: precision_recall(*x, seed=seed)[0]):
        first, second, other = (measure(real, generated, seed=seed) for seed in (0, 0, 1))
        assert first == second
        assert first.error != other.error
        assert math.isfinite(first.error)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, precision_recall])
def test_meaningless_features_are_refused(measure):
    enough, few = gaussian(64, 4, seed=1), gaussian(63, 4, seed=2)
    with pytest.raises(ValueError, match="63 generated images, but fewer than 64"):
        measure(enough, few)
    with pytest.raises(ValueError, match="63 real images"):
        measure(few, enough)
    with pytest.raises(ValueError, match=r"shapes \(64, 4\) and \(64, 3\).*one feature network"):
        measure(enough, enough[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        measure(enough, enough / 0)


@pytest.mark.parametrize("k", [0, 32])
def test_precision_recall_refuses_other_ks(k):
    with pytest.raises(ValueError, match=f"k is {k}, but must be in 1..31"):
        precision_recall(gaussian(64, 2, seed=1), gaussian(64, 2, seed=2), k=k)


@pytest.mark.parametrize("k", [0, 6])
def test_nearest_neighbours_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match=f"k is {k}, but must be in 1..5, the number of training images"):
        nearest_neighbours(gaussian(3, 2, seed=1), gaussian(5, 2, seed=2), k=k)
