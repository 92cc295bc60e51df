"""Our pipelines, one per file, imported as `unet_diffusion.pipelines`."""

from unet_diffusion.pipelines.image_generation import ImageGenerationOutput, ImageGenerationPipeline
from unet_diffusion.pipelines.segmentation import SegmentationOutput, SegmentationPipeline
from unet_diffusion.pipelines.super_resolution import SuperResolutionOutput, SuperResolutionPipeline

__all__ = [
    "ImageGenerationOutput",
    "ImageGenerationPipeline",
    "SegmentationOutput",
    "SegmentationPipeline",
    "SuperResolutionOutput",
    "SuperResolutionPipeline",
]
