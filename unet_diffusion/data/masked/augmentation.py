"""Augmentation of images and masks together, on the batch and on its device, deterministic under keyed generators.

Elastic deformation, rotation by free angles and scaling share one sampling grid, and thus one interpolation. Kornia's
separate transforms would resample several times, and do not have the deformation of the paper.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.randomness import standard_normal
from unet_diffusion.segmentation.instance_maps import UNKNOWN

UNIFORM_DRAWS = 9  # two flips, quarter turns, angle, scale, brightness, contrast, gamma, noise level


class Augmented(NamedTuple):
    """Images, masks, weights and objects from `augment`, with the shapes and types of its arguments."""

    images: Tensor
    masks: Tensor
    weights: Tensor | None
    objects: Tensor | None


def augment(
    images: Tensor,
    masks: Tensor,
    config: AugmentationConfig,
    generators: list[Generator],
    weights: Tensor | None = None,
    objects: Tensor | None = None,
) -> Augmented:
    """Varies each sample at random; the result depends only on the sample and its generator, not on the batch.

    Masks and objects are never interpolated. Pixels from outside the image are mirrored in the image, `IGNORE_INDEX` in
    the mask, 0 in the weights and `UNKNOWN` in the objects.

    Args:
        images: float32 (B, C, H, W) in [-1, 1]; so is the result.
        masks: int64 (B, H, W).
        config: which variations there are, and how far they go.
        generators: one CPU generator per sample, such as `keyed_generator(seed, "augmentation", epoch, index)`.
        weights: pixel weights (B, 1, H, W), such as border weights.
        objects: further maps (B, M, H, W) that move with the mask, such as the numbers of objects.

    Raises:
        ValueError: the shapes or the number of generators do not fit.
    """
    check_batch(images, masks, generators, weights, objects)
    height, width = images.shape[-2:]
    vectors = (2, config.elastic_grid, config.elastic_grid)
    # float64, so that a cosine rounded to float32 does not depend on its place in the batch
    uniform = torch.stack([torch.rand(UNIFORM_DRAWS, generator=g, dtype=torch.float64) for g in generators])  # (B, 9)
    normal = torch.stack([torch.randn(vectors, generator=g) for g in generators])

    flips = (uniform[:, :2] < 0.5) & config.flip
    quarter_turns = (4 * uniform[:, 2]).long() * config.rotate90
    if height != width:
        quarter_turns = 2 * (quarter_turns // 2)
    moves = torch.cat([flips, quarter_turns[:, None]], dim=1)
    images, masks = orient(images, moves), orient(masks, moves)
    weights, objects = (None if each is None else orient(each, moves) for each in (weights, objects))

    elastic = config.elastic_pixels(height, width)
    if elastic > 0 or config.rotation > 0 or tuple(config.scale) != (1, 1):
        angle = math.radians(config.rotation) * (2 * uniform[:, 3] - 1)
        low, high = (math.log(limit) for limit in config.scale)
        scale = torch.exp(low + (high - low) * uniform[:, 4])
        displacement = elastic_displacement(elastic * normal.to(images.device, non_blocking=True), (height, width))
        grid = sampling_grid(displacement, angle, scale)
        images, masks = warp_images(images, grid), warp_masks(masks, grid)
        weights = None if weights is None else warp_weights(weights, grid)
        objects = None if objects is None else warp_objects(objects, grid)

    # A CPU takes one image at a time, since one fits in its cache. Besides, on a CPU the last bits of a mean or a power
    # may depend on the place in the batch.
    parts = [slice(i, i + 1) for i in range(len(images))] if images.device.type == "cpu" else [slice(None)]
    if max(config.brightness, config.contrast, config.gamma, config.noise) > 0:
        varied = [vary_intensity(images[part], config, uniform[part, 5:], generators[part]) for part in parts]
        images = torch.cat(varied)
    if config.colour > 0:
        images = torch.cat([vary_colours(images[part], config.colour, generators[part]) for part in parts])
    if config.invert > 0:
        inverted = torch.stack([torch.rand((), generator=g) for g in generators]) < config.invert
        images = torch.where(inverted.view(-1, 1, 1, 1).to(images.device, non_blocking=True), -images, images)
    return Augmented(images, masks, weights, objects)


def orient(images: Tensor, moves: Tensor) -> Tensor:
    """Mirrors and turns each image (B, ..., H, W) by its row of `moves` (B, 3): left-right, top-bottom, quarter turns.

    This does not use the grid, since whole pixels can be moved exactly. Images with the same move are moved together.
    """
    moved = torch.empty_like(images, memory_format=torch.contiguous_format)
    kinds, kind_of = moves.unique(dim=0, return_inverse=True)
    for kind, (left_right, top_bottom, turns) in enumerate(kinds.tolist()):
        chosen = (kind_of == kind).nonzero().flatten().to(images.device, non_blocking=True)
        sides = [side for side, mirrored in ((-1, left_right), (-2, top_bottom)) if mirrored]
        moved[chosen] = torch.rot90(images[chosen].flip(sides), turns, dims=(-2, -1))
    return moved


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
    """Returns the place where each output pixel is read: displaced, then turned and scaled about the image's centre.

    The grid is computed in pixels, so that an image that is not square is turned without shear.

    Args:
        displacement: (B, 2, H, W), x and y, in pixels.
        angle: (B,), radians, float64 on the CPU; the image turns anticlockwise as seen on screen.
        scale: (B,), magnification, float64 on the CPU; above 1 the content grows.

    Returns:
        Grid (B, H, W, 2) for `grid_sample` with `align_corners=False`: -1 and 1 are the outer edges of the image.
    """
    height, width = displacement.shape[-2:]
    y = torch.arange(height, device=displacement.device, dtype=torch.float32) - (height - 1) / 2  # 0 at the centre
    x = torch.arange(width, device=displacement.device, dtype=torch.float32) - (width - 1) / 2
    x_moved = x[None, None, :] + displacement[:, 0]  # (B, H, W)
    y_moved = y[None, :, None] + displacement[:, 1]
    cosine, sine = ((f(angle) / scale).float().to(x_moved.device, non_blocking=True) for f in (torch.cos, torch.sin))
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    x_source = cosine * x_moved - sine * y_moved
    y_source = sine * x_moved + cosine * y_moved
    return torch.stack([2 * x_source / width, 2 * y_source / height], dim=-1)


def warp_images(images: Tensor, grid: Tensor) -> Tensor:
    """Reads images (B, C, H, W) in [-1, 1] at the grid, mirrored outside; bicubic, since bilinear blurs."""
    sampled = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return sampled.clamp(-1, 1)  # bicubic interpolation overshoots at edges


def warp_masks(masks: Tensor, grid: Tensor) -> Tensor:
    """Reads class indices (B, H, W) at the grid: that of the nearest pixel, and `IGNORE_INDEX` outside."""
    shifted = (masks - IGNORE_INDEX).unsqueeze(1).float()  # 0 means ignore, since grid_sample fills in 0 outside
    sampled = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled.squeeze(1).to(masks.dtype) + IGNORE_INDEX


def warp_objects(objects: Tensor, grid: Tensor) -> Tensor:
    """Reads maps (B, M, H, W) at the grid: the value of the nearest pixel, and `UNKNOWN` outside."""
    return F.grid_sample(objects - UNKNOWN, grid, mode="nearest", padding_mode="zeros", align_corners=False) + UNKNOWN


def warp_weights(weights: Tensor, grid: Tensor) -> Tensor:
    """Reads pixel weights (B, 1, H, W) at the grid: bilinear, which cannot fall below 0, and 0 outside."""
    return F.grid_sample(weights, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def vary_intensity(
    images: Tensor, config: AugmentationConfig, uniform: Tensor, generators: Sequence[Generator]
) -> Tensor:
    """Varies contrast, brightness and gamma of each image, the same for all its channels, then adds noise.

    Args:
        images: (B, C, H, W) in [-1, 1]; so is the result.
        config: how far each part may go.
        uniform: the draws of brightness, contrast, gamma and noise level, (B, 4), in [0, 1), float64 on the CPU.
        generators: one per image, on the CPU, for the noise.
    """

    def per_image(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=images.dtype).view(-1, 1, 1, 1).to(images.device, non_blocking=True)

    brightness, contrast, gamma, noise = uniform.T.tolist()
    factor = per_image((1 + config.contrast) ** (2 * draw - 1) for draw in contrast)
    shift = per_image(config.brightness * (2 * draw - 1) for draw in brightness)
    exponent = per_image((1 + config.gamma) ** (2 * draw - 1) for draw in gamma)
    values = (images + 1) / 2  # in [0, 1], where a power is defined
    mean = values.mean(dim=-1).flatten(1).mean(dim=1)  # by rows first, since a long sum is split among threads
    values = toned(values, mean.view(-1, 1, 1, 1), factor, shift, exponent)
    if config.noise > 0:
        level = per_image(config.noise * draw for draw in noise)
        values = values + level * standard_normal(images.shape[1:], generators, images.device)
    return (2 * values - 1).clamp(-1, 1)


def vary_colours(images: Tensor, strength: float, generators: Sequence[Generator]) -> Tensor:
    """Varies contrast, brightness and gamma of every channel on its own; images of one channel are left as they are.

    Args:
        images: (B, C, H, W) in [-1, 1]; so is the result.
        strength: contrast and gamma change by factors between 1 / (1 + strength) and 1 + strength, log-uniform, and
            brightness by up to half of it, as a fraction of the value range.
        generators: one per image, on the CPU.
    """
    channels = images.shape[1]
    if channels == 1:
        return images
    uniform = torch.stack([torch.rand((3, channels, 1, 1), generator=generator) for generator in generators])
    draws = (2 * uniform - 1) * torch.tensor([1, strength / 2, 1]).view(3, 1, 1, 1)
    contrast, brightness, gamma = draws.to(images.device, non_blocking=True).unbind(dim=1)  # (B, C, 1, 1) each
    values = (images + 1) / 2
    mean = values.mean(dim=-1, keepdim=True).mean(dim=-2, keepdim=True)  # as in `vary_intensity`
    return 2 * toned(values, mean, (1 + strength) ** contrast, brightness, (1 + strength) ** gamma) - 1


def toned(values: Tensor, mean: Tensor, factor: Tensor, shift: Tensor, exponent: Tensor) -> Tensor:
    """Applies contrast about the mean, brightness, then gamma to values (B, C, H, W); the others (B, 1 or C, 1, 1)."""
    return (mean + (values - mean) * factor + shift).clamp(0, 1) ** exponent


def check_batch(
    images: Tensor, masks: Tensor, generators: list[Generator], weights: Tensor | None, objects: Tensor | None
) -> None:
    """Raises a ValueError unless images, masks, weights, objects and generators fit each other."""
    batch, _, height, width = images.shape
    if masks.shape != (batch, height, width):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)}, but images of shape {tuple(images.shape)} need masks "
            f"{(batch, height, width)}; give image and mask of the same size."
        )
    if weights is not None and weights.shape != (batch, 1, height, width):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, but must have {(batch, 1, height, width)}, one channel each."
        )
    if objects is not None and (len(objects), *objects.shape[2:]) != (batch, height, width):
        raise ValueError(
            f"objects have shape {tuple(objects.shape)}, but must be maps (B, M, H, W) of the size of the masks, "
            f"{(batch, height, width)}."
        )
    if len(generators) != batch:
        raise ValueError(f"there are {len(generators)} generators for {batch} images; give one per image.")
