"""The images of a training, examined before they are loaded."""

from pathlib import Path

from accelerate import Accelerator

from unet_diffusion.commands.doctor.examination import present
from unet_diffusion.commands.doctor.summary import Summary
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.record import DataRecord
from unet_diffusion.data.sets import ImageSets, load_images


def load_examined(
    config: DataConfig, seed: int, output: Path, accelerator: Accelerator, earlier: Path | None = None
) -> tuple[ImageSets, Summary]:
    """Prints the summary of a run's images, loads them, and returns the images and the summary.

    Images stay on the side of the hold-out where the run in `output` had them, or else the run in `earlier`, if there
    is one. Raises the errors of `present` and `load_images`.
    """
    summary = present(config, quiet=not accelerator.is_main_process)
    before = DataRecord.before(output) or (None if earlier is None else DataRecord.before(earlier))
    data = load_images(config, seed, accelerator.process_index, accelerator.num_processes, before=before)
    return data, summary
