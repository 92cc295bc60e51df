"""Super-resolution by regression, with a U-Net of the size of the diffusion model it is compared with."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from unet_diffusion import UNet
from unet_diffusion.data.dataset import to_batch
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.diffusion.config import check_sides
from unet_diffusion.diffusion.low_resolution import enlarged, shrunk
from unet_diffusion.files import merged_into
from unet_diffusion.images.figures import array_images, grid
from unet_diffusion.tasks.config import DiffusionConfig
from unet_diffusion.tasks.diffusion import DiffusionTask


class RegressionTask(DiffusionTask):
    """Predicts the large image from the enlarged small one in one network pass, by the mean squared error.

    The network predicts what is missing in the enlarged image. Its noise head is set to zero, so that training starts
    from bicubic interpolation. The timestep is always 0. The layers are those of the diffusion model except for the
    first, which sees one image rather than two.

    Args:
        unet: network with C input and C output channels.
        data: training images and held-out images.
        scale: factor of the sides.
        config: numbers of images for validation and for previews.
        num_workers: processes that load images ahead.
    """

    def __init__(self, unet: UNet, data: ImageSets, scale: int, config: DiffusionConfig, num_workers: int = 0) -> None:
        check_sides(data.train.height, data.train.width, scale)
        assert data.validation is not None
        super().__init__(unet, data, config, num_workers)
        for parameter in unet.noise_head.parameters():
            nn.init.zeros_(parameter)
        self.scale, self.held_out = scale, data.validation

    def loss(self, unet: nn.Module, batch: dict[str, Tensor], generators: list[torch.Generator]) -> Tensor:
        """The mean squared error; nothing is random."""
        clean = self.pixel_range.to_model(batch["image"])
        return F.mse_loss(self.predicted(unet, clean), clean)

    def predicted(self, unet: nn.Module, clean: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], predicted from their small versions."""
        return regressed(unet, enlarged(shrunk(clean, self.scale, self.pixel_range), self.scale, self.pixel_range))

    def validate(self, unet: UNet, accelerator: Accelerator) -> dict[str, float]:
        """The mean squared error on held-out images."""
        count = min(len(self.held_out), self.config.validation_images)
        total = 0.0
        for start in range(0, count, self.batch_size):
            indices = range(start, min(start + self.batch_size, count))
            batch = to_batch([self.held_out[index] for index in indices])
            images = batch["image"].to(accelerator.device)
            total += len(indices) * self.loss(unet, {"image": images}, []).item()
        return {"validation_loss": total / count}

    def shown(self, unet: UNet) -> Image.Image:
        """Held-out images in pairs: prediction, original."""
        count = min(len(self.held_out), self.config.preview_images)
        clean = self.pixel_range.to_model(torch.stack([self.held_out[i]["image"] for i in range(count)]))
        pairs = torch.stack([self.predicted(unet, clean.to(unet.device)).cpu(), clean], dim=1).flatten(0, 1)
        return grid(array_images((pairs / 2 + 0.5).permute(0, 2, 3, 1).numpy()))

    def export(self, unet: UNet, folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Saves the network and a preview; `metrics.jsonl` has the losses."""
        with merged_into(folder) as aside:
            unet.save_pretrained(aside / "unet")
            self.preview(unet, aside / "samples.png")


def regressed(unet: nn.Module, condition: Tensor) -> Tensor:
    """Enlarged images (B, C, H, W) in [-1, 1] plus what the network predicts to be missing."""
    return condition + unet(condition, 0, head="noise").sample.float()
