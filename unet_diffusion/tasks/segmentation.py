"""Learning to segment images with masks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unet_diffusion.adapters import PixelClassifier
from unet_diffusion.checks import require
from unet_diffusion.data.masked.augmentation import augment
from unet_diffusion.data.masked.config import AugmentationConfig
from unet_diffusion.data.masked.dataset import MaskedDataset
from unet_diffusion.data.masked.sets import MaskedSets
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.images.palette import overlay
from unet_diffusion.network.config import check_segments_without_class
from unet_diffusion.network.tiling import Tiling
from unet_diffusion.pipelines.segmentation import SegmentationPipeline
from unet_diffusion.saved_index import LEFT_NOISE, TRUNK_STAYS
from unet_diffusion.segmentation.instance_maps import inner_boundary
from unet_diffusion.segmentation.losses import (
    boundary_loss,
    class_weights_from_counts,
    distance_loss,
    segmentation_loss,
)
from unet_diffusion.segmentation.metrics import SegmentationMetrics
from unet_diffusion.tasks.config import SegmentationConfig
from unet_diffusion.training.accelerator import sum_over_processes
from unet_diffusion.training.model_cards import Card, parameters
from unet_diffusion.training.task import Task
from unet_diffusion.unet import UNet
from unet_diffusion.unused_options import check_used

PREVIEW_COLUMNS = 3  # image, mask, prediction
HEAD = ("segmentation_head.", "instance_head.")
LEARN = {  # prefixes of the names of the parameters that learn, by `learn`
    "everything": ("",),
    "decoder": ("decoder.", "norm_out.", *HEAD),
    "head": HEAD,
}
PARTS = ("class_loss", "boundary_loss", "distance_loss")  # of the loss if the network learns instances
MASKS = "Images, their masks and the predictions"
NOT_HELD_OUT = "nothing was held out"
USE = """
```python
from unet_diffusion.pipelines import SegmentationPipeline

pipe = SegmentationPipeline.from_pretrained("{name}")  # this folder
pipe("image.png").masks[0].save("mask.png")
```

Load it with this class. `DiffusionPipeline.from_pretrained` looks for classes in diffusers only, and none of them gives
masks.
"""


class SegmentationTask(Task):
    """Pixel-wise classification with masks, for `unet_diffusion.training.trainer.Trainer`.

    Args:
        network: a network with a segmentation head, which becomes the active head. It gets the part that learns
            instances if the config asks for it. A noise head is frozen.
        data: images with masks, and with the object maps (`load_masked` with `instances`) if the network learns these.
        config: the loss and what learns.
        augmentation: how training images are varied; None leaves them as they are.
        scheduler: the scheduler of the DDPM run that the network comes from. It is saved with the pipeline. The
            pipeline can still generate images if the head alone learns. Otherwise the layers under the noise head
            change, and the noise head no longer fits them (`JointTask` keeps it fitting).
        num_workers: processes that load images ahead.
        noise_head: private values that are saved with the pipeline, about the noise head of the DDPM run
            (`unet_diffusion.saved_index.kept_noise_head`).

    Raises:
        ValueError: a timestep for a network without a timestep embedding, `instances` without the object maps, a
            network with instances that are not learnt, or patience without held-out images. Without held-out images
            nothing is scored: the last weights are exported, and previews show training images.
    """

    curves = {"loss": ("loss", *PARTS), "mean IoU": ("mean_iou",), "learning rate": ("learning_rate",)}
    train: MaskedDataset

    def __init__(
        self,
        network: UNet,
        data: MaskedSets,
        config: SegmentationConfig,
        augmentation: AugmentationConfig | None = None,
        scheduler: DDPMScheduler | None = None,
        num_workers: int = 0,
        noise_head: Mapping[str, Any] | None = None,
    ) -> None:
        self.train, self.validation, self.pixel_range = data.train, data.validation, data.pixel_range
        self.num_classes, self.class_names, self.palette = data.num_classes, data.class_names, data.palette
        self.config, self.augmentation, self.patience = config, augmentation, config.patience
        self.best_by = None if data.validation is None else "mean_iou"
        check_used(config, held_out=data.validation is not None, border_weights=data.train.weights is not None)
        self.scheduler, self.num_workers, self.noise_head = scheduler, num_workers, noise_head or {}
        self.class_weights = class_weights_from_counts(data.train.class_counts()) if config.balance_classes else None
        self.network = network
        if config.instances and data.object_sizes is None:
            raise ValueError(
                "instances is True, but the data come without the maps of objects; load them by "
                "load_masked(..., instances=True), or leave instances out."
            )
        self.object_sizes = data.object_sizes if config.instances else None
        self.frozen = self._prepare()

    def _prepare(self) -> list[nn.Module]:
        """Makes the network ready to learn; returns the modules in which nothing learns."""
        check_segments_without_class(self.network.config)
        network = self.network.to_segmentation(instances=self.config.instances or None)
        if network.config.get("instances") and not self.config.instances:
            raise ValueError(
                "instances is False, but the network has the part that learns them; set instances, or take it away by "
                "network.to_segmentation(instances=False)."
            )
        timestep = self.config.timestep
        if timestep is not None:
            check_used(self.config, takes_timesteps=network.time_embed is not None)
            if self.scheduler is not None:
                last = self.scheduler.config.num_train_timesteps - 1
                rule = f"must be from 0 to {last}, those of the noise predictor; leave it out for its own"
                require(0 <= timestep <= last, "timestep", timestep, rule)
            network.register_to_config(segmentation_timestep=timestep)
        if (sizes := self.object_sizes) is not None:
            network.register_to_config(object_diameter=sizes.diameter, object_min_area=sizes.min_area)
        if network.config.get("padding") == "valid":  # so that its output covers images up to their border, as in 2015
            self.train = self.train.mirrored(Tiling.of(network).margin)
        return freeze(network, LEARN[self.config.learn])

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Returns the trunk and the segmentation head, each with its share of the learning rate."""
        trunk: list[nn.Parameter] = []
        head: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                (head if name.startswith(HEAD) else trunk).append(parameter)
        return [(group, rate) for group, rate in ((trunk, self.config.trunk_rate), (head, 1.0)) if group]

    def loss(
        self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> Tensor | dict[str, Tensor]:
        """Returns the segmentation loss for stored images `image` (B, C, H, W) and masks `mask` int64 (B, H, W).

        Each sample is augmented with its own generator. Pixels may have `weights`, float32 (B, 1, H, W). If the network
        learns instances, there are `objects`, float32 (B, 2, H, W) (`object_maps`). Their boundaries are found after
        the augmentation. The loss is then the sum of three losses, which are returned beside it.
        """
        self.hold_frozen()
        images, masks = self.pixel_range.to_model(batch["image"]), batch["mask"]
        weights, objects = batch.get("weights"), batch.get("objects")
        if self.augmentation is not None:
            images, masks, weights, objects = augment(images, masks, self.augmentation, generators, weights, objects)
        logits = self.logits(network, images, generators)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)
        classes = logits[:, : self.num_classes]
        loss = segmentation_loss(classes, masks, self.config.loss, self.class_weights, weights)
        if not self.config.instances:
            return loss
        assert objects is not None  # because the data have a diameter
        boundary = boundary_loss(logits[:, -2], inner_boundary(objects[:, 0]), masks)
        distance = distance_loss(logits[:, -1], objects[:, 1], masks)
        return {"loss": loss + boundary + distance, **dict(zip(PARTS, (loss, boundary, distance)))}

    def hold_frozen(self) -> None:
        """Puts modules in which nothing learns in evaluation mode; else they would drop values and update means."""
        for module in self.frozen:
            module.eval()

    def logits(self, network: nn.Module, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Returns class scores (B, K, H, W) of images (B, C, H, W) in [-1, 1]; generators as for `loss`.

        If the network learns instances, two more channels follow: boundary and distance.
        """
        return network(images, head="segmentation", return_dict=False)[0]

    def validate(self, network: ModelMixin, accelerator: Accelerator) -> dict[str, float]:
        """Returns the scores of the held-out images, pooled over all their pixels; none without such images."""
        if self.validation is None:
            return {}
        metrics = SegmentationMetrics(self.num_classes)
        predict = self.pipeline(network).predictor()
        for index in range(accelerator.process_index, len(self.validation), accelerator.num_processes):
            item = self.validation[index]
            metrics.update(predict(item["image"])[None], item["mask"][None])
        metrics.sum_over_processes(lambda state: sum_over_processes(accelerator, state))
        scores = metrics.compute()
        return {name: scores[f"pooled/{name}"] for name in ("mean_iou", "mean_dice", "accuracy")}

    def preview(self, network: ModelMixin, path: Path) -> None:
        """Writes held-out images (training images if there are none), each beside its mask and the prediction."""
        images = self.train if self.validation is None else self.validation
        shown = []
        predict = self.pipeline(network).predictor()
        for index in range(min(self.config.preview_images, len(images))):
            item = images[index]
            pixels = self.pixel_range.to_model(item["image"])
            image = array_images((pixels / 2 + 0.5).permute(1, 2, 0)[None].numpy())[0]
            masks = (item["mask"], predict(item["image"]))
            shown += [image, *(overlay(image, mask.numpy(), 0.8, self.palette) for mask in masks)]
        rows = max(1, round((len(shown) / PREVIEW_COLUMNS) ** 0.5))
        save_image(grid(shown, columns=PREVIEW_COLUMNS * -(-len(shown) // PREVIEW_COLUMNS // rows)), path)

    def pipeline(self, network: ModelMixin) -> SegmentationPipeline:
        """Returns the pipeline that a run saves."""
        return self._pipeline_of(network)

    def _pipeline_of(self, unet: UNet, classifier: PixelClassifier | None = None) -> SegmentationPipeline:
        names = None if self.class_names is None else list(self.class_names)
        palette = None if self.palette is None else [list(colour) for colour in self.palette]
        pipe = SegmentationPipeline(unet, self.scheduler, self.pixel_range.to_dict(), names, palette, classifier)
        pipe.register_to_config(**self.noise_head)
        return pipe

    def save(self, network: ModelMixin, folder: Path) -> None:
        """Writes the pipeline and `masks.png`."""
        self.pipeline(network).save_pretrained(folder)
        self.preview(network, folder / "masks.png")

    def card(self, network: ModelMixin) -> Card:
        """Returns the card of a network that segments, or of a classifier beside a network."""
        pipe = self.pipeline(network)
        kind = f"U-Net with {parameters(pipe.unet)} parameters"
        if pipe.classifier is not None:
            kind = f"classifier with {parameters(pipe.classifier)} parameters beside a frozen {kind}"
        summary = f"A {kind} that gives every pixel one of {self.num_classes} classes, trained with {{version}}."
        summary += self.objects_learnt
        if pipe.unet.noise_head is not None:
            fits = self.config.learn in TRUNK_STAYS and self.noise_head.get(LEFT_NOISE) is None
            summary += " It still has its noise head"
            summary += "." if fits else ", which no longer fits the layers under it, so it does not generate images."
        if self.validation is None:
            summary += f" These are the last weights; {NOT_HELD_OUT}."
        return Card("image-segmentation", summary, {"masks.png": self.caption}, USE)

    @property
    def objects_learnt(self) -> str:
        """Returns a space and a sentence on the objects that the network learns; empty if it learns none."""
        if (sizes := self.object_sizes) is None:
            return ""
        return (
            f" It also learnt what tells objects apart, from objects with a median diameter of {sizes.diameter:.1f} "
            f"pixels, of which at most 1 % have fewer than {sizes.min_area} pixels."
        )

    @property
    def caption(self) -> str:
        """Returns the caption of `masks.png`; it says so if the images shown were trained on."""
        return (
            MASKS
            if self.validation is not None
            else f"Training images, their masks and the predictions; {NOT_HELD_OUT}"
        )


def freeze(network: nn.Module, learning: tuple[str, ...]) -> list[nn.Module]:
    """Freezes the noise head, and all parameters whose names do not start with one of the given prefixes.

    Returns:
        The modules in which nothing learns.
    """
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(learning) and not name.startswith("noise_head."))
    groups = [(module, list(module.parameters())) for module in network.modules()]
    return [module for module, own in groups if own and not any(parameter.requires_grad for parameter in own)]
