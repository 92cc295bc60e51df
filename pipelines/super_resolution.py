"""Small images to large ones with any scheduler of diffusers, tile by tile if they are large."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from unet_diffusion.checks import is_count, plain, require
from unet_diffusion.diffusion.config import check_condition_noise, check_scale
from unet_diffusion.diffusion.low_resolution import enlarged, with_noise
from unet_diffusion.diffusion.sampling import (
    check_few_steps,
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
from unet_diffusion.network.tiling import Tiling, tiled
from unet_diffusion.pipelines.base import (
    Generators,
    PrivateArguments,
    check_noise_predictor,
    check_tuned_steps,
    generators_for,
    saved_range,
    trained_settings,
)
from unet_diffusion.unet import UNet

OUTPUT_TYPES = ("pil", "np", "pt", "stored")


@dataclass
class SuperResolutionOutput(BaseOutput):
    """The output of `SuperResolutionPipeline`: the large images, of the type that its `output_type` asks for.

    It is a list with one entry per image, since sizes may differ.
    """

    images: list[Image.Image] | list[np.ndarray] | list[Tensor]


class SuperResolutionPipeline(PrivateArguments, DiffusionPipeline):
    """Enlarges images by denoising, given the small image (SR3, Saharia et al. 2021), with any scheduler of diffusers.

    An image of any size starts from noise of the large size, which is drawn once. In each step the network sees the
    noisy image and the enlarged small one; if they are larger than one window, it sees them window by window
    (`unet_diffusion.network.tiling`). The predictions are joined before the scheduler's step, so that all windows
    continue from one image.

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from diffusers import DDPMScheduler
        >>> from unet_diffusion import UNet
        >>> from unet_diffusion.pipelines import SuperResolutionPipeline
        >>> from unet_diffusion.diffusion.sampling import sampler

        >>> unet = UNet.from_preset("tiny", in_channels=2, out_channels=1)
        >>> pipe = SuperResolutionPipeline(unet, sampler("dpm-solver++", DDPMScheduler()), scale=2)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> image = np.zeros((10, 15), dtype=np.uint8)
        >>> pipe(image, num_inference_steps=5, generator=torch.manual_seed(0)).images[0].size
        (30, 20)

    Args:
        unet: a network with a timestep embedding, and with twice as many channels in as its noise head has out: the
            noisy image, then the enlarged one.
        scheduler: the sampler; `unet_diffusion.diffusion.sampling.sampler` makes one from the training's scheduler.
        scale: the factor by which each side of an image grows, as the network was trained.
        pixel_range: how stored values map to [-1, 1], in the form of `PixelRange.to_dict`; None for 8-bit images.
        trained_with: settings of the scheduler that the network was trained with; schedulers with other settings are
            refused. None takes them from `scheduler`.
        few_steps: the largest number of steps that `tune-few-steps` tuned the network for; None if it was not tuned.

    Raises:
        ValueError: the network cannot enlarge images, the scale is not an integer of at least 2, the pixel range is
            invalid or another for each image, or the number of steps is invalid.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet,
        scheduler: SchedulerMixin,
        scale: int | None = None,
        pixel_range: dict | None = None,
        trained_with: dict | None = None,
        few_steps: int | None = None,
    ) -> None:
        super().__init__()
        check_noise_predictor(unet, 2, "super-resolution needs twice as many channels in as out")
        classes = unet.config.get("num_class_embeds")
        require(classes is None, "num_class_embeds", classes, "super-resolution needs a network without classes")
        check_scale(scale)
        own = saved_range(pixel_range).percentiles
        rule = "a small image and a large one would each get a range of its own; train with one range for all"
        require(own is None, "percentiles", own, rule)
        check_tuned_steps(few_steps)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            _scale=plain(scale),
            _pixel_range=plain(pixel_range),
            _trained_with=trained_settings(trained_with, scheduler),
            _few_steps=few_steps,
        )
        self.check_noise_settings()

    @property
    def scale(self) -> int:
        """The factor by which each side of an image grows."""
        return self.config["_scale"]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.unet.config.out_channels

    @property
    def few_steps(self) -> int | None:
        """The largest number of steps that `tune-few-steps` tuned the network for; None if it was not tuned."""
        return self.config["_few_steps"]

    def check_inputs(self, num_inference_steps: int, condition_noise: float, output_type: str) -> None:
        """Raises a ValueError that gives the value, the rule and the fix for the first argument that is wrong."""
        steps = num_inference_steps
        require(is_count(steps), "num_inference_steps", steps, "must be an integer of at least 1")
        check_condition_noise(condition_noise)
        check_output_type(output_type, OUTPUT_TYPES, self.channels, self.pixel_range)
        check_scheduler(self.scheduler, eta=None)
        self.check_noise_settings()

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        num_inference_steps: int = 20,
        generator: Generators = None,
        condition_noise: float = 0.0,
        tile_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        mixed_precision: Precision = "no",
    ) -> SuperResolutionOutput | tuple:
        """Enlarges one or more images, which may differ in size.

        Args:
            image: a PIL image, a path, an array (H, W) or (H, W, C), or a tensor (C, H, W) or (B, C, H, W), with the
                values that are stored in files; or a list of these. An array is taken as (C, H, W) if only this order
                fits the network's channels.
            num_inference_steps: steps of the scheduler; about 20 for a fast solver, 1 or 2 of `LCMScheduler` for a
                network that `tune-few-steps` has tuned. They must not be more than the timesteps of the training.
            generator: one generator, or a list or tuple with one per image, so that an image does not depend on the
                others; None for PyTorch's global one.
            condition_noise: deviation of the noise that is added to the enlarged image, whose values lie in [-1, 1]. It
                helps with images that are worse than the training images, such as compressed ones.
            tile_size: pixels a side of a tile of the large image. None chooses it for about 64 MiB of memory in the
                network, and runs images that take at most 512 MiB whole.
            output_type: "pil": PIL images (1, 3 or 4 channels); "np": float32 arrays (H, W, C) in [0, 1]; "pt": float32
                tensors (C, H, W) in [0, 1]; "stored": tensors (C, H, W) in the data type and values of the training
                files.
            return_dict: whether to return a `SuperResolutionOutput`, or else a tuple.
            mixed_precision: the precision of the network: "no", "bf16" or "fp16"; "auto" is bf16 where the device has
                it, or what `accelerate launch` was told. Everything else stays in float32. "no" leaves a
                `torch.autocast` around the call as it is.

        Raises:
            ValueError: an image or an argument does not fit the network or the scheduler, or a large image is not
                finite; the message gives the fix.
        """
        num_inference_steps, condition_noise = plain(num_inference_steps), plain(condition_noise)
        self.check_inputs(num_inference_steps, condition_noise, output_type)
        check_few_steps(self.few_steps, self.scheduler, num_inference_steps)
        check_steps(self.scheduler, num_inference_steps)
        self._precision = settled_precision(mixed_precision, self._execution_device)
        tiling = Tiling.of(self.unet, tile_size)
        inputs = list(self.read_images(image))
        given = generators_for(generator, len(inputs))
        generators = iter([given] * len(inputs) if isinstance(given, torch.Generator) else given or ())
        start_sampling(self.scheduler, num_inference_steps, self._execution_device)
        batches = list(tiling.batches(inputs, self.scale))
        images: list[Any] = []
        with self.progress_bar(total=len(batches) * len(self.scheduler.timesteps)) as progress:
            for batch in batches:
                small = torch.stack(batch).to(self._execution_device)
                own = list(islice(generators, len(batch))) or None
                condition = enlarged(small, self.scale, self.pixel_range)
                large = self._drawn(condition, own)  # first, so that it does not depend on what else is drawn
                if condition_noise > 0:
                    levels = torch.full((len(small),), condition_noise, device=condition.device)
                    condition = with_noise(condition, levels, self._drawn(condition, own))
                start_sampling(self.scheduler, num_inference_steps, self._execution_device)
                large = large * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers have none
                for i, t in enumerate(self.scheduler.timesteps):
                    prediction = self._predict(large, t, condition, tiling)
                    large = denoised(self.scheduler, i, prediction, large, own)
                    progress.update()
                check_finite("the generated images", large)
                images.extend(as_output(large.float(), output_type, self.pixel_range))
        self.maybe_free_model_hooks()
        return SuperResolutionOutput(images=images) if return_dict else (images,)

    def _drawn(self, like: Tensor, generators: list[torch.Generator] | None) -> Tensor:
        """Standard normal noise (B, C, H, W) of the shape of `like`, float32."""
        return randn_tensor(tuple(like.shape), generator=generators, device=like.device, dtype=torch.float32)

    def _predict(self, large: Tensor, timestep: Any, condition: Tensor, tiling: Tiling) -> Tensor:
        """The network's prediction for noisy images beside their conditions, float32 (B, C, H, W)."""
        seen = torch.cat([scaled_input(self.scheduler, large, timestep), condition], dim=1)  # (B, 2C, H, W)

        def predict(window: Tensor) -> Tensor:
            with autocast(window.device, self._precision):
                return self.unet(channels_last(window.to(self.unet.dtype)), timestep, head="noise").sample.float()

        prediction, size = torch.empty_like(large), (large.shape[2], large.shape[3])
        windows = tiled(predict, lambda rows, columns: seen[..., rows, columns], size, tiling)
        for rows, columns, values in windows:
            prediction[..., rows, columns] = values
        return prediction
