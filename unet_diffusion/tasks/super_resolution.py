"""Learning to enlarge images: noise prediction by a network that sees the small image."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from unet_diffusion.data.dataset import ImageDataset
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import check_scale, check_sides
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk, with_noise
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.conversion import has_png
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.randomness import keyed_generator, standard_normal
from unet_diffusion.saved_index import saved_section
from unet_diffusion.tasks.config import DiffusionConfig, SuperResolutionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask
from unet_diffusion.training.model_cards import Card, parameters, size
from unet_diffusion.unet import UNet

USE = """
```python
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import SuperResolutionPipeline

pipe = SuperResolutionPipeline.from_pretrained("{name}")  # this folder
pipe.scheduler = sampler("SAMPLER", pipe.scheduler)
CALL
```

or `unet-diffusion upscale --run {name} --inputs SMALL`.

Load it with this class. `DiffusionPipeline.from_pretrained` looks for classes in diffusers only, and none of them
enlarges images with this network.
"""


def saved_small_images(run: Path, scale: int) -> SuperResolutionConfig:
    """Returns the options for the small images that a saved run learnt to enlarge.

    The noise that training added to these images is read from the `config.json` of the run; without that file it is the
    default.
    """
    return SuperResolutionConfig(**{**(saved_section(run, "super_resolution") or {}), "scale": scale})


class SuperResolutionTask(DiffusionTask):
    """Noise prediction beside the small image (SR3, Saharia et al. 2021), for the `Trainer`.

    The small image is made from each image of the data: shrunk, stored as in a file, and enlarged again
    (`unet_diffusion.diffusion.low_resolution`). Arguments that are not listed are those of `DiffusionTask`.

    Args:
        unet: a network with 2 C input channels and C output channels, for images of C channels.
        data: images to learn from, and held-out ones, which previews show. Without held-out images, previews show the
            images to learn from, which must then not be a stream.
        config: the objective.
        super_resolution: the scale, which is required, and the noise of the small image.

    Raises:
        ValueError: the sides are not multiples of the scale, a stream has no validation set, there are class labels, or
            the network cannot enlarge images.
    """

    def __init__(
        self,
        unet: UNet,
        data: ImageSets,
        config: DiffusionConfig,
        super_resolution: SuperResolutionConfig,
        num_workers: int = 0,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        check_scale(super_resolution.scale)
        assert super_resolution.scale is not None
        check_sides(data.train.height, data.train.width, super_resolution.scale)
        shown = data.train if data.validation is None else data.validation
        if not isinstance(shown, ImageDataset):
            raise ValueError(
                "streaming is set and no validation set is named, but previews of super-resolution show images of one; "
                "name validation_data, or leave streaming out."
            )
        if config.class_conditional:
            raise ValueError(
                "class_conditional is set, but super-resolution starts from an image, which shows what it is of; "
                "leave it out."
            )
        self.scale, self.condition_noise = super_resolution.scale, super_resolution.condition_noise
        self.shown = shown
        super().__init__(unet, data, config, num_workers, scheduler)

    def condition(self, clean: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor:
        """Returns the small versions of `clean` (B, C, H, W), enlarged; in training with noise of a random level."""
        condition = enlarged(shrunk(clean, self.scale, self.pixel_range), self.scale, self.pixel_range)
        if not generators or self.condition_noise == 0:
            return condition
        levels = torch.stack([torch.rand((), generator=generator) for generator in generators]) * self.condition_noise
        noise = standard_normal(clean.shape[1:], generators, clean.device)
        return with_noise(condition, levels.to(clean.device, non_blocking=True), noise)

    def pipeline(self, unet: UNet) -> DiffusionPipeline:
        """Returns the pipeline that a run saves; its config holds the scale."""
        pixel_range = self.pixel_range.to_dict()
        pipe = SuperResolutionPipeline(unet, self.scheduler, self.scale, pixel_range, few_steps=self.few_steps)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def caption(self) -> str:
        """The caption of `samples.png`."""
        kind, (name, steps) = "Training" if self.data.validation is None else "Held-out", self.sampling
        return f"{kind} images: small, enlarged in {steps} steps of `{name}`, original"

    def use(self, network: UNet) -> str:
        """Returns text on how to load and use the run, for its card."""
        name, steps = self.sampling
        small, call = "small.png", f'pipe("small.png", num_inference_steps={steps}).images[0].save("large.png")'
        if not has_png(self.train.channels, self.pixel_range):
            small = "small.tif"
            call = (
                f'large = pipe("small.tif", num_inference_steps={steps}, output_type="stored").images[0]  # (C, H, W)'
            )
        return USE.replace("SAMPLER", name).replace("CALL", call).replace("SMALL", small)

    def preview(self, network: UNet, path: Path) -> None:
        """Writes images (held-out ones if any) in threes: small, enlarged from a fixed noise, and original."""
        count = min(len(self.shown), self.config.preview_images)
        clean = self.pixel_range.to_model(torch.stack([self.shown[i]["image"] for i in range(count)]))
        small = shrunk(clean, self.scale, self.pixel_range)
        pipe, (name, steps) = self.pipeline(network), self.sampling
        pipe.scheduler = sampler(name, pipe.scheduler)
        generators = [keyed_generator(0, "preview", i) for i in range(count)]
        (images,) = pipe(small, steps, generators, output_type="pt", return_dict=False)
        pixels = F.interpolate(self.pixel_range.to_model(small), scale_factor=self.scale, mode="nearest")
        threes = torch.stack([pixels / 2 + 0.5, torch.stack(images).cpu(), clean / 2 + 0.5], dim=1).flatten(0, 1)
        columns = 3 * max(round((count / 3) ** 0.5), 1)
        save_image(grid(array_images(threes.permute(0, 2, 3, 1).numpy()), columns), path)

    def card(self, network: UNet) -> Card:
        """Returns the card of a network that enlarges images."""
        summary = (
            f"A U-Net with {parameters(network)} parameters that makes images with {network.config.out_channels} "
            f"channel(s) {self.scale} times larger a side. It was trained with {{version}} on images "
            f"of {size(network)} pixels, as a noise predictor that sees the small image (SR3, Saharia et al. 2021). "
            "The detail that it adds is drawn at random: it is likely, but not what was there."
        )
        return Card("image-to-image", summary, {"samples.png": self.caption}, self.use(network))
