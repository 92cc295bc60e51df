"""Our pipelines, one a file; they are resolved as `unet_diffusion.pipelines`."""

from unet_diffusion.pipelines.image_generation import ImageGenerationOutput, ImageGenerationPipeline
from unet_diffusion.pipelines.segmentation import SegmentationOutput, SegmentationPipeline

__all__ = ["ImageGenerationOutput", "ImageGenerationPipeline", "SegmentationOutput", "SegmentationPipeline"]
