"""Augmentation of images and masks together, on the batch and on its device, deterministic under keyed generators.

All that bends, turns by free angles or scales goes through one sampling grid, hence one interpolation, with the
paper's elastic deformation inside it; kornia's separate transforms would resample several times and lack the latter.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unet_diffusion.images.labels import IGNORE_INDEX

UNIFORM_DRAWS = 9  # two flips, quarter turns, angle, scale, brightness, contrast, gamma, noise level


@dataclass(frozen=True)
class AugmentationConfig:
    """What varies, and how far; 0, False or (1, 1) switches a part off. Every part is drawn anew for every sample."""

    elastic: float = 10.0  # standard deviation of the displacements in pixels; folds above 1/6 of the grid's spacing
    elastic_grid: int = 3  # displacement vectors per side of the image
    flip: bool = True  # mirror left-right and top-bottom, each in half of the samples
    rotate90: bool = True  # turn by 0, 90, 180 or 270 degrees; images that are not square by 0 or 180
    rotation: float = 15.0  # largest free rotation to either side, in degrees
    scale: tuple[float, float] = (0.8, 1.25)  # smallest and largest magnification, log-uniform
    brightness: float = 0.1  # largest shift, as a fraction of the value range
    contrast: float = 0.2  # largest change about the image's mean: factor between 1 / 1.2 and 1.2, log-uniform
    gamma: float = 0.2  # largest change of the exponent: between 1 / 1.2 and 1.2, log-uniform
    noise: float = 0.02  # largest standard deviation of Gaussian noise, as a fraction of the value range
    invert: float = 0.0  # share of the samples in which dark and bright change places, for objects that come as both
    colour: float = 0.0  # how far channels vary on their own, for colours that few masks do not show; 0.3 is much

    def __post_init__(self) -> None:
        for name in ("elastic", "rotation", "brightness", "contrast", "gamma", "noise", "colour"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 0 (off) or positive.")
        if self.elastic_grid < 2:
            raise ValueError(f"elastic_grid is {self.elastic_grid}, but must be at least 2; the paper's is 3.")
        if not 0 <= self.invert <= 1:
            raise ValueError(f"invert is {self.invert}, but is a share of the samples; give one from 0 (off) to 1.")
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is {self.scale}, but must be (smallest, largest) with 0 < smallest <= largest.")


class Augmented(NamedTuple):
    """Images, masks and weights of `augment`, in the shapes and types that it was given."""

    images: Tensor
    masks: Tensor
    weights: Tensor | None


def augment(
    images: Tensor,
    masks: Tensor,
    config: AugmentationConfig,
    generators: list[Generator],
    weights: Tensor | None = None,
) -> Augmented:
    """One random variation of each sample; it depends on the sample and its generator, not on the rest of the batch.

    Masks are never interpolated. What comes from outside the image is mirrored in the image, `IGNORE_INDEX` in the
    mask and 0 in the weights.

    Args:
        images: float32 (B, C, H, W) in [-1, 1]; so is the result.
        masks: int64 (B, H, W).
        config: what varies.
        generators: one CPU generator a sample, such as `keyed_generator(seed, "augmentation", epoch, index)`.
        weights: pixel weights (B, 1, H, W), such as border weights.

    Raises:
        ValueError: if the shapes or the number of generators do not fit.
    """
    check_batch(images, masks, generators, weights)
    height, width = images.shape[-2:]
    vectors = (2, config.elastic_grid, config.elastic_grid)
    # float64, so that a cosine, rounded to float32, does not depend on its place in the batch
    uniform = torch.stack([torch.rand(UNIFORM_DRAWS, generator=g, dtype=torch.float64) for g in generators])  # (B, 9)
    normal = torch.stack([torch.randn(vectors, generator=g) for g in generators])

    flips = (uniform[:, :2] < 0.5) & config.flip
    quarter_turns = (4 * uniform[:, 2]).long() * config.rotate90
    if height != width:
        quarter_turns = 2 * (quarter_turns // 2)
    moves = [(*flip, turns) for flip, turns in zip(flips.tolist(), quarter_turns.tolist())]
    images, masks = orient(images, moves), orient(masks, moves)
    weights = None if weights is None else orient(weights, moves)

    if config.elastic > 0 or config.rotation > 0 or tuple(config.scale) != (1, 1):
        angle = math.radians(config.rotation) * (2 * uniform[:, 3] - 1)
        low, high = (math.log(limit) for limit in config.scale)
        scale = torch.exp(low + (high - low) * uniform[:, 4])
        displacement = elastic_displacement(config.elastic * normal.to(images.device), (height, width))
        grid = sampling_grid(displacement, angle, scale)
        images, masks = warp_images(images, grid), warp_masks(masks, grid)
        weights = None if weights is None else warp_weights(weights, grid)

    if max(config.brightness, config.contrast, config.gamma, config.noise) > 0:
        samples = zip(images, uniform[:, 5:].tolist(), generators)
        images = torch.stack([vary_intensity(image, config, draws, generator) for image, draws, generator in samples])
    if config.colour > 0:
        images = torch.stack([vary_colours(image, config.colour, g) for image, g in zip(images, generators)])
    if config.invert > 0:
        inverted = torch.stack([torch.rand((), generator=g) for g in generators]) < config.invert
        images = torch.where(inverted.view(-1, 1, 1, 1).to(images.device), -images, images)
    return Augmented(images, masks, weights)


def orient(images: Tensor, moves: list[tuple[bool, bool, int]]) -> Tensor:
    """Mirrors and turns each image (B, ..., H, W) by (left-right, top-bottom, quarter turns).

    Apart from the grid, since whole pixels can be moved exactly.
    """
    moved = []
    for image, (left_right, top_bottom, turns) in zip(images, moves):
        sides = [side for side, mirrored in ((-1, left_right), (-2, top_bottom)) if mirrored]
        moved.append(torch.rot90(image.flip(sides), turns, dims=(-2, -1)))
    return torch.stack(moved)


def elastic_displacement(vectors: Tensor, size: tuple[int, int]) -> Tensor:
    """Smooth deformation of Ronneberger et al. 2015, section 3.1: bicubic interpolation of a coarse grid of vectors.

    Args:
        vectors: (B, 2, n, n), x and y displacements in pixels; the outer ones sit on the corner and border pixels.
        size: (H, W) of the image.

    Returns:
        Per-pixel displacements (B, 2, H, W), in pixels.
    """
    return F.interpolate(vectors, size=size, mode="bicubic", align_corners=True)


def sampling_grid(displacement: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Where each output pixel is read: displaced, then turned and scaled about the image's centre.

    Computed in pixels, so that an image that is not square is turned without shear.

    Args:
        displacement: (B, 2, H, W), x and y, in pixels.
        angle: (B,), radians, float64 on the CPU; the image turns anticlockwise as seen on screen.
        scale: (B,), magnification, likewise; above 1 the content grows.

    Returns:
        Grid (B, H, W, 2) for `grid_sample` with `align_corners=False`: -1 and 1 are the outer edges of the image.
    """
    height, width = displacement.shape[-2:]
    y = torch.arange(height, device=displacement.device, dtype=torch.float32) - (height - 1) / 2  # 0 at the centre
    x = torch.arange(width, device=displacement.device, dtype=torch.float32) - (width - 1) / 2
    x_moved = x[None, None, :] + displacement[:, 0]  # (B, H, W)
    y_moved = y[None, :, None] + displacement[:, 1]
    cosine, sine = ((f(angle) / scale).float().to(x_moved.device)[:, None, None] for f in (torch.cos, torch.sin))
    x_source = cosine * x_moved - sine * y_moved
    y_source = sine * x_moved + cosine * y_moved
    return torch.stack([2 * x_source / width, 2 * y_source / height], dim=-1)


def warp_images(images: Tensor, grid: Tensor) -> Tensor:
    """Reads images (B, C, H, W) in [-1, 1] at the grid, mirrored outside; bicubic, since bilinear blurs."""
    sampled = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return sampled.clamp(-1, 1)  # bicubic interpolation overshoots at edges


def warp_masks(masks: Tensor, grid: Tensor) -> Tensor:
    """Reads class indices (B, H, W) at the grid: the nearest pixel's, `IGNORE_INDEX` outside."""
    shifted = (masks - IGNORE_INDEX).unsqueeze(1).float()  # 0 means ignore, which is what grid_sample fills in outside
    sampled = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled.squeeze(1).to(masks.dtype) + IGNORE_INDEX


def warp_weights(weights: Tensor, grid: Tensor) -> Tensor:
    """Reads pixel weights (B, 1, H, W) at the grid: bilinear, which cannot fall below 0, and 0 outside."""
    return F.grid_sample(weights, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def vary_intensity(image: Tensor, config: AugmentationConfig, uniform: list[float], generator: Generator) -> Tensor:
    """Contrast, brightness, gamma, then noise, the same for all channels of one image.

    One image at a time, since the last bits of a power or a mean may depend on where in a batch it is computed.

    Args:
        image: (C, H, W) in [-1, 1]; so is the result.
        config: how far each may go.
        uniform: the draws of brightness, contrast, gamma and noise level, in [0, 1).
        generator: on the CPU, for the noise.
    """
    brightness, contrast, gamma, noise = uniform
    values = (image + 1) / 2  # in [0, 1], where a power is defined
    mean = values.mean(dim=-1).mean()  # by rows first: one sum over all is split by the number of threads
    factor, exponent = (1 + config.contrast) ** (2 * contrast - 1), (1 + config.gamma) ** (2 * gamma - 1)
    values = toned(values, mean, factor, config.brightness * (2 * brightness - 1), exponent)
    if config.noise > 0:
        normal = torch.randn(image.shape, generator=generator)
        values = values + config.noise * noise * normal.to(image.device)
    return (2 * values - 1).clamp(-1, 1)


def vary_colours(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Contrast, brightness and gamma, drawn for every channel; one channel alone is left as it is.

    Args:
        image: (C, H, W) in [-1, 1]; so is the result.
        strength: contrast and gamma change by factors between 1 / (1 + strength) and 1 + strength, log-uniform, and
            brightness by up to half of it, as a fraction of the value range.
        generator: on the CPU.
    """
    if len(image) == 1:
        return image
    draws = 2 * torch.rand((3, len(image), 1, 1), generator=generator) - 1
    contrast, brightness, gamma = (draws * torch.tensor([1, strength / 2, 1]).view(3, 1, 1, 1)).to(image.device)
    values = (image + 1) / 2
    mean = values.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)  # as in `vary_intensity`
    return 2 * toned(values, mean, (1 + strength) ** contrast, brightness, (1 + strength) ** gamma) - 1


def toned(values: Tensor, mean: Tensor, factor: Any, shift: Any, exponent: Any) -> Tensor:
    """Contrast about the mean, brightness, then gamma of values in [0, 1]; one number each, or one a channel."""
    return (mean + (values - mean) * factor + shift).clamp(0, 1) ** exponent


def check_batch(images: Tensor, masks: Tensor, generators: list[Generator], weights: Tensor | None) -> None:
    """Raises ValueError unless images, masks, weights and generators belong together."""
    batch, _, height, width = images.shape
    if masks.shape != (batch, height, width):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}, but images of shape {tuple(images.shape)} need masks "
            f"{(batch, height, width)}; give image and mask of the same size."
        )
    if weights is not None and weights.shape != (batch, 1, height, width):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, but must be {(batch, 1, height, width)}, one channel each."
        )
    if len(generators) != batch:
        raise ValueError(f"there are {len(generators)} generators for {batch} images; give one each.")
