"""Noise to images with any scheduler of diffusers, by class and with guidance where the network has classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from unet_diffusion.checks import class_index, is_count, is_number, plain, require
from unet_diffusion.diffusion.sampling import (
    check_classes,
    check_few_steps,
    check_has_classes,
    check_scheduler,
    check_steps,
    denoised,
    scaled_input,
    start_sampling,
)
from unet_diffusion.images.conversion import as_output, check_output_type
from unet_diffusion.network.config import Precision
from unet_diffusion.network.feature_maps import channels_last
from unet_diffusion.network.precision import autocast, check_finite, settled_precision
from unet_diffusion.pipelines.base import (
    Generators,
    PrivateArguments,
    check_label_names,
    check_noise_predictor,
    check_tuned_steps,
    generators_for,
    saved_range,
    trained_settings,
)
from unet_diffusion.unet import UNet

OUTPUT_TYPES = ("pil", "np", "pt", "stored", "latent")


@dataclass
class ImageGenerationOutput(BaseOutput):
    """The output of `ImageGenerationPipeline`: images of the type that its `output_type` asks for."""

    images: list[Image.Image] | np.ndarray | Tensor


class ImageGenerationPipeline(PrivateArguments, DiffusionPipeline):
    """Generates images from noise (Ho et al. 2020), with any scheduler whose `step` needs the prediction only.

    Examples:
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.pipelines import ImageGenerationPipeline
        >>> from unet_diffusion.diffusion.sampling import sampler

        >>> pipe = ImageGenerationPipeline(UNet.from_preset("tiny"), DDPMScheduler())
        >>> pipe.scheduler = sampler("dpm-solver++", pipe.scheduler)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> images = pipe(batch_size=2, num_inference_steps=5, generator=torch.manual_seed(0)).images
        >>> [image.size for image in images]
        [(28, 28), (28, 28)]

    Args:
        unet: a network with a noise head and a timestep embedding.
        scheduler: the sampler; `unet_diffusion.diffusion.sampling.sampler` makes one from the training's scheduler.
        pixel_range: how stored values map to [-1, 1], in the form of `PixelRange.to_dict`; None for 8-bit images.
        label_names: names of the classes to generate images of, in the order of their indices.
        trained_with: settings of the scheduler that the network was trained with; schedulers with other settings are
            refused. None takes them from `scheduler`.
        few_steps: the largest number of steps that `tune-few-steps` tuned the network for; None if it was not tuned.

    Raises:
        ValueError: the network cannot turn noise into images, the pixel range or the number of steps is invalid, or
            there is not one name per class.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin,
        pixel_range: dict | None = None,
        label_names: list[str] | None = None,
        trained_with: dict | None = None,
        few_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_noise_predictor(unet, 1, "generation needs as many channels out as in")
        saved_range(pixel_range)
        check_label_names(label_names, unet.config.get("num_class_embeds"))
        check_tuned_steps(few_steps)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            _pixel_range=plain(pixel_range),
            _label_names=plain(label_names),
            _trained_with=trained_settings(trained_with, scheduler),
            _few_steps=few_steps,
        )
        self.check_noise_settings()

    @property
    def label_names(self) -> list[str] | None:
        """Names of the class labels, in the order of their indices."""
        return self.config["_label_names"]

    @property
    def few_steps(self) -> int | None:
        """The largest number of steps that `tune-few-steps` tuned the network for; None if it was not tuned."""
        return self.config["_few_steps"]

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running batch; a callback may set `_guidance_scale` for the rest of the batch."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Runs of the network per image; with samplers such as Heun's they are more than the steps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True if the running call skips its remaining steps and batches; a callback may set `_interrupt`."""
        return self._interrupt

    def check_inputs(
        self,
        shape: tuple[int, int, int, int],
        generator: Generators,
        latents: Tensor | None,
        eta: float | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str] | None,
    ) -> None:
        """Raises a ValueError that gives the value, the rule and the fix for the first argument that is wrong."""
        channels = shape[1]
        check_output_type(output_type, OUTPUT_TYPES, channels, self.pixel_range)
        if latents is not None and not isinstance(latents, Tensor):
            raise ValueError(
                f"latents are a {type(latents).__name__}, but must be a tensor; give torch.as_tensor(...)."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but must be {shape}.")
        check_scheduler(self.scheduler, eta)
        self.check_noise_settings()
        unknown = sorted(set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}, but must be among {self._callback_tensor_inputs}."
            )

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Returns the noise that sampling starts from, float32, at the scheduler's first noise level.

        `latents` is unit noise (B, C, H, W) to use instead of drawing it.
        """
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers have none: 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        class_labels: int | str | Sequence[int | str] | np.ndarray | Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        max_batch: int = 64,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ImageGenerationPipeline", int, Any, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        mixed_precision: Precision = "no",
    ) -> ImageGenerationOutput | tuple:
        """Generates `batch_size` images.

        Args:
            batch_size: number of images.
            num_inference_steps: steps of the scheduler; about 20 for a fast solver, 1000 for plain DDPM. They must not
                be more than the timesteps of the training.
            class_labels: one class for all images, or one per image; None for no class. A class is one of
                `label_names`, or its index, an integer. A string of digits counts as an index only if the classes have
                no names.
            guidance_scale: w in uncond + w (cond - uncond), classifier-free guidance (Ho & Salimans 2022); 1 for none.
            guidance_interval: (low, high), the guided part of the schedule: 0 is its noisy beginning, 1 its end
                (Kynkaanniemi et al. 2024); None for all of it. It must hold the beginning of a step.
            height: in pixels; None for that of `unet.config.sample_size`.
            width: in pixels; None for that of `unet.config.sample_size`.
            generator: one generator, or a list or tuple with one per image, so that an image does not depend on the
                rest of its batch.
            latents: unit noise to start from, (B, C, H, W); None draws it from `generator`.
            max_batch: images in the network at once; twice that with guidance.
            eta: the noise that DDIM (eq. 16 of Song et al. 2020) or TCD adds; None for the scheduler's own default.
            output_type: "pil": a list of images (1, 3 or 4 channels); "np": float32 (B, H, W, C) in [0, 1];
                "pt": float32 (B, C, H, W) in [0, 1]; "stored": (B, C, H, W) in the data type and values of the training
                files; "latent": float32 (B, C, H, W) around [-1, 1] as the sampler leaves it.
            return_dict: whether to return an `ImageGenerationOutput`, or else a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step of each batch; returns
                the tensors to go on with, or None to change none. If it sets `pipeline._interrupt`, the images are
                those of the batches that were begun, the last one as it is.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; None for none.
            mixed_precision: the precision of the network: "no", "bf16" or "fp16"; "auto" is bf16 where the device has
                it, or what `accelerate launch` was told. Everything else stays in float32. "no" leaves a
                `torch.autocast` around the call as it is.

        Raises:
            ValueError: an argument that does not fit the others, the network or the scheduler; or the images are not
                finite.
        """
        config = self.unet.config
        size = config.sample_size
        batch_size, num_inference_steps, max_batch = map(plain, (batch_size, num_inference_steps, max_batch))
        height, width, guidance_scale = map(plain, (height, width, guidance_scale))
        guidance_interval, eta = plain(guidance_interval), plain(eta)
        default_height, default_width = (size, size) if isinstance(size, int) else size
        height, width = default_height if height is None else height, default_width if width is None else width
        counts = {"batch_size": batch_size, "num_inference_steps": num_inference_steps, "max_batch": max_batch}
        for name, count in {**counts, "height": height, "width": width}.items():
            require(is_count(count), name, count, "must be an integer of at least 1")
        require(is_number(guidance_scale), "guidance_scale", guidance_scale, "must be a number; 1 is no guidance")
        labels = self._class_indices(class_labels, batch_size)
        generator = generators_for(generator, batch_size)
        shape = (batch_size, config.in_channels, height, width)
        self.check_inputs(shape, generator, latents, eta, output_type, callback_on_step_end_tensor_inputs)
        check_few_steps(self.few_steps, self.scheduler, num_inference_steps, guidance_scale)
        check_steps(self.scheduler, num_inference_steps)
        check_classes(config, batch_size, labels, guidance_scale, guidance_interval)
        self._interrupt = False
        device = self._execution_device
        self._precision = settled_precision(mixed_precision, device)
        start_sampling(self.scheduler, num_inference_steps, device)
        self._num_timesteps = len(self.scheduler.timesteps)
        guided = [i for i in range(self._num_timesteps) if self._is_guided(i, guidance_interval)]
        rule = f"the {self._num_timesteps} steps begin at multiples of 1 / {self._num_timesteps}, none of them in it"
        require(bool(guided), "guidance_interval", guidance_interval, rule)
        noise = self.prepare_latents(shape, device, generator, latents)
        classes = None if labels is None else torch.tensor(labels, device=device)

        finished = []
        starts = range(0, batch_size, max_batch)
        with self.progress_bar(total=len(starts) * self._num_timesteps) as progress:
            for start in starts:
                part = slice(start, start + max_batch)
                sample = noise[part]
                part_classes = None if classes is None else classes[part]
                part_generator = generator[part] if isinstance(generator, list) else generator
                start_sampling(self.scheduler, num_inference_steps, device)
                self._guidance_scale = guidance_scale
                for i, t in enumerate(self.scheduler.timesteps):
                    if self.interrupt:
                        break
                    guidance = self.guidance_scale if self._is_guided(i, guidance_interval) else 1.0
                    prediction = self._predict(sample, t, part_classes, guidance)
                    sample = denoised(self.scheduler, i, prediction, sample, part_generator, eta)
                    if callback_on_step_end is not None:
                        tensors = {"latents": sample} if "latents" in (callback_on_step_end_tensor_inputs or ()) else {}
                        changed = callback_on_step_end(self, i, t, tensors)
                        sample = sample if changed is None else changed.pop("latents", sample)
                    progress.update()
                finished.append(sample)
                if self.interrupt:
                    break

        generated = torch.cat(finished).float()
        check_finite("the generated images", generated)
        images = as_output(generated, output_type, self.pixel_range)
        self.maybe_free_model_hooks()
        return ImageGenerationOutput(images=images) if return_dict else (images,)

    def _is_guided(self, step: int, interval: tuple[float, float] | None) -> bool:
        """Returns whether a step begins in the interval; None means all of the schedule."""
        low, high = (0.0, 1.0) if interval is None else interval
        return low <= step / self.num_timesteps < high

    def _predict(self, sample: Tensor, timestep: Any, classes: Tensor | None, guidance: float) -> Tensor:
        """The network's prediction, float32 (B, C, H, W), guided by the class unless `guidance` is 1."""
        sample = scaled_input(self.scheduler, sample, timestep).to(self.unet.dtype)
        if guidance == 1 or classes is None:
            return self._run(sample, timestep, classes)
        null = torch.full_like(classes, self.unet.config.num_class_embeds)
        both = self._run(torch.cat([sample, sample]), timestep, torch.cat([classes, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _run(self, sample: Tensor, timestep: Any, classes: Tensor | None) -> Tensor:
        """Evaluates the network once; returns float32 (B, C, H, W)."""
        with autocast(sample.device, self._precision):
            prediction = self.unet(channels_last(sample), timestep, class_labels=classes, head="noise").sample
        return prediction.float().contiguous()  # as schedulers and callers expect

    def _class_indices(self, class_labels: Any, batch_size: int) -> list[int] | None:
        """Returns one index per image, from indices and names."""
        if class_labels is None:
            return None
        check_has_classes(self.unet.config)
        class_labels = plain(class_labels)
        given = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels] * batch_size
        return [class_index(label, self.label_names, "class_labels") for label in given]
