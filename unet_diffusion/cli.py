"""The command `unet-diffusion`: every job of the library, its options made from a dataclass."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro

from unet_diffusion.commands.demo.command import Demo, demo
from unet_diffusion.commands.doctor.command import Doctor, Report, doctor
from unet_diffusion.commands.evaluate import Evaluate, evaluate
from unet_diffusion.commands.evaluate_generation import EvaluateGeneration, evaluate_generation
from unet_diffusion.commands.export.command import Export, export
from unet_diffusion.commands.sample import Sample, sample
from unet_diffusion.commands.segment import Segment, segment
from unet_diffusion.commands.train_classifier import TrainClassifier, train_classifier
from unet_diffusion.commands.train_ddpm import TrainDDPM, train_ddpm
from unet_diffusion.commands.train_segmentation import TrainSegmentation, train_segmentation
from unet_diffusion.commands.upscale import Upscale, upscale

COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "train-ddpm": (TrainDDPM, train_ddpm),
    "sample": (Sample, sample),
    "upscale": (Upscale, upscale),
    "train-segmentation": (TrainSegmentation, train_segmentation),
    "segment": (Segment, segment),
    "evaluate": (Evaluate, evaluate),
    "evaluate-generation": (EvaluateGeneration, evaluate_generation),
    "train-classifier": (TrainClassifier, train_classifier),
    "export": (Export, export),
    "doctor": (Doctor, doctor),
    "demo": (Demo, demo),
}


def run(command: str, arguments: list[str] | None = None) -> None:
    """Runs one command with the arguments given, or those of the program.

    What a user got wrong ends the program with one sentence.
    """
    options, job = COMMANDS[command]
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    program = f"unet-diffusion {command}"
    try:
        result = job(tyro.cli(options, args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,)))
    except (ValueError, ImportError, RuntimeError, OSError, FloatingPointError) as error:
        raise SystemExit(f"{program}: {error}") from error
    except MemoryError as error:
        raise SystemExit(f"{program}: out of memory: {error} Use smaller images, crops or batches.") from error
    print(result)
    if isinstance(result, Report) and result.errors:
        raise SystemExit(1)


def main() -> None:
    """The entry point: the first argument names the command."""
    names = "\n".join(
        f"  {name:22} {(options.__doc__ or '').split('.')[0]}." for name, (options, _) in COMMANDS.items()
    )
    usage = f"usage: unet-diffusion COMMAND [OPTIONS]\n\n{names}\n\nunet-diffusion COMMAND --help lists the options."
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(usage)
        return
    if sys.argv[1] not in COMMANDS:
        raise SystemExit(f"unet-diffusion: there is no command {sys.argv[1]!r}.\n\n{usage}")
    run(sys.argv[1], sys.argv[2:])
