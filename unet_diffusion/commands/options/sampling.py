"""The sampler and the number of steps with which a run generates images, if the options leave them open."""

from pathlib import Path

from unet_diffusion.diffusion.config import SamplerName, best_sampling
from unet_diffusion.saved_index import read_object, saved_few_steps, scheduler_folder


def sampling_of(run: Path, sampler: SamplerName | None, steps: int | None) -> tuple[SamplerName, int]:
    """Returns the sampler and its number of steps; each defaults to what suits the network of the run best."""
    if sampler is not None and steps is not None:
        return sampler, steps
    folder = scheduler_folder(run)
    scheduler = {} if folder is None else read_object(folder / "scheduler_config.json")
    prediction_type, timesteps = scheduler.get("prediction_type", "epsilon"), scheduler.get("num_train_timesteps")
    best, enough = best_sampling(prediction_type, saved_few_steps(run), timesteps)
    return sampler or best, enough if steps is None else steps
