"""Class probabilities of images of any size, averaged over turns and noisy versions of the image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.checks import is_count, require
from unet_diffusion.images.pixel_range import PixelRange
from unet_diffusion.network.config import Precision
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.network.precision import autocast, check_finite
from unet_diffusion.network.tiling import LENGTH, MEMORY, WHOLE, Read, Tiling, noise_window, tiled
from unet_diffusion.unet import UNet

CLASSIFIER_MAPS = 4  # float32 maps of the first hidden width that exist at once in a pixel classifier
CLASSIFIER_SEED = 0  # of the noise for a pixel classifier: the same for every image and call

Turn = tuple[int, bool]  # quarter turns, and whether the image is mirrored after them
TURNS: tuple[Turn, ...] = tuple((quarters, mirror) for quarters in range(4) for mirror in (False, True))


@dataclass(frozen=True)
class Segmenter:
    """A network, and the versions of the image whose probabilities are averaged for one mask.

    With a classifier, the levels are its timesteps, and it reads the network's features at all of them. Without one,
    the probabilities of the segmentation head at the levels are averaged.
    """

    unet: UNet
    pixel_range: PixelRange
    tiling: Tiling
    device: torch.device
    turns: tuple[Turn, ...]
    scheduler: SchedulerMixin | None  # its `add_noise` makes the noisy versions; None without levels
    levels: tuple[int, ...]  # timesteps of the noisy versions; empty for the clean image at the network's own timestep
    classifier: PixelClassifier | None
    precision: Precision = "no"  # in which the networks compute

    def seeds(self, count: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> list[int]:
        """Returns a noise seed for each of `count` images: from the generator, or always the same for a classifier.

        A sequence must hold one generator per image.
        """
        if self.classifier is not None:
            return [CLASSIFIER_SEED] * count
        if not self.levels:
            return []
        if isinstance(generator, Sequence):
            return [self.seeds(1, own)[0] for own in generator]
        device = None if generator is None else generator.device
        return torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()

    def regions(
        self, read_stored: Read, size: tuple[int, int], seeds: list[int], window_done: Callable[[], Any]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Segments images of one size (H, W) part by part, given the seed of each image's noise.

        `read_stored` gives stored values; `window_done` is called after each window.

        Yields:
            Rows, columns and float32 probabilities (B, K, rows, columns).

        Raises:
            ValueError: the network overflows, so probabilities are not finite.
        """
        for rows, columns, maps in self._maps(read_stored, size, seeds, window_done):
            yield rows, columns, maps[:, : self.num_classes]

    def regions_with_objects(
        self, read_stored: Read, size: tuple[int, int], seeds: list[int], window_done: Callable[[], Any]
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Segments images as `regions` does, with a network that learnt instances.

        Boundary and distance are averaged over windows, turns and levels as the probabilities are.

        Yields:
            Rows, columns and, in float32, the probabilities (B, K, rows, columns) of the classes, the probability
            (B, rows, columns) of the boundary of an object, and the distance (B, rows, columns) to the nearest pixel
            outside the object, as a share of its largest value in the object: about 0 to 1, but not limited to it.

        Raises:
            ValueError: the masks come from a network or a classifier that has not learnt instances, or the network
                overflows.
        """
        if not self.has_objects:
            raise ValueError(
                "objects were asked for, but this network gives classes alone; train it with instances=True."
            )
        for rows, columns, maps in self._maps(read_stored, size, seeds, window_done):
            yield rows, columns, maps[:, : self.num_classes], maps[:, -2], maps[:, -1]

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return (self.unet if self.classifier is None else self.classifier).config.num_classes

    @property
    def has_objects(self) -> bool:
        """Returns whether `regions_with_objects` can be used."""
        return self.classifier is None and bool(self.unet.config.get("instances"))

    def _maps(
        self, read_stored: Read, size: tuple[int, int], seeds: list[int], window_done: Callable[[], Any]
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields as `regions` does; if the network has boundary and distance, they are two further channels.

        Raises a ValueError if they are NaN or infinite, since the largest of such scores would look like a class.
        """
        channels = self.unet.config.in_channels

        def read(rows: slice, columns: slice) -> Tensor:
            """Returns the clean images and, in further channels, the noise of each version."""
            clean = self.pixel_range.to_model(read_stored(rows, columns).to(self.device))
            noises = [
                torch.stack([noise_window(seed, draw, channels, rows, columns) for seed in seeds]).to(self.device)
                for draw in range(len(self.levels))
            ]
            return torch.cat([clean, *noises], dim=1)

        def predict(window: Tensor) -> Tensor:
            clean, *noises = window.split(channels, dim=1)
            maps = self._averaged(clean, noises)
            window_done()
            return maps

        for rows, columns, maps in tiled(predict, read, size, self.tiling):
            check_finite("the scores of the classes", maps)
            yield rows, columns, maps

    def _averaged(self, clean: Tensor, noises: list[Tensor]) -> Tensor:
        """Returns the mean maps (B, K or K + 2, h, w) of a window (B, C, h, w) in [-1, 1] over its noisy versions."""
        total, count = torch.zeros((), device=clean.device), 0
        for turn in self.turns:
            for logits in self._logits(turned(clean, turn), [turned(noise, turn) for noise in noises]):
                total, count = total + turned_back(self._activated(logits.float()), turn), count + 1
        return total / count

    def _activated(self, logits: Tensor) -> Tensor:
        """Turns scores (B, K, h, w) into probabilities and, if there are two more channels, boundary and distance."""
        if not self.has_objects:
            return logits.softmax(dim=1)
        classes, boundary, distance = logits.split((self.num_classes, 1, 1), dim=1)
        return torch.cat([classes.softmax(dim=1), boundary.sigmoid(), distance], dim=1)

    def _logits(self, clean: Tensor, noises: list[Tensor]) -> Iterator[Tensor]:
        """Yields the scores of the classifier, or those of the segmentation head for each noisy version."""
        if self.classifier is not None:
            features: Iterable[Sequence[Tensor]]
            features = self.classifier.features(self.unet, self.scheduler, clean, noises)
            if self.unet.dtype != self.classifier.dtype:
                features = map(self._as_classified, features)
            with autocast(clean.device, self.precision):  # left before each yield, since the caller would be in it too
                scores = self.classifier(features, clean.shape[2:])
            yield scores
            return
        versions: list[tuple[int | None, Tensor]] = [(None, clean)]
        if self.levels:
            assert self.scheduler is not None  # as `check_levels` ensures
            steps = [torch.full((len(clean),), level, device=clean.device) for level in self.levels]
            noisy = [self.scheduler.add_noise(clean, noise, step) for noise, step in zip(noises, steps)]
            versions = list(zip(self.levels, noisy))
        for timestep, images in versions:
            with autocast(clean.device, self.precision):
                scores = self.unet(channels_last(images.to(self.unet.dtype)), timestep, head="segmentation").logits
            yield scores

    def _as_classified(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Converts the network's maps of one timestep to the dtype that the classifier computes in."""
        assert self.classifier is not None
        return [each.to(self.classifier.dtype) for each in maps]


def tiling_for_classifier(tiling: Tiling, classifier: PixelClassifier) -> Tiling:
    """Limits a network's tiling to windows and whole images that are small enough for a pixel classifier too.

    The context stays the same. In upsampling, an output pixel reads neighbouring pixels of each map. But the output of
    the network reads these too, through the two or more 3x3 convolutions of every finer stage.
    """
    bytes_per_pixel = 4 * CLASSIFIER_MAPS * classifier.config.hidden[0]
    side = max(int((MEMORY / bytes_per_pixel) ** 0.5), LENGTH * tiling.shared)
    tile = max(min(tiling.tile, side - tiling.shared) // tiling.stride, 1) * tiling.stride
    whole = min(tiling.whole, WHOLE // bytes_per_pixel)
    return replace(tiling, tile=tile, ramp=min(tiling.ramp, tile // 4), whole=whole)


def check_levels(unet: UNet, scheduler: SchedulerMixin | None, num_draws: int, timesteps: Sequence[int] | None) -> None:
    """Raises a ValueError unless a network with a segmentation head can segment noisy images at these timesteps."""
    require(is_count(num_draws), "num_draws", num_draws, "must be an integer of at least 1")
    if timesteps is None:
        if num_draws > 1:
            raise ValueError(f"num_draws is {num_draws}, but noise is only added at timesteps; pass timesteps.")
        return
    if scheduler is None or not hasattr(scheduler, "add_noise"):
        raise ValueError(
            "timesteps were given, but the pipeline has no scheduler that adds noise; "
            "build it with the scheduler of the training, or leave timesteps out."
        )
    if unet.config.get("time_embedding", "sinusoidal") is None:
        raise ValueError("timesteps were given, but the network takes none (time_embedding is None); leave them out.")
    limit = scheduler.config.num_train_timesteps
    valid = isinstance(timesteps, Sequence) and len(timesteps) > 0
    if not valid or not all(is_count(t, 0) and t < limit for t in timesteps):
        raise ValueError(
            f"timesteps are {timesteps!r}, but must be a list of one or more integers from 0 to {limit - 1}."
        )


def check_evaluation_mode(unet: nn.Module) -> None:
    """Raises a ValueError if the network has layers that, in its current mode, are random or learn."""
    for module in unet.modules():
        if module.training and (
            isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.Dropout) and module.p > 0)
        ):
            raise ValueError(
                f"the network is in training mode, where its {type(module).__name__} layers are random or learn; "
                "call pipe.unet.eval() first."
            )


def turned(images: Tensor, turn: Turn) -> Tensor:
    """Rotates images (..., H, W) by quarter turns, then mirrors them if the turn says so."""
    quarters, mirror = turn
    images = images.rot90(quarters, dims=(-2, -1))
    return images.flip(-1) if mirror else images


def turned_back(images: Tensor, turn: Turn) -> Tensor:
    """Undoes `turned`."""
    quarters, mirror = turn
    return (images.flip(-1) if mirror else images).rot90(-quarters, dims=(-2, -1))
