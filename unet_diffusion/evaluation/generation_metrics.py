"""Measures of generated images: distances between two sets of features, precision and recall, nearest neighbours.

Features are matrices (N, D) with one row per image, as from `feature_networks.features_of`. Everything is computed on
the CPU in float64. The same features and seed give the same numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from unet_diffusion.checks import require
from unet_diffusion.evaluation.rows import Rows, parts
from unet_diffusion.randomness import keyed_generator, keyed_permutation

SMALLEST_SAMPLE = 64  # below it the standard deviation of a single feature is not known to 10%: 1 / sqrt(2 (N - 1))
SUBSAMPLES = 20  # give a standard error that is itself known to about 16%: 1 / sqrt(2 (20 - 1))
LARGEST_CHUNK = 2**22  # distances, or values of rows of the reference, held at once: 32 MiB
LARGEST_MATRIX = 2**26  # values of the images whose nearest neighbours are found in one pass: 512 MiB
MOST_ROWS = 2**14  # of such images


@dataclass(frozen=True)
class Measurement:
    """A score with the facts needed to judge it; report it with the name of the feature network.

    Attributes:
        value: the score.
        error: its standard error.
        real_count: real images that were used.
        generated_count: generated images that were used.
        flag: a sentence on why the score should be read with care, or "".
    """

    value: float
    error: float
    real_count: int
    generated_count: int
    flag: str = ""


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images of each image, nearest first: `distances` float64 and `indices` int64 (N, k)."""

    distances: Tensor
    indices: Tensor


def frechet_distance(real: Tensor, generated: Tensor, *, seed: int = 0) -> Measurement:
    """Frechet distance between two sets of features taken as Gaussians (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with unbiased covariances. The distance of finite samples is too large,
    and more so for fewer images, so only distances of equal counts can be compared. The flag tells if a covariance does
    not have full rank, N <= D. The error does not cover this bias.

    Args:
        real: (N, D).
        generated: (M, D).
        seed: seed of the subsamples for the error.

    Raises:
        ValueError: a set has fewer than 64 images, the matrices have different widths, or values are not finite.
    """
    real, generated = _checked(real, generated)
    count, features = min(len(real), len(generated)), real.shape[1]
    flag = ""
    if count <= features:
        flag = (
            f"{count} images give {features} features a covariance of less than full rank, so the distance is far too "
            "large; compare it only with distances of the same counts."
        )
    return Measurement(
        value=_frechet(real, generated),
        error=standard_error(_frechet, (real, generated), seed),
        real_count=len(real),
        generated_count=len(generated),
        flag=flag,
    )


def _frechet(real: Tensor, generated: Tensor) -> float:
    """Computes the distance without a covariance and without a matrix root.

    With A^T A = S1 and B^T B = S2, the eigenvalues of S1 S2 are the squared singular values of A B^T, and
    tr (S1 S2)^(1/2) is the sum of these. This keeps its precision if the covariances are singular. It takes a fraction
    of the time that the eigenvalues of the product take, which torchmetrics computes.
    """
    (mean1, root1), (mean2, root2) = (_mean_and_root(x) for x in (real, generated))
    covariances = root1.square().sum() + root2.square().sum() - 2 * torch.linalg.svdvals(root1 @ root2.T).sum()
    return ((mean1 - mean2).square().sum() + covariances).item()


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and an R (min(N, D), D) with R^T R = the unbiased covariance."""
    mean = features.mean(dim=0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R


def kernel_distance(real: Tensor, generated: Tensor, *, seed: int = 0) -> Measurement:
    """Kernel distance, KID: MMD^2 with the kernel (x y / D + 1)^3 (Binkowski et al. 2018), by torchmetrics.

    It is the mean of the unbiased estimate (Gretton et al. 2012, eq. 3) over at least 10 subsets of at most 1000
    images. The subsets are drawn at random and share no image. So they are independent, and the standard error of their
    mean is that of the distance. The distance is unbiased at any count, so distances of different counts can be
    compared. Equal distributions give values around 0, on both sides. Both sets contribute the same number of images:
    as many of the smaller set as fill whole subsets.

    Args:
        real: (N, D).
        generated: (M, D).
        seed: seed of the subsets.

    Raises:
        ValueError: as in `frechet_distance`.
    """
    real, generated = _checked(real, generated)
    count = min(len(real), len(generated))
    size = min(1000, count // 10)
    used = count // size * size
    real_order, generated_order = (
        keyed_permutation(len(x), seed, "kernel distance", name)[:used]
        for x, name in ((real, "real"), (generated, "generated"))
    )
    subsets = zip(real[real_order].split(size), generated[generated_order].split(size))
    distances = torch.stack([poly_mmd(x, y, degree=3, gamma=None, coef=1.0) for x, y in subsets])
    return Measurement(
        value=distances.mean().item(),
        error=(distances.std() / len(distances) ** 0.5).item(),
        real_count=used,
        generated_count=used,
    )


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3, seed: int = 0) -> tuple[Measurement, Measurement]:
    """Precision and recall by nearest neighbours (Kynkaanniemi et al. 2019, eq. 1 and 2), in [0, 1].

    A set covers the balls around its images that reach to their k-th nearest neighbour in the set. Precision is the
    share of generated images that the real set covers. Recall is the share of real images that the generated set
    covers. More images make smaller balls, so only scores of equal counts can be compared, and unequal counts are
    flagged.

    Args:
        real: (N, D).
        generated: (M, D).
        k: number of neighbours, without the image itself; by default 3, as in the paper.
        seed: seed of the subsamples for the errors.

    Returns:
        Precision and recall.

    Raises:
        ValueError: k is not in 1..31; otherwise as in `frechet_distance`.
    """
    real, generated = _checked(real, generated)
    limit = SMALLEST_SAMPLE // 2
    require(1 <= k < limit, "k", k, f"must be in 1..{limit - 1}, few compared with the images; 3 is usual")
    flag = ""
    if len(real) != len(generated):
        flag = (
            f"{len(real)} real and {len(generated)} generated images: the smaller set has the larger balls, which "
            "favours one of precision and recall; use equal counts."
        )

    share = partial(_covered_share, k=k)

    def measured(*sets: Tensor) -> Measurement:
        return Measurement(share(*sets), standard_error(share, sets, seed), len(real), len(generated), flag)

    return measured(generated, real), measured(real, generated)


def _covered_share(judged: Tensor, covering: Tensor, k: int) -> float:
    """Returns the share of `judged` that lies in a ball of `covering`."""
    radii = torch.cat([chunk.kthvalue(k + 1, dim=1).values for chunk in _distances(covering, covering)])  # 1 is itself
    hits = [(chunk <= radii).any(dim=1) for chunk in _distances(judged, covering)]
    return torch.cat(hits).double().mean().item()


def nearest_neighbours(generated: Rows, training: Rows, k: int = 1) -> Neighbours:
    """Finds the training images that are nearest to each generated one, to see whether training images were memorised.

    Distances have no scale of their own: compare them with those of real images that were not trained on
    (`nearest_neighbours(held_out, training)`). Images of a generator that memorised are nearer to the training images
    than those held-out images are. Equal features have distance 0.

    Both sets are read in parts, so that neither they nor all distances need fit into memory. The training images are
    read once for as many generated ones as fit into 512 MiB.

    Args:
        generated: features (M, D), or images (M, C, H, W).
        training: the same for N training images.
        k: number of neighbours of each image.

    Raises:
        ValueError: k is not in 1..N, the sets have different widths or sizes, or values are not finite.
    """
    require(1 <= k <= len(training), "k", k, f"must be in 1..{len(training)}, the number of training images")
    if tuple(generated.shape[1:]) != tuple(training.shape[1:]):
        raise ValueError(
            f"the sets have shapes {tuple(generated.shape)} and {tuple(training.shape)}, but must be equal apart from "
            "their number; take features from one network, and images of one size."
        )
    width = math.prod(training.shape[1:])
    count = max(1, min(LARGEST_MATRIX // width, MOST_ROWS, len(generated)))
    size = max(1, LARGEST_CHUNK // max(width, count))
    centre = _matrix(training[:size]).mean(dim=0)
    found = [_nearest_of(part, training, size, centre, k) for part in parts(generated, count)]
    return Neighbours(torch.cat([x.distances for x in found]), torch.cat([x.indices for x in found]))


def _nearest_of(generated: Tensor, training: Rows, size: int, centre: Tensor, k: int) -> Neighbours:
    """Returns the nearest training images of generated ones, (m, k) each, in one pass over the training images.

    The pass finds them by squared distances |a|^2 + |b|^2 - 2 a b, from matrix products, of rows around `centre` (D,).
    The distances to those that it finds are then computed directly, so that equal rows have distance 0.
    """
    rows = _matrix(generated, copy=True).sub_(centre)
    squares = rows.norm(dim=1, keepdim=True).square()
    nearest, indices = torch.empty(len(rows), 0, dtype=torch.float64), torch.empty(len(rows), 0, dtype=torch.int64)
    for number, part in enumerate(parts(training, size)):
        reference = _matrix(part) - centre
        here = torch.addmm(squares + reference.norm(dim=1).square(), rows, reference.T, alpha=-2)
        both = torch.cat([nearest, here], dim=1)
        places = torch.arange(number * size, number * size + len(part)).expand_as(here)
        nearest, kept = both.topk(min(k, both.shape[1]), dim=1, largest=False)
        indices = torch.cat([indices, places], dim=1).gather(1, kept)
    direct = [
        (torch.cat([_matrix(training[place : place + 1]) for place in own]) - _matrix(row[None])).norm(dim=1)
        for row, own in zip(generated, indices.tolist())
    ]
    distances, order = torch.stack(direct).sort(dim=1, stable=True)
    return Neighbours(distances, indices.gather(1, order))


def _distances(rows: Tensor, reference: Tensor) -> Iterator[Tensor]:
    """Yields Euclidean distances of `rows` (M, D) to `reference` (N, D), in chunks (m, N) of bounded size."""
    centre = reference.mean(dim=0)
    for chunk in rows.split(max(1, LARGEST_CHUNK // len(reference))):
        yield _distances_between(chunk, reference, centre)


def _distances_between(rows: Tensor, reference: Tensor, centre: Tensor) -> Tensor:
    """Returns Euclidean distances (m, n) of `rows` (m, D) to `reference` (n, D), which lie around `centre` (D,).

    They come from matrix products, which leave equal rows slightly apart, so distances within the rounding error are
    set to 0.
    """
    rows, reference = rows - centre, reference - centre
    rounding = 1e-6 * torch.maximum(rows.norm(dim=1)[:, None], reference.norm(dim=1))
    distances = torch.cdist(rows, reference)
    return distances.masked_fill_(distances < rounding, 0)


def standard_error(statistic: Callable[..., float], samples: Sequence[Tensor], seed: int) -> float:
    """Estimates the standard error of a statistic of one or two sets, by a bootstrap without replacement.

    Each of `SUBSAMPLES` draws takes 9/10 of each set. The variance of subsamples of b among n images goes as 1/b - 1/n,
    that of samples of n as 1/n (Politis & Romano 1994, with the finite-population correction): 3 times less in
    deviation. The error is more likely too large than too small. A bootstrap with replacement repeats images, so a set
    looks smaller than it is and neighbours have distance 0. For statistics that depend on the count, as these do, its
    error is even larger, most of all if N < D.
    """
    draws = []
    for draw in range(SUBSAMPLES):
        generator = keyed_generator(seed, "subsample", draw)
        kept = (torch.randperm(len(x), generator=generator)[: len(x) * 9 // 10] for x in samples)
        draws.append(statistic(*(x[rows] for x, rows in zip(samples, kept))))
    return 3 * torch.tensor(draws, dtype=torch.float64).std().item()


def _checked(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as float64 on the CPU, after checking that they can be compared and are large enough."""
    real, generated = _matrices(real, generated)
    check_enough(len(real), len(generated))
    return real, generated


def check_enough(real: int, generated: int) -> None:
    """Raises a ValueError if the numbers of images are too small for the measurements of this module."""
    for name, count in (("real", real), ("generated", generated)):
        if count < SMALLEST_SAMPLE:
            raise ValueError(
                f"there are {count} {name} images, but fewer than {SMALLEST_SAMPLE} say nothing about a "
                "distribution; give more, about a thousand to see small differences."
            )


def _matrices(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as float64 on the CPU, after checking that they can be compared."""
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features have shapes {tuple(real.shape)} and {tuple(generated.shape)}, but must be (N, D) and (M, D); "
            "take both from one feature network."
        )
    return _matrix(real), _matrix(generated)


def _matrix(rows: Tensor, copy: bool = False) -> Tensor:
    """Returns features or images as a matrix (N, D), float64 on the CPU, after checking that they are finite."""
    matrix = rows.detach().to("cpu", torch.float64, copy=copy).flatten(1)
    if not matrix.isfinite().all():
        raise ValueError("features or images hold NaN or infinite values; look at the images that they come from.")
    return matrix
