"""The command `unet-diffusion`: reads the options, then imports and runs their command."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from unet_diffusion.commands.options.demo import Demo
from unet_diffusion.commands.options.doctor import Doctor
from unet_diffusion.commands.options.evaluate import Evaluate
from unet_diffusion.commands.options.evaluate_generation import EvaluateGeneration
from unet_diffusion.commands.options.export import Export
from unet_diffusion.commands.options.sample import Sample
from unet_diffusion.commands.options.segment import Segment
from unet_diffusion.commands.options.train_classifier import TrainClassifier
from unet_diffusion.commands.options.train_ddpm import TrainDDPM
from unet_diffusion.commands.options.train_segmentation import TrainSegmentation
from unet_diffusion.commands.options.tune_few_steps import TuneFewSteps
from unet_diffusion.commands.options.upscale import Upscale
from unet_diffusion.unused_options import check_used
from unet_diffusion.version import __version__

COMMANDS: dict[str, tuple[type, str]] = {  # the options of each command, and the module with a function of its name
    "train-ddpm": (TrainDDPM, "train_ddpm"),
    "sample": (Sample, "sample"),
    "tune-few-steps": (TuneFewSteps, "tune_few_steps"),
    "upscale": (Upscale, "upscale"),
    "train-segmentation": (TrainSegmentation, "train_segmentation"),
    "segment": (Segment, "segment"),
    "evaluate": (Evaluate, "evaluate"),
    "evaluate-generation": (EvaluateGeneration, "evaluate_generation"),
    "train-classifier": (TrainClassifier, "train_classifier"),
    "export": (Export, "export.command"),
    "doctor": (Doctor, "doctor.command"),
    "demo": (Demo, "demo.command"),
}
SPINS = {"GOMP_SPINCOUNT": "10000"}  # turns of a waiting thread before it sleeps
HOW_THREADS_WAIT = {*SPINS, "OMP_WAIT_POLICY"}
INTERRUPTED = 130  # the exit status of a program ended by Ctrl-C, as in shells
EXPECTED = (ValueError, ImportError, RuntimeError, OSError, FloatingPointError, MemoryError)
if TYPE_CHECKING:
    Command = Any
else:
    Command = Union[*(Annotated[kind, tyro.conf.subcommand(name)] for name, (kind, _) in COMMANDS.items())]


@dataclass
class Program:
    """One U-Net for diffusion and segmentation: train it on images, generate, segment, enlarge, measure.

    `unet-diffusion --version` prints the version.
    """

    command: Command
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show the traceback of an error, not only its message."""


def main(arguments: Sequence[str] | None = None, before: Callable[[], None] = lambda: None) -> None:
    """Reads the options from the arguments, by default those of the program, and runs their command.

    A mistake of the user ends the program with one sentence; `--debug` shows the traceback as well. `before` is called
    after the command is imported and before it runs.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        print(__version__)
        return
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # files that it cannot read may be read in another way
    name = next((argument for argument in arguments if argument in COMMANDS), "")
    with answers(f"unet-diffusion {name}".strip(), debug="--debug" in arguments):
        settings = (tyro.conf.OmitArgPrefixes, tyro.conf.CascadeSubcommandArgs)
        if "" in arguments:
            raise ValueError("an argument is empty, perhaps a variable of the shell that is not set; leave it out.")
        chosen = tyro.cli(Program, args=arguments or ["--help"], prog="unet-diffusion", config=settings).command
        for field in fields(chosen):
            if isinstance(value := getattr(chosen, field.name), (Path, str)):
                # for --output=~/run, which the shell does not expand
                setattr(chosen, field.name, type(value)(os.path.expanduser(value)))
        check_used(chosen)
        chosen.check_paths()
        name, module = next((name, module) for name, (kind, module) in COMMANDS.items() if kind is type(chosen))
        command = getattr(import_module(f"unet_diffusion.commands.{module}"), name.replace("-", "_"))
        before()
        result = command(chosen)
    print(result)
    if getattr(result, "refusal", None):  # of a data set that the doctor examined
        raise SystemExit(1)


@contextmanager
def answers(program: str, debug: bool = False) -> Iterator[None]:
    """Ends the program with one sentence, which begins with the program's name, after a mistake or Ctrl-C in the block.

    With `debug`, the error is raised unchanged, so that its traceback is shown.
    """
    if not HOW_THREADS_WAIT & os.environ.keys():
        # GNU OpenMP reads this when PyTorch is imported. By default, it lets a waiting thread spin 300,000 times. If
        # another program wants the core too, this keeps the core from the thread that is waited for.
        os.environ |= SPINS
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        print(f"{program}: stopped by Ctrl-C{f'; {interrupt}' if interrupt.args else ''}.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except EXPECTED as error:
        if debug:
            raise
        sentence = str(error) or type(error).__name__
        if isinstance(error, MemoryError):
            sentence = f"out of memory: {error} Use smaller images, crops or batches."
        raise SystemExit(f"{program}: {sentence}") from error


def run(command: str, arguments: Sequence[str] | None = None) -> None:
    """Runs one command with the given arguments, by default those of the program."""
    main([command, *(sys.argv[1:] if arguments is None else arguments)])
