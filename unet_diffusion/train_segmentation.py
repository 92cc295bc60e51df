"""A segmentation run from options to a folder with a pipeline."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from unet_diffusion.augmentation import AugmentationConfig
from unet_diffusion.doctor import refuse_errors
from unet_diffusion.masked_data import MaskedDataConfig, MaskedSets, load_masked
from unet_diffusion.networks import load_unet
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.randomness import keyed_seed
from unet_diffusion.segmentation_task import SegmentationConfig, SegmentationTask
from unet_diffusion.training import Trainer, make_accelerator
from unet_diffusion.training_config import TrainingConfig
from unet_diffusion.unet import UNet

logger = logging.getLogger(__name__)


@dataclass
class TrainSegmentation:
    """Train a U-Net to give masks, from a DDPM run or from nothing. The same command again goes on after a stop."""

    data: MaskedDataConfig
    output: Path = Path("runs/segmentation")
    """Folder of the run; it becomes a SegmentationPipeline."""
    model: str = "small-32"
    """Where to start: the folder of a DDPM or segmentation run, or, for untrained weights, a preset or a JSON file of
    config values."""
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    augment: bool = True
    """Vary pictures and masks in training, as the next options say."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def train_segmentation(config: TrainSegmentation) -> Path:
    """Trains, or goes on training, and returns the run's folder.

    The folder holds the pipeline, a model card, `masks.png`, `curves.png`, `metrics.jsonl`, `config.json`, previews and
    checkpoints. Channels and classes follow from the data. A network that comes from a DDPM run keeps its noise head,
    frozen, and its scheduler.

    Raises:
        ValueError: an option, data or a network that cannot be used, before training starts.
        RuntimeError: another process is training in the folder.
    """
    accelerator = make_accelerator(config.training, config.output)
    refuse_errors(config.data)
    data = load_masked(config.data, config.training.seed)
    torch.manual_seed(keyed_seed(config.training.seed, "initialisation"))
    task = SegmentationTask(
        make_unet(config.model, data),
        data,
        config.segmentation,
        config.augmentation if config.augment else None,
        saved_scheduler(Path(config.model), data),
        config.data.num_workers,
    )
    return Trainer(task, config.training, config.output, asdict(config), accelerator).run()


def make_unet(model: str, data: MaskedSets) -> UNet:
    """The network of a run, with a segmentation head for the classes of the data.

    Raises:
        ValueError: weights for another number of channels, or a segmentation head for other classes.
    """
    channels = data.train.channels
    if Path(model).is_dir():
        return load_unet(model, {"in_channels": channels}).to_segmentation(data.num_classes)
    return load_unet(model, {"in_channels": channels, "out_channels": None, "num_classes": data.num_classes})


def saved_scheduler(run: Path, data: MaskedSets) -> DDPMScheduler | None:
    """The scheduler of a DDPM run, or None; warns where that run saw pictures in another range of values."""
    if not (run / "scheduler").is_dir():
        return None
    pixel_range = ImageGenerationPipeline.from_pretrained(run).pixel_range
    if pixel_range != data.pixel_range:
        logger.warning(
            "the network of %s learnt from %s, but these pictures are mapped by %s; value_range makes them agree",
            run,
            pixel_range,
            data.pixel_range,
        )
    return DDPMScheduler.from_pretrained(run / "scheduler")
