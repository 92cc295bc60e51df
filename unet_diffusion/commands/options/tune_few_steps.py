"""The options of `unet-diffusion tune-few-steps`."""

from dataclasses import dataclass, field
from pathlib import Path

from unet_diffusion.commands.options.evaluate_generation import RealData
from unet_diffusion.data.config import DataConfig
from unet_diffusion.data.folders import check_outside, check_sources, sources_of_run
from unet_diffusion.diffusion.config import check_tunable
from unet_diffusion.files import check_output
from unet_diffusion.saved_index import (
    check_run,
    read_object,
    saved_few_steps,
    saved_kind,
    scheduler_folder,
    unet_folder,
)
from unet_diffusion.tasks.config import FewStepsConfig
from unet_diffusion.training.config import TrainingConfig
from unet_diffusion.unused_options import check_used


@dataclass
class TuningData(RealData):
    """The images to tune on."""


@dataclass
class FewStepsTraining(TrainingConfig):
    """The options of the training loop, with defaults for tuning."""

    steps: int = 2000
    """Optimizer steps of the whole run."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW; that of Muon is 20 times as high."""


@dataclass
class TuneFewSteps:
    """Tune a finished run to generate or enlarge images in 1 to 4 steps. To resume, give the same command again."""

    model: Path
    """Folder of the run to tune; it does not change."""
    output: Path = Path("runs/few-steps")
    """Folder of the tuned run. It becomes a diffusers pipeline."""
    data: DataConfig = field(default_factory=TuningData)
    few_steps: FewStepsConfig = field(default_factory=FewStepsConfig)
    training: TrainingConfig = field(default_factory=FewStepsTraining)

    def check_paths(self) -> None:
        """Raises a ValueError for a run that cannot be tuned, missing data, or an output that cannot be written."""
        check_run(self.model)
        check_kind(self.model)
        few = saved_few_steps(self.model)
        if few is not None and self.few_steps.method == "distillation":
            raise ValueError(
                f"model is {self.model}, a run that was tuned for 1 to {few} steps, but distillation learns from the "
                "mean of all likely images, which a tuned run no longer predicts; give the run that it was tuned from, "
                "or set method to 'consistency', which learns from the images alone."
            )
        check_output(self.output)
        if self.output.resolve() == self.model.resolve():
            raise ValueError(f"output is {self.output}, the run to tune, which does not change; give another folder.")
        own = sources_of_run(self.model) if self.data.data is None else ()
        check_outside(self.output, self.data.data, self.data.validation_data, *own)
        check_sources(self.data)
        if self.data.data is not None:  # otherwise checked when the images of the run are known
            classes = read_object(unet_folder(self.model) / "config.json").get("num_class_embeds")
            check_used(self, held_out=self.data.holds_out, class_conditional=classes is not None)


def check_kind(run: Path) -> None:
    """Raises a ValueError unless a run only generates or enlarges images, from a prediction that can be tuned."""
    kind, folder = saved_kind(run), scheduler_folder(run)
    if kind == "SegmentationPipeline":
        raise ValueError(
            f"model is {run}, a run that gives masks, but tuning changes the layers that its masks come from; tune the "
            "run of train-ddpm, then train masks from the tuned one: train-segmentation --model TUNED."
        )
    if folder is None:
        raise ValueError(f"model is {run}, but there is no scheduler in it; give the folder of a run of train-ddpm.")
    check_tunable(read_object(folder / "scheduler_config.json").get("prediction_type", "epsilon"))
