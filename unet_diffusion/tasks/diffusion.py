"""Learning to predict noise."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import SamplerName, best_sampling
from unet_diffusion.diffusion.objectives import noise_prediction_loss
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.images.conversion import fits_stock_pipelines, has_png
from unet_diffusion.images.figures import array_images, grid, save_image
from unet_diffusion.images.no_class import NO_LABEL
from unet_diffusion.network.config import needs_class
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_generator, keyed_seed, standard_normal
from unet_diffusion.saved_index import saved_section
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.training.accelerator import RunContext, sum_over_processes
from unet_diffusion.training.model_cards import Card, parameters, size
from unet_diffusion.training.run_folder import current_names
from unet_diffusion.training.task import Task
from unet_diffusion.unet import UNet
from unet_diffusion.unused_options import without_unused

USE = """
```python
import torch
import unet_diffusion
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{name}")  # this folder
pipe(num_inference_steps=TIMESTEPS, generator=torch.manual_seed(0)).images[0].save("sample.png")
```

In STEPS steps of a faster sampler: `unet-diffusion sample --run {name}`.

Load the folder with `DDPMPipeline`, which `DiffusionPipeline` finds by itself, or with `ImageGenerationPipeline` from
`unet_diffusion.pipelines`, which also takes classes, guidance and any scheduler. The network alone is
`unet_diffusion.UNet.from_pretrained("{name}/unet")`; `UNet2DModel.from_pretrained` refuses it. Make another scheduler
from the one of this folder, which says what the network predicts: `DDIMScheduler.from_config(pipe.scheduler.config)`.
"""
OWN_USE = """
```python
import torch
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.pipelines import ImageGenerationPipeline

pipe = ImageGenerationPipeline.from_pretrained("{name}")  # this folder
pipe.scheduler = sampler("SAMPLER", pipe.scheduler)
CALL
```

or `unet-diffusion sample --run {name}LABELS`.

Load the folder with this class. `DDPMPipeline`, which `DiffusionPipeline` finds by itself, does not suit this run:
REASON. The network alone is `unet_diffusion.UNet.from_pretrained("{name}/unet")`.
"""
NEEDS_CLASS = "it passes no class, which this network needs"
OTHER_VALUES = "it gives images of 8 bits from 0 to 255, with 1, 3 or 4 channels"


def saved_objective(run: Path, unet: UNet, scheduler: DDPMScheduler) -> DiffusionConfig:
    """Returns the objective that a saved noise predictor was trained for.

    It is read from the `config.json` of a run. In the folder of a pipeline alone, it follows from the network and the
    scheduler, and the timesteps get the default weights.
    """
    saved = saved_section(run, "diffusion")
    if saved is not None:
        return DiffusionConfig(**without_unused(current_names(saved)))
    return DiffusionConfig(
        prediction_type=scheduler.config.prediction_type,
        beta_schedule=scheduler.config.beta_schedule,
        zero_terminal_snr=scheduler.config.rescale_betas_zero_snr,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        class_conditional=unet.config.num_class_embeds is not None,
        label_dropout=unet.config.label_dropout,
    )


class DiffusionTask(Task):
    """Noise prediction on images, for `unet_diffusion.training.trainer.Trainer`.

    The last weights are exported, since the validation loss says little about the images.

    Args:
        unet: the network; its segmentation head, if it has one, is frozen.
        data: images to learn from and held-out ones.
        config: the objective.
        num_workers: processes that load images ahead.
        scheduler: the scheduler of an earlier run with this objective; None makes one from `config`.

    Raises:
        ValueError: the network has no noise head, other channels out than in, no timestep embedding or unpadded
            convolutions, or it has classes while the config is not class-conditional, or the other way round.
    """

    few_steps: int | None = None  # the largest number of steps that the network is tuned for
    stock_use = USE  # of a card, with a stock pipeline
    curves = {
        "loss": ("loss", "validation_loss"),
        "learning rate": ("learning_rate",),
        "images per second": ("images_per_second",),
    }

    def __init__(
        self,
        unet: UNet,
        data: ImageSets,
        config: DiffusionConfig,
        num_workers: int = 0,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        self.network = unet.to_diffusion()
        for head in (unet.segmentation_head, unet.instance_head):
            if head is not None:
                head.requires_grad_(False)
        self.data, self.train, self.config, self.num_workers = data, data.train, config, num_workers
        self.pixel_range, self.class_names = data.train.pixel_range, data.train.class_names
        self.scheduler = config.make_scheduler() if scheduler is None else scheduler
        self.optimizer = "adamw" if config.recipe == "ddpm" else "muon"
        unet.register_to_config(prediction_type=self.scheduler.config.prediction_type)
        self.check_network(unet)

    def check_network(self, unet: UNet) -> None:
        """Raises a ValueError if a network cannot generate, or has classes where none are learnt, or the reverse."""
        self.pipeline(unet)
        classes, conditional = unet.config.num_class_embeds, self.config.class_conditional
        if conditional != (classes is not None):
            raise ValueError(
                f"class_conditional is {conditional}, but num_class_embeds of the network is {classes}; set "
                "class_conditional for a network with classes, and only for one."
            )

    def loss(self, network: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """Returns the weighted noise-prediction loss for stored images `image` (B, C, H, W) and classes `label` (B,).

        Each sample's generator draws its timestep, then its noise, then whether its label is dropped.
        """
        return self._loss(network, *self.drawn(batch, generators))

    def drawn(
        self, batch: dict[str, Tensor], generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Returns clean images, noise, timesteps, labels and the condition; the timesteps are on the CPU."""
        clean = self.pixel_range.to_model(batch["image"])
        timesteps = self._timesteps(generators)
        noise = standard_normal(clean.shape[1:], generators, clean.device)
        labels = None
        if self.config.class_conditional:
            draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
            dropped = (draws < self.config.label_dropout).to(clean.device, non_blocking=True)
            labels = self._labels(batch["label"], dropped)
        return clean, noise, timesteps, labels, self.condition(clean, generators)

    def _loss(
        self,
        network: nn.Module,
        clean: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        condition: Tensor | None,
    ) -> Tensor:
        """Returns the weighted loss; noise and timesteps may be on the CPU."""
        noise, timesteps = (x.to(clean.device, non_blocking=True) for x in (noise, timesteps))
        gamma = self.config.min_snr_gamma
        assert not isinstance(gamma, str)  # "auto", which the config has replaced
        return noise_prediction_loss(network, self.scheduler, clean, noise, timesteps, labels, gamma, condition)

    def condition(self, clean: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor | None:
        """Returns the condition that the network sees beside noisy images (B, C, H, W) in [-1, 1]; here there is none.

        In training there is a generator for each image; in validation there are none, so that nothing is random.
        """
        return None

    def describe(self, context: RunContext, step: int, generators: list[torch.Generator]) -> str:
        """Describes a step of this process: its timesteps and its images."""
        timesteps = ", ".join(str(timestep) for timestep in self._timesteps(generators).tolist())
        return f"timesteps {timesteps}; {super().describe(context, step, generators)}"

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        """Draws one timestep from each generator, int64 (B,); it is the generator's first number."""
        last = self.config.num_train_timesteps
        return torch.stack([torch.randint(last, (), generator=generator) for generator in generators])

    def validate(self, network: UNet, accelerator: Accelerator) -> dict[str, float]:
        """Returns the loss on held-out images, at evenly spread timesteps and with noise that is always the same."""
        images = self.data.validation
        if images is None:
            return {}
        count = min(len(images), self.config.validation_images)
        total = 0.0
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        for indices in (mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)):
            batch = to_batch([images[index] for index in indices])
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            clean = self.pixel_range.to_model(batch["image"])
            noise = [torch.randn(clean.shape[1:], generator=keyed_generator(0, "validation", i)) for i in indices]
            timesteps = [int((index + 0.5) / count * self.config.num_train_timesteps) for index in indices]
            labels = self._labels(batch["label"]) if self.config.class_conditional else None
            drawn = (torch.stack(noise), torch.tensor(timesteps))
            total += len(indices) * self._loss(network, clean, *drawn, labels, self.condition(clean)).item()
        return {"validation_loss": sum_over_processes(accelerator, total) / count}

    def _labels(self, labels: Tensor, dropped: Tensor | bool = False) -> Tensor:
        """Returns class indices (B,) with the null class where a label is dropped or missing."""
        null = torch.full_like(labels, self.network.config.num_class_embeds)
        return torch.where((labels == NO_LABEL) | dropped, null, labels)

    def pipeline(self, unet: UNet) -> DiffusionPipeline:
        """Returns the pipeline that a run saves."""
        names = list(self.class_names) if self.config.class_conditional and self.class_names else None
        pixel_range = self.pixel_range.to_dict()
        pipe = ImageGenerationPipeline(unet, self.scheduler, pixel_range, names, few_steps=self.few_steps)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def sampling(self) -> tuple[SamplerName, int]:
        """The sampler of previews and its number of steps, as they suit the network best."""
        config = self.scheduler.config
        return best_sampling(config.prediction_type, self.few_steps, config.num_train_timesteps)

    @property
    def caption(self) -> str:
        """The caption of `samples.png`."""
        name, steps = self.sampling
        return f"Samples, {steps} steps of `{name}`"

    def sample(self, unet: UNet, count: int, steps: int | None = None) -> list[Image.Image]:
        """Generates images, from the same noise in every call; by default in as many steps as the network needs."""
        pipe, (name, enough) = self.pipeline(unet), self.sampling
        pipe.scheduler = sampler(name, pipe.scheduler)
        classes = unet.config.num_class_embeds
        (images,) = pipe(
            batch_size=count,
            num_inference_steps=steps or enough,
            class_labels=[i % classes for i in range(count)] if self.config.class_conditional else None,
            generator=[torch.Generator(unet.device).manual_seed(keyed_seed(0, "preview", i)) for i in range(count)],
            output_type="np",
            return_dict=False,
            max_batch=self.batch_size,
        )
        return array_images(images)

    def preview(self, network: UNet, path: Path) -> None:
        """Writes a grid of generated images."""
        save_image(grid(self.sample(network, self.config.preview_images)), path)

    def save(self, network: UNet, folder: Path) -> None:
        """Writes the pipeline and `samples.png`."""
        self.pipeline(network).save_pretrained(folder)
        self.preview(network, folder / "samples.png")

    def card(self, network: UNet) -> Card:
        """Returns the card of a noise predictor."""
        summary = (
            f"A U-Net with {parameters(network)} parameters that generates images of {size(network)} pixels with "
            f"{network.config.in_channels} channel(s), trained as a noise predictor (DDPM) with {{version}}."
        )
        return Card("unconditional-image-generation", summary, {"samples.png": self.caption}, self.use(network))

    def use(self, network: UNet) -> str:
        """Returns text on how to generate images with the run, for its card: with a stock pipeline where one fits."""
        name, steps, with_class = *self.sampling, needs_class(network.config)
        if not with_class and fits_stock_pipelines(network.config.in_channels, self.pixel_range):
            timesteps = str(self.scheduler.config.num_train_timesteps)
            return self.stock_use.replace("TIMESTEPS", timesteps).replace("STEPS", str(steps))
        arguments = f"num_inference_steps={steps}, generator=torch.manual_seed(0)"
        if with_class:
            arguments += ", class_labels=0"
        call = f'pipe({arguments}).images[0].save("sample.png")'
        if not has_png(network.config.in_channels, self.pixel_range):
            call = f'images = pipe({arguments}, output_type="stored").images  # (1, C, H, W), values as in the files'
        label = shlex.quote(self.class_names[0]) if self.class_names else "0"
        return (
            OWN_USE.replace("SAMPLER", name)
            .replace("CALL", call)
            .replace("LABELS", f" --class-labels {label}" if with_class else "")
            .replace("REASON", NEEDS_CLASS if with_class else OTHER_VALUES)
        )
