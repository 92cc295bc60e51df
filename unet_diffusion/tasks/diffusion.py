"""Learning to predict noise: the task and its options."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import PredictionType
from unet_diffusion.diffusion.objectives import noise_prediction_loss
from unet_diffusion.diffusion.sampling import sampler
from unet_diffusion.files import merged_into
from unet_diffusion.images.figures import array_images, grid, save_curves, save_image
from unet_diffusion.images.labels import NO_LABEL
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_generator, keyed_seed
from unet_diffusion.tasks.cards import diffusion_card
from unet_diffusion.training.batches import Batches, images_of_step, training_batches
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.training.run_folder import current_names
from unet_diffusion.unet import UNet

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
RECIPES: dict[str, dict[str, Any]] = {  # Ho et al. 2020, sections 3.4 and 4
    "ddpm": {"prediction_type": "epsilon", "min_snr_gamma": None, "beta_schedule": "linear"},
}
PREVIEW_STEPS = 20  # of the fast sampler
VALIDATION_BATCH = 64  # images at once
CURVES = {
    "loss": ("loss", "validation_loss"),
    "learning rate": ("learning_rate",),
    "images per second": ("images_per_second",),
}


@dataclass
class DiffusionConfig:
    """What the network predicts, and how noise is added."""

    recipe: Literal["ddpm"] | None = None
    """"ddpm" is the classic recipe: the noise, all timesteps weighted alike, linear betas. It decides prediction_type,
    min_snr_gamma and beta_schedule; None leaves them to their own options."""
    prediction_type: PredictionType = "v_prediction"
    """"epsilon" (the noise: DDPM), "v_prediction" or "sample" (the clean image)."""
    min_snr_gamma: float | None = 5.0
    """Min-SNR weight of the timesteps; None weighs them alike, as DDPM does."""
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    """"linear" (DDPM), "scaled_linear" or "squaredcos_cap_v2" (the cosine schedule)."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2023); needs v_prediction or sample."""
    num_train_timesteps: int = 1000
    """Timesteps of the forward process."""
    class_conditional: bool = False
    """Condition on the data's class labels."""
    label_dropout: float = 0.1
    """Share of the labels replaced by "no class" in training, so that guidance works; with class_conditional."""
    validation_images: int = 256
    """Held-out images that the validation loss is measured on, each at one fixed timestep with fixed noise."""
    preview_images: int = 36
    """Images in a preview and in the model card."""

    def __post_init__(self) -> None:
        """Checks every value."""
        self._follow_recipe()
        for name, choices in (("prediction_type", get_args(PredictionType)), ("beta_schedule", get_args(BetaSchedule))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}.")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout is {self.label_dropout}, but must be from 0 up to, not including, 1.")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr is set and prediction_type is 'epsilon', but without signal the noise tells nothing "
                "of the image; use prediction_type='v_prediction'."
            )
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}, but must be above 0, or None for no weighting.")
        for name in ("num_train_timesteps", "validation_images", "preview_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1.")

    def _follow_recipe(self) -> None:
        if self.recipe is None:
            return
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe is {self.recipe!r}, but must be one of {', '.join(RECIPES)}, or None.")
        for name, value in RECIPES[self.recipe].items():
            given = getattr(self, name)
            if given not in (type(self).__dataclass_fields__[name].default, value):
                raise ValueError(
                    f"{name} is {given!r}, but the recipe {self.recipe!r} has {value!r}; give one of them."
                )
            setattr(self, name, value)

    def make_scheduler(self) -> DDPMScheduler:
        """The forward process as a diffusers scheduler, which is saved with the run."""
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_terminal_snr,
            timestep_spacing="trailing" if self.zero_terminal_snr else "leading",
        )


def saved_objective(run: Path, unet: UNet, scheduler: DDPMScheduler) -> DiffusionConfig:
    """What a saved noise predictor was trained for.

    In the folder of a run, its `config.json` says it. In that of a pipeline alone, network and scheduler do, but for
    the weighting of timesteps, which is then the default.

    Args:
        run: the folder.
        unet: its network.
        scheduler: its scheduler.
    """
    path = run / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8")).get("diffusion") if path.is_file() else None
    if saved is not None:
        return DiffusionConfig(**current_names(saved))
    return DiffusionConfig(
        prediction_type=scheduler.config.prediction_type,
        beta_schedule=scheduler.config.beta_schedule,
        zero_terminal_snr=scheduler.config.rescale_betas_zero_snr,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        class_conditional=unet.config.num_class_embeds is not None,
        label_dropout=unet.config.label_dropout,
    )


class DiffusionTask:
    """Noise prediction on images, for `unet_diffusion.training.trainer.Trainer`.

    Args:
        unet: the network; its segmentation head, if it has one, is frozen.
        data: images to learn from and held-out ones.
        config: the objective.
        num_workers: processes that load images ahead.
        scheduler: of an earlier run with this objective; None: made as `config` says.
    """

    best_by: str | None = None  # the validation loss says little about the images, so the last weights are exported
    patience: int | None = None

    def __init__(
        self,
        unet: UNet,
        data: ImageSets,
        config: DiffusionConfig,
        num_workers: int = 0,
        scheduler: DDPMScheduler | None = None,
    ) -> None:
        self.network = unet.to_diffusion()
        if unet.segmentation_head is not None:
            unet.segmentation_head.requires_grad_(False)
        self.data, self.config, self.num_workers = data, config, num_workers
        self.pixel_range, self.class_names = data.train.pixel_range, data.train.class_names
        self.scheduler = config.make_scheduler() if scheduler is None else scheduler

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All but the segmentation head, alike."""
        return [([parameter for parameter in self.network.parameters() if parameter.requires_grad], 1.0)]

    def batches(self, accelerator: Accelerator, config: TrainingConfig, start_step: int) -> Batches:
        """Micro-batches of stored images `image` (B, C, H, W) and classes `label` (B,), on the device."""
        return training_batches(self.data.train, accelerator, config, start_step, self.num_workers)

    def loss(self, unet: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """The weighted noise-prediction loss; timestep, noise and label dropout come from each sample's generator."""
        clean = self.pixel_range.to_model(batch["image"])
        timesteps = self._timesteps(generators)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in generators])
        labels = None
        if self.config.class_conditional:
            draws = torch.stack([torch.rand((), generator=generator) for generator in generators])
            labels = self._labels(batch["label"], (draws < self.config.label_dropout).to(clean.device))
        return noise_prediction_loss(
            unet,
            self.scheduler,
            clean,
            noise.to(clean.device, non_blocking=True),
            timesteps.to(clean.device, non_blocking=True),
            labels,
            self.config.min_snr_gamma,
            self.condition(clean, generators),
        )

    def condition(self, clean: Tensor, generators: Sequence[torch.Generator] = ()) -> Tensor | None:
        """What the network sees beside noisy versions of `clean` (B, C, H, W): nothing, unless a subclass says so.

        Args:
            clean: images in [-1, 1].
            generators: one for each image, where something is random in training; none in validation.
        """
        return None

    def describe(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, generators: list[torch.Generator]
    ) -> str:
        """The timesteps and the images of a step of this process."""
        timesteps = ", ".join(str(timestep) for timestep in self._timesteps(generators).tolist())
        return f"timesteps {timesteps}; {images_of_step(self.data.train, accelerator, config, step)}"

    def _timesteps(self, generators: list[torch.Generator]) -> Tensor:
        """One timestep from each generator, int64 (B,), the first number that is drawn from it."""
        last = self.config.num_train_timesteps
        return torch.stack([torch.randint(last, (), generator=generator) for generator in generators])

    def validate(self, unet: UNet, accelerator: Accelerator) -> dict[str, float]:
        """The loss on held-out images, at timesteps spread evenly over all, with noise that is always the same."""
        images = self.data.validation
        if images is None:
            return {}
        count = min(len(images), self.config.validation_images)
        total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        for indices in (mine[start : start + VALIDATION_BATCH] for start in range(0, len(mine), VALIDATION_BATCH)):
            batch = to_batch([images[index] for index in indices])
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            clean = self.pixel_range.to_model(batch["image"])
            noise = [torch.randn(clean.shape[1:], generator=keyed_generator(0, "validation", i)) for i in indices]
            timesteps = [int((index + 0.5) / count * self.config.num_train_timesteps) for index in indices]
            loss = noise_prediction_loss(
                unet,
                self.scheduler,
                clean,
                torch.stack(noise).to(clean.device),
                torch.tensor(timesteps, device=clean.device),
                self._labels(batch["label"]) if self.config.class_conditional else None,
                self.config.min_snr_gamma,
                self.condition(clean),
            )
            total += len(indices) * loss.double()
        return {"validation_loss": accelerator.reduce(total, "sum").item() / count}

    def _labels(self, labels: Tensor, dropped: Tensor | bool = False) -> Tensor:
        """Class indices (B,) with the null class where a label is dropped or missing."""
        null = torch.full_like(labels, self.network.config.num_class_embeds)
        return torch.where((labels == NO_LABEL) | dropped, null, labels)

    def pipeline(self, unet: UNet) -> DiffusionPipeline:
        """The pipeline that a run saves."""
        names = list(self.class_names) if self.config.class_conditional and self.class_names else None
        pipe = ImageGenerationPipeline(unet, self.scheduler, self.pixel_range.to_dict(), names)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, unet: UNet, count: int) -> list[Image.Image]:
        """Images that the network makes with the fast sampler; the same noise at every call."""
        pipe = self.pipeline(unet)
        pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
        labels = None
        if self.config.class_conditional:
            labels = [i % unet.config.num_class_embeds for i in range(count)]
        generators = [torch.Generator(unet.device).manual_seed(keyed_seed(0, "preview", i)) for i in range(count)]
        (images,) = pipe(
            batch_size=count,
            num_inference_steps=PREVIEW_STEPS,
            class_labels=labels,
            generator=generators,
            output_type="np",
            return_dict=False,
        )
        return array_images(images)

    def shown(self, unet: UNet) -> Image.Image:
        """What a preview shows: generated images."""
        return grid(self.sample(unet, self.config.preview_images))

    def card(self, name: str, unet: UNet, rows: list[dict[str, Any]], config: dict[str, Any]) -> str:
        """The model card; arguments as `diffusion_card` has them."""
        return diffusion_card(name, unet, rows, config)

    def preview(self, unet: UNet, path: Path) -> None:
        """A grid of what `shown` says."""
        save_image(self.shown(unet), path)

    def export(self, unet: UNet, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """The run's folder as a diffusers pipeline, with curves, a grid of samples and a model card."""
        with merged_into(folder) as aside:
            self.pipeline(unet).save_pretrained(aside)
            save_curves(rows, aside / "curves.png", CURVES)
            self.preview(unet, aside / "samples.png")
            (aside / "README.md").write_text(self.card(folder.name, unet, rows, config), encoding="utf-8")
