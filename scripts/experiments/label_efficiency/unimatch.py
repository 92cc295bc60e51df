"""UniMatch (Yang et al. 2023, CVPR, arXiv 2208.09910) on our network, as its authors train on medical images.

The prediction for a weakly varied image serves as the mask of two strongly varied versions, in which a box may come
from another image (CutMix), and of the same image with half of the channels of all encoder maps dropped. Where the
prediction is not sure, nothing is learnt. What is theirs are the views of images without masks, the threshold, the
losses and their weights. Network, optimizer, learning rate, moving average, steps and the augmentation of images with
masks are those of the other methods. Their network has dropout and ours none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor, nn

from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.images.no_class import IGNORE_INDEX
from unet_diffusion.tasks.self_training import SelfTrainingTask
from unet_diffusion.training.accelerator import RunContext
from unet_diffusion.training.batches import Batches, other_order, training_batches

CONFIDENCE = 0.95
TURNED, ROTATED = 0.5, 0.25  # shares of the images: mirrored and turned by 0, 90, 180 or 270 degrees; rotated freely
ANGLE = 20.0  # largest free rotation to either side, in degrees
JITTER, HUE, JITTERED = 0.5, 0.25, 0.8  # brightness, contrast and saturation; share of a turn; share of the images
BLUR, BLURRED = (0.1, 2.0), 0.5  # standard deviations in pixels, share of the images
BOX_AREA, BOX_RATIO, MIXED = (0.02, 0.4), (0.3, 1 / 0.3), 0.5  # of the image, height to width, share of the images
DROPPED = 0.5  # of the channels
SMOOTH = 1e-5  # added to both sides of the fraction of `pooled_dice`
VALUES = {  # in the configuration of a run
    **{
        "confidence": CONFIDENCE,
        "turned": TURNED,
        "rotated": ROTATED,
        "angle": ANGLE,
        "jitter": (JITTER, HUE, JITTERED),
    },
    **{"blur": (*BLUR, BLURRED), "box": (*BOX_AREA, *BOX_RATIO, MIXED), "dropped": DROPPED, "dice": "pooled, squared"},
}
FIRST, SECOND = "first_image", "second_image"  # in a batch: images without masks, and those that boxes come from


class UniMatchTask(SelfTrainingTask):
    """Learns masks with consistency between weak, strong and perturbed views. Arguments of `SelfTrainingTask`."""

    def batches(self, context: RunContext, start_step: int) -> Batches:
        """Yields labelled batches with two batches of images without masks, from the first step on."""
        labelled = super(SelfTrainingTask, self).batches(context, start_step)
        streams = [
            training_batches(self.images, other_order(context, f"unimatch {name}"), start_step, self.num_workers)
            for name in (FIRST, SECOND)
        ]
        for batch, first, second in zip(labelled, *streams):
            yield batch | {FIRST: first["image"], SECOND: second["image"]}

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> dict[str, Tensor]:
        """Returns half of the sum of the loss of the masks and of 0.5 times those of strong views and of features."""
        assert self.augmentation is not None
        labelled_images = self.pixel_range.to_model(batch["image"])
        images, masks, *_ = augment(labelled_images, batch["mask"], self.augmentation, generators)
        views = [self._weak(self.pixel_range.to_model(batch[name]), generators) for name in (FIRST, SECOND)]
        (first, outside), (second, outside_second) = views

        with torch.no_grad():
            network.eval()
            of_second = pseudo_masks(self.class_logits(network, second, generators), outside_second)
            network.train()
        with dropped_features(self.network, generators):
            logits = self.class_logits(network, torch.cat([images, first]), generators)
        whole, perturbed = logits.chunk(2)
        of_first = pseudo_masks(whole[len(images) :].detach(), outside)

        strong, targets = [], []
        for _ in range(2):
            boxes = torch.stack([box(generator, first.shape[-1]) for generator in generators]).to(first.device)
            strong.append(torch.where(boxes[:, None], varied(second, generators), varied(first, generators)))
            targets.append(torch.where(boxes, of_second, of_first))
        losses = [
            pooled_dice(scores, target)
            for scores, target in zip(self.class_logits(network, torch.cat(strong), generators).chunk(2), targets)
        ]
        scores = whole[: len(images)]
        labelled = (F.cross_entropy(scores, masks, ignore_index=IGNORE_INDEX) + pooled_dice(scores, masks)) / 2
        consistency, features = sum(losses) / 2, pooled_dice(perturbed[len(images) :], of_first)
        return {
            "loss": (labelled + 0.5 * consistency + 0.5 * features) / 2,
            "segmentation_loss": labelled,
            "self_training_loss": consistency,
            "sure": (of_first != IGNORE_INDEX).float().mean(),
        }

    def describe(self, context: RunContext, step: int, generators: list[torch.Generator]) -> str:
        """Describes the images with masks of a step."""
        return super(SelfTrainingTask, self).describe(context, step, generators)

    def _weak(self, images: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Returns images mirrored and turned, rotated or as they are, and masks that are ignored outside of them."""
        assert self.augmentation is not None
        off = dict.fromkeys(("elastic", "rotation", "brightness", "contrast", "gamma", "noise"), 0.0)
        inverted = AugmentationConfig(**off, flip=False, rotate90=False, scale=(1, 1), invert=self.augmentation.invert)
        views, outside = [], []
        for image, generator in zip(images, generators):
            view, mask = image[None], torch.zeros(1, *image.shape[1:], dtype=torch.int64, device=image.device)
            drawn = torch.rand((), generator=generator).item()
            if drawn < TURNED:
                turns, side = torch.randint(4, (), generator=generator), torch.randint(2, (), generator=generator)
                view = view.rot90(int(turns), (2, 3)).flip(2 + int(side))
            rotated = TURNED <= drawn < TURNED + ROTATED
            view, mask, *_ = augment(view, mask, replace(inverted, rotation=ANGLE * rotated), [generator])
            views.append(view)
            outside.append(mask)
        return torch.cat(views), torch.cat(outside)


def pooled_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice as theirs, 2 sum(p g) / (sum(p^2) + sum(g^2)): sums over the whole batch, mean over the classes.

    Args:
        logits: (B, K, H, W).
        masks: int64 (B, H, W), with `IGNORE_INDEX` where nothing is learnt.
    """
    valid = (masks != IGNORE_INDEX)[:, None]
    probabilities = logits.float().softmax(dim=1) * valid
    target = torch.zeros_like(probabilities).scatter_(1, masks[:, None].where(valid, 0), valid.float())
    over = (0, 2, 3)
    overlap = (probabilities * target).sum(over)
    sizes = probabilities.square().sum(over) + target.sum(over)
    return 1 - ((2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean()


def pseudo_masks(logits: Tensor, outside: Tensor) -> Tensor:
    """Returns the most probable classes (B, H, W), ignored where they are not sure or `outside` is ignored."""
    confidence, classes = logits.softmax(dim=1).max(dim=1)
    return classes.where((confidence >= CONFIDENCE) & (outside != IGNORE_INDEX), IGNORE_INDEX)


@contextmanager
def dropped_features(network: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Lets the decoder of a `UNet` work on all encoder maps and on copies with half of their channels dropped.

    The output has twice the batch: first the images, then the same ones with dropped channels.
    """

    def both(maps: Tensor) -> Tensor:
        kept = torch.rand(maps.shape[:2], generator=generators[0]) >= DROPPED
        return torch.cat([maps, maps * kept[..., None, None].to(maps) / (1 - DROPPED)])

    def at_stage(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, skip, embedding = arguments
        return x, both(skip), None if embedding is None else torch.cat([embedding, embedding])

    handles = [network.bridge.register_forward_hook(lambda module, arguments, maps: both(maps))]
    handles += [stage.register_forward_pre_hook(at_stage) for stage in network.decoder]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def box(generator: torch.Generator, side: int) -> Tensor:
    """Returns a box of CutMix as a bool map (side, side), which is empty in half of the cases."""
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    inside = torch.zeros(side, side, dtype=torch.bool)
    if random.random() > MIXED:
        return inside
    area = random.uniform(*BOX_AREA) * side * side
    while True:
        ratio = random.uniform(*BOX_RATIO)
        width, height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
        left, top = random.integers(0, side, 2)
        if left + width <= side and top + height <= side:
            inside[top : top + height, left : left + width] = True
            return inside


def varied(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Varies colours and sharpness of images (B, C, H, W) in [-1, 1], of one or three channels, in 8 bits as Pillow."""
    made = []
    for image, generator in zip(images, generators):
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        view = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        if random.random() < JITTERED:
            view = jittered(view, random)
        if random.random() < BLURRED:
            view = view.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR)))
        values = torch.from_numpy(np.array(view)).reshape(pixels.shape).permute(2, 0, 1).float()
        made.append(values / 127.5 - 1)
    return torch.stack(made).to(images.device)


def jittered(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Varies brightness, contrast, saturation and hue, in an order that is drawn."""
    factors = random.uniform(1 - JITTER, 1 + JITTER, 3)
    turn = int(random.uniform(-HUE, HUE) * 256)
    for step in random.permutation(4):
        if step < 3:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            image = enhance(image).enhance(factors[step])
        elif image.mode == "RGB":
            hue, *others = image.convert("HSV").split()
            shifted = Image.fromarray(np.array(hue) + np.uint8(turn % 256))
            image = Image.merge("HSV", [shifted, *others]).convert("RGB")
    return image
