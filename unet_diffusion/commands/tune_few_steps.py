"""Tunes a finished run to generate in a few steps, from options to a folder that diffusers loads."""

from dataclasses import asdict, replace
from pathlib import Path

from diffusers import DDPMScheduler

from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.run_data import loading, map_as_learnt, own_options
from unet_diffusion.commands.training_images import load_examined
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.record import make_record
from unet_diffusion.data.sets import ImageSets
from unet_diffusion.pipelines.image_generation import ImageGenerationPipeline
from unet_diffusion.pipelines.super_resolution import SuperResolutionPipeline
from unet_diffusion.saved_index import SUPER_RESOLUTION, saved_kind, scheduler_folder
from unet_diffusion.saved_runs import load_pipeline, load_unet, stated_preparation
from unet_diffusion.tasks.diffusion import saved_objective
from unet_diffusion.tasks.few_steps import FewStepsSuperResolutionTask, FewStepsTask
from unet_diffusion.tasks.super_resolution import saved_small_images
from unet_diffusion.training.accelerator import make_accelerator
from unet_diffusion.training.trainer import Trainer
from unet_diffusion.unused_options import check_used


def tune_few_steps(options: TuneFewSteps) -> Path:
    """Tunes, or resumes a stopped tuning, and returns the folder of the tuned run.

    The folder holds the same files as that of `train_ddpm`. By default the images are those of the run, with the same
    ones held out.

    Raises:
        ValueError: an option, images or a run cannot be used, or a question has to be answered; raised before training
            starts.
        RuntimeError: another process is training in the folder.
    """
    options.check_paths()
    accelerator = make_accelerator(options.training, options.output)
    own = options.data.data is None
    given, run = options.data, options.model
    options = replace(options, data=run_images(run, given) if own else given.converted_like(stated_preparation(run)))
    earlier = run if own else None
    data, summary = load_examined(options.data, options.training.seed, options.output, accelerator, earlier)
    if own:
        map_as_learnt(data, run)  # percentiles of all images that are there now can be others
    check_used(options, held_out=data.validation is not None)
    task = make_task(options, data)
    resolved = asdict(options) | {"diffusion": asdict(task.config)}
    if isinstance(task, FewStepsSuperResolutionTask):
        resolved["super_resolution"] = {"scale": task.scale, "condition_noise": task.condition_noise}
    record = make_record(data, options.data.preparation, summary=summary.lines())
    return Trainer(task, options.training, options.output, resolved, accelerator, record).run()


def run_images(run: Path, given: DataConfig) -> DataConfig:
    """Returns the options of the images that a run learnt from, to be loaded as the given options state."""
    if not (run / "config.json").is_file():
        raise ValueError(f"data is not given, and {run} has no config.json that says what it learnt from; give data.")
    return own_options(run, DataConfig, loading(given))


def make_task(options: TuneFewSteps, data: ImageSets) -> FewStepsTask | FewStepsSuperResolutionTask:
    """Returns the task of the options; a ValueError names images that the run to tune does not generate."""
    run, train = options.model, data.train
    size = train.height if train.height == train.width else (train.height, train.width)
    pipe: SuperResolutionPipeline | ImageGenerationPipeline
    if saved_kind(run) == SUPER_RESOLUTION:
        pipe, seen = load_pipeline(SuperResolutionPipeline, run), 2 * train.channels
    else:
        pipe, seen = load_pipeline(ImageGenerationPipeline, run), train.channels
    unet = load_unet(str(run), {"sample_size": size, "in_channels": seen, "out_channels": train.channels})
    folder = scheduler_folder(run)
    assert folder is not None  # as `check_paths` has checked
    scheduler = DDPMScheduler.from_pretrained(folder)
    config = saved_objective(run, unet, scheduler)
    if train.pixel_range != pipe.pixel_range:
        raise ValueError(
            f"the run in {run} learnt from images mapped by {pipe.pixel_range}, but these are mapped by "
            f"{train.pixel_range}; give {pipe.pixel_range.options}, or leave data out."
        )
    if isinstance(pipe, SuperResolutionPipeline):
        small = saved_small_images(run, pipe.scale)
        workers = options.data.num_workers
        return FewStepsSuperResolutionTask(unet, data, config, small, options.few_steps, scheduler, workers)
    names = None if train.class_names is None else list(train.class_names)
    if config.class_conditional and names != pipe.label_names:
        raise ValueError(
            f"the classes of the run in {run} are {pipe.label_names}, but those of these images are {names}; name the "
            "column of the same classes by label_column, or leave data out."
        )
    return FewStepsTask(unet, data, config, options.few_steps, scheduler, options.data.num_workers)
